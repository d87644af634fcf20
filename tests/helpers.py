"""Small portfolios and outcomes; the random ones have a known relation of score and quality."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path

import numpy as np
from sqlalchemy import text

from routenlp_plugins import Completion, Policy, Portfolio, Query, Release, Task, Tier, TraceStore
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.policy import Confidence, Rung
from routenlp_plugins.signals.rows import Recorded

ROOT = Path(__file__).parent.parent
SMALL, MIDDLE, FRONTIER = "small", "middle", "frontier"
QUESTION = "a question"
BEYOND = ("structured output", "tools")
PRICES = {SMALL: 0.1, MIDDLE: 1.0, FRONTIER: 10.0}


def portfolio(*tasks: Task) -> Portfolio:
    tiers = tuple(Tier(name, price, price) for name, price in PRICES.items())
    return Portfolio(tiers, FRONTIER, tasks or (Task("t"),))


def policy(*rungs: Rung, task: str = "t") -> Policy:
    return Policy(FRONTIER, {task: rungs})


def gated(tier: str, threshold: float, kind: str = "confidence") -> Rung:
    """A rung that looks at one kind of evidence of its own answer."""
    return Rung(tier, threshold, (Confidence.plain(tier, kind),))


def release(*rungs: Rung, task: str = "t") -> Release:
    return Release(portfolio(Task(task)), policy(*rungs, task=task))


def release_beyond(rung: Rung, requires: tuple[str, ...] = (), *tasks: str) -> Release:
    """Two tiers that can do all of `BEYOND`; of the tasks the first has this rung."""
    tiers = tuple(Tier(name, PRICES[name], PRICES[name], supports=BEYOND) for name in (SMALL, FRONTIER))
    names = tasks or ("t",)
    used = Portfolio(tiers, FRONTIER, tuple(Task(name, requires=requires) for name in names))
    ladders = {**dict.fromkeys(names, ()), names[0]: (rung,)}
    return Release(used, Policy(FRONTIER, ladders, requires={name: requires for name in names if requires}))


def row(name: str, task: str = "t", group: str | None = None, **tiers: tuple[float | None, float | None]) -> OutcomeRow:
    """A row from tier -> (quality, confidence); every call has ten tokens in and ten out."""
    outcomes = {
        tier: Outcome(quality, Completion(f"{tier} says", confidence=score, input_tokens=10, output_tokens=10))
        for tier, (quality, score) in tiers.items()
    }
    return OutcomeRow(Query(QUESTION, task, name), outcomes, reference="r", group=group, source=f"row {name}")


def rows(n: int, seed: int = 0, task: str = "t", *, informative: bool = True) -> list[OutcomeRow]:
    """n rows of three tiers; confidence is the true probability of a good answer, or noise."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(n):
        small, middle = rng.beta(3, 1.2), rng.beta(6, 1.2)
        good = rng.random(2) < (small, middle)
        shown = (small, middle) if informative else rng.random(2)
        result.append(
            row(
                f"{task}-{i}",
                task,
                small=(float(good[0]), float(shown[0])),
                middle=(float(good[1]), float(shown[1])),
                frontier=(1.0, None),
            )
        )
    return result


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def record(name: str = "q1", **changes: object) -> dict[str, object]:
    """A valid outcome record."""
    outcomes = {
        SMALL: {"quality": 1.0, "answer": "a", "confidence": 0.9, "input_tokens": 10, "output_tokens": 2},
        FRONTIER: {"quality": 1.0, "answer": "a", "input_tokens": 10, "output_tokens": 2},
    }
    return {"query_id": name, "task": "t", "text": "x", "reference": "a", "outcomes": outcomes, **changes}


async def ticks_during(work: Awaitable[object], interval: float) -> int:
    """How often the event loop came round, every `interval` seconds at best, while something was awaited."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(interval)
            ticks += 1

    ticker = asyncio.create_task(tick())
    await work
    ticker.cancel()
    return ticks


def kept(store: TraceStore) -> list[Recorded]:
    """The traces of a store, all that was given to it included."""
    store.flush(10)
    return list(store.traces())


def signals(store: TraceStore) -> list[tuple[str, str, str, float]]:
    """(run id, kind, source, value) of its signals, in order of time."""
    store.flush(10)
    with store.engine.connect() as connection:
        rows = connection.execute(text("SELECT run_id, kind, source, value FROM signals ORDER BY at, kind, source"))
        return [tuple(row) for row in rows]
