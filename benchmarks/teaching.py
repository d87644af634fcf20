"""What is taught to whom: the settings that the benchmarks of distillation share.

Of a task with labels, the student is given 15 examples of most and 2 of the others: those are the failures to come.
The rest of its train split is traffic to be taught from, and calibration; the test split measures. Of cs_response,
which has no labels, it is given 400 turns of whole dialogues. The frontier replays references.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from local_tiers import ReferenceFrontier, data_folder, instruction, parts
from numpy.typing import NDArray

from routenlp_plugins import (
    Budget,
    Call,
    Completion,
    FitOptions,
    Lesson,
    Portfolio,
    Query,
    Release,
    RiskNotControlledError,
    StaticEmbeddings,
    Task,
    Tier,
    fit,
)
from routenlp_plugins.comparing import comparator
from routenlp_plugins.distill.clusters import FailureClusters
from routenlp_plugins.distill.selection import SELECTIONS, Candidates, coverage
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.evaluate.table import cost_of
from routenlp_plugins.replaying import replayed

__all__ = [
    "ARMS",
    "DELTA",
    "FRONTIER",
    "RETENTION",
    "STUDENT",
    "Row",
    "Setting",
    "costs",
    "escalated",
    "fitted",
    "lessons",
    "rows_of",
    "setting",
]

ARMS = ("none", "random", "random escalated", "random failures", "uncertainty", "size x gap", "coverage")
METRICS = {"cs_intent": "accuracy", "legal_clause": "accuracy", "cs_response": "rouge_l"}
RETENTION = {"cs_intent": 0.97, "legal_clause": 0.97, "cs_response": 0.9}
"""Of the frontier's quality, with probability 0.9: set before anything was run."""
DELTA = 0.1
WEAK = {"cs_intent": 25, "legal_clause": 6}
STRONG, SCARCE, GIVEN = 15, 2, 400
STUDENT, FRONTIER = "student", "reference-frontier"
Row = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Setting:
    """A task cut into what is given, what is taught from, what calibrates and what measures."""

    task: str
    portfolio: Portfolio
    frontier: ReferenceFrontier
    given: Sequence[Row]
    traffic: Sequence[Row]
    calibration: Sequence[Row]
    test: Sequence[Row]

    @property
    def lessons(self) -> tuple[Lesson, ...]:
        """What the student is given."""
        return tuple(Lesson(r["query_id"], self.task, r["text"], r["reference"], "given") for r in self.given)


def setting(task: str, seed: int, *, traffic: int, calibration: int, test: int) -> Setting:
    with gzip.open(data_folder() / "tasks" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rng = np.random.default_rng(seed)
    train = [row for row in rows if row["split"] == "train"]
    given, rest = _given(train, rng, WEAK[task]) if task in WEAK else _whole_dialogues(train, rng)
    tests = [row for row in rows if row["split"] == "test"]
    portfolio = Portfolio(
        (Tier(STUDENT, usd_per_hour=0.1), Tier(FRONTIER, 2.5, 10.0)), FRONTIER, (Task(task, METRICS[task], tau=0.6),)
    )
    if METRICS[task] == "accuracy":
        portfolio = replace(portfolio, tasks=(Task(task, "accuracy"),))
    return Setting(
        task,
        portfolio,
        ReferenceFrontier({row["query_id"]: row["reference"] for row in rows}, instruction(task, train)),
        given,
        rest[:traffic],
        rest[traffic : traffic + calibration],
        [tests[i] for i in rng.permutation(len(tests))[:test]],
    )


def _given(train: Sequence[Row], rng: np.random.Generator, weak: int) -> tuple[list[Row], list[Row]]:
    labels = sorted({row["reference"] for row in train})
    scarce = {labels[i] for i in rng.permutation(len(labels))[:weak]}
    seen: Counter[str] = Counter()
    given: list[Row] = []
    rest: list[Row] = []
    for i in rng.permutation(len(train)):
        label = train[i]["reference"]
        (given if seen[label] < (SCARCE if label in scarce else STRONG) else rest).append(train[i])
        seen[label] += 1
    return given, rest


def _whole_dialogues(train: Sequence[Row], rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    known, rest = parts(list(train), rng)
    return [known[i] for i in rng.permutation(len(known))[:GIVEN]], [rest[i] for i in rng.permutation(len(rest))]


def queries(rows: Sequence[Row], task: str) -> list[Query]:
    return [Query(row["text"], task, row["query_id"]) for row in rows]


def rows_of(of: Setting, rows: Sequence[Row], answers: Sequence[Completion]) -> list[OutcomeRow]:
    """Outcomes of the student and of the reference frontier."""
    quality = comparator(of.portfolio.task(of.task).agreement)
    found = []
    for row, answer, query in zip(rows, answers, queries(rows, of.task), strict=True):
        reference = of.frontier(Call(FRONTIER, query))
        outcomes = {
            STUDENT: Outcome(quality(answer.text, row["reference"]), answer),
            FRONTIER: Outcome(1.0, reference),
        }
        found.append(OutcomeRow(query, outcomes, source=row["query_id"]))
    return found


def fitted(of: Setting, calibration: Sequence[OutcomeRow], seed: int) -> Release:
    """Certified at the task's retention; nothing is routed where nothing can be."""
    options = FitOptions(router=None)
    try:
        return fit(calibration, of.portfolio, retention=RETENTION[of.task], delta=DELTA, seed=seed, options=options)
    except RiskNotControlledError as error:
        return error.release


def escalated(rows: Sequence[OutcomeRow], release: Release) -> NDArray[np.bool_]:
    return np.array([replayed(row, release).tier == FRONTIER for row in rows], dtype=np.bool_)


def costs(of: Setting, rows: Sequence[OutcomeRow], release: Release) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) USD of each query under the release, and of the frontier alone."""
    tiers = {tier.name: tier for tier in of.portfolio.tiers}

    def usd(row: OutcomeRow, names: Sequence[str]) -> float:
        return sum(cost_of(row.outcomes[name], tiers[name], row.source) for name in names)

    made = [[attempt.tier for attempt in replayed(row, release).trace.attempts] for row in rows]
    return (
        np.array([usd(row, names) for row, names in zip(rows, made, strict=True)]),
        np.array([usd(row, [FRONTIER]) for row in rows]),
    )


def lessons(
    of: Setting, traffic: Sequence[OutcomeRow], release: Release, arm: str, budget: int, seed: int
) -> tuple[tuple[Lesson, ...], float]:
    """What an arm teaches, and what the teacher's answers cost that were not paid when they were served."""
    texts = [row.query.text for row in traffic]
    passed_on = escalated(traffic, release)
    encoder = StaticEmbeddings.wordllama()
    clusters = FailureClusters.fit(
        [t for t, e in zip(texts, passed_on, strict=True) if e], [of.task] * int(passed_on.sum()), encoder, seed=seed
    )
    quality = comparator(of.portfolio.task(of.task).agreement)
    frontier_usd = np.array([cost_of(row.outcomes[FRONTIER], of.portfolio.tier(FRONTIER), "") for row in traffic])
    confidence = [row.outcomes[STUDENT].completion for row in traffic]
    right = np.array([row.outcomes[STUDENT].quality for row in traffic], dtype=np.float64)
    candidates = Candidates(
        queries=[row.query for row in traffic],
        vectors=encoder(texts),
        answers=[row.outcomes[FRONTIER].completion.text for row in traffic],
        # of what was answered by the student nobody has told how good it was
        right=np.where(passed_on, right, np.nan),
        confidence=np.array(
            [c.confidence if c.confidence is not None else np.exp(c.mean_logprob or -9.0) for c in confidence]
        ),
        escalated=passed_on,
        saving=frontier_usd,
        price=np.where(passed_on, 0.0, frontier_usd),
        cluster=clusters.assign(texts, [of.task] * len(texts)),
        agreement=lambda task, one, other: quality(one, other),
    )
    if arm == "coverage":
        known = encoder([row["text"] for row in of.given]), [row["reference"] for row in of.given]
        chosen = coverage(candidates, Budget(budget), seed, known)
    else:
        chosen = SELECTIONS[arm](candidates, Budget(budget), seed)
    taught = tuple(Lesson.of(traffic[i].query, traffic[i].outcomes[FRONTIER].completion.text) for i in chosen)
    return taught, float(candidates.price[chosen].sum())


Answers = Callable[[Sequence[Query]], list[Completion]]
