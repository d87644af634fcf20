"""A release from signals alone, against one from gold labels.

A LangChain chain that exists without us answers 2,000 real queries of a task (`prompt | ChatOpenAI | StrOutputParser`
on a real HTTP server that replays the references: the reference frontier). One handler is attached; two linear
classifiers, trained on other queries, run in its shadow on every query. Users are simulated: thumbs are up on 95 % of
the answers that are right and on 20 % of those that are not. Since the reference frontier is never wrong, one answer in
ten is replaced on its way by a wrong label, so that there is something for thumbs to tell; it then counts as wrong.

Six releases at alpha = 0.05 and delta = 0.1 (`fit`, no router), each judged on 1,000 other queries with the truth:

- *gold*: the true quality of all answers.
- *thumbs of known error*: the label of an answer is the thumb of the returned one where both are the same, else 0.
- *learned labels*: a fifth of the queries is audited; `LabelModel` learns from that what thumbs and agreement tell.
- *audits alone*: the same fifth, and nothing else;
- *thumbs order, audits certify*: the thumbs of the other queries as hints (`FitOptions(hints=...)`);
- *labels order, audits certify*: learned labels as hints; the audits that they were learned from certify nothing.

20 repetitions: thumbs, audits and the split are drawn anew; what the models said stays.

    python benchmarks/signals.py
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from langchain_routenlp import SignalCallbackHandler
from routenlp_plugins import (
    DataError,
    FitOptions,
    LabelModel,
    Noise,
    Opinion,
    Portfolio,
    Release,
    RiskNotControlledError,
    Shadow,
    ShadowOptions,
    Task,
    TextClassifierTier,
    Tier,
    TraceStore,
    fit,
    replay,
)
from routenlp_plugins.comparing import same_label
from routenlp_plugins.evaluate.outcomes import OutcomeRow
from routenlp_plugins.testing import ScriptedServer

TASKS = ("cs_intent", "legal_risk")
SERVED, JUDGED, REPETITIONS = 2000, 1000, 20
UP_GOOD, UP_BAD, WRONG, AUDITED = 0.95, 0.2, 0.1, 0.2
ALPHA, DELTA = 0.05, 0.1
FRONTIER = "reference-frontier"
Row = Mapping[str, str]


def main() -> None:
    folder = os.environ.get("ROUTENLP_DATA")
    if not folder:
        sys.exit("ROUTENLP_DATA is not set: no real data")
    results: dict[str, Any] = {"alpha": ALPHA, "delta": DELTA, "repetitions": REPETITIONS}
    for task in TASKS:
        results[task] = measured(task, Path(folder))
        print(task, json.dumps(results[task], indent=2), flush=True)
    file = Path(__file__).parent / "results" / "signals.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, task: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """History to train on, and queries, no text twice, in a fixed order."""
    with gzip.open(folder / "tasks" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = list({row["text"]: row for row in map(json.loads, lines)}.values())
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    queries = shuffled[: SERVED + JUDGED]
    return shuffled[SERVED + JUDGED :], queries


def measured(task: str, folder: Path) -> dict[str, Any]:
    """What each way of labelling certifies, and what that is worth on other queries."""
    history, queries = read(folder, task)
    local = (Tier("words", usd_per_hour=0.1), Tier("characters", usd_per_hour=0.1))
    portfolio = Portfolio((*local, Tier(FRONTIER, 2.5, 10.0)), FRONTIER, (Task(task, "accuracy"),))
    gold = {row["text"]: row["reference"] for row in queries}
    found: dict[str, list[dict[str, Any]]] = {}
    with TemporaryDirectory() as place:
        first = Path(place) / "traces.db"
        answered(task, history, queries, portfolio, first)
        with TraceStore(first) as store:
            rows = [truth(row, gold) for row in store.outcomes()]
        judged = [row for row in rows if row.query.text in {query["text"] for query in queries[SERVED:]}]
        for seed in range(REPETITIONS):
            copy = Path(place) / f"{seed}.db"
            shutil.copy(first, copy)
            for name, release in releases(copy, queries[:SERVED], rows, portfolio, seed).items():
                found.setdefault(name, []).append(worth(release, judged))
            copy.unlink()
    quality = {t: round(fmean(row.outcomes[t].quality or 0 for row in rows), 3) for t in portfolio.names}
    return {"history": len(history), "judged": len(judged), "quality": quality} | {
        name: summary(some) for name, some in found.items()
    }


def answered(task: str, history: Sequence[Row], queries: Sequence[Row], portfolio: Portfolio, store_file: Path) -> None:
    """The chain answers every query; its handler and the shadow leave traces."""
    references = {row["text"]: row["reference"] for row in queries}
    texts, targets = [row["text"] for row in history], [row["reference"] for row in history]
    labels = sorted(set(targets))
    rng = np.random.default_rng(1)
    wrong = {text: labels[rng.integers(len(labels))] for text in references if rng.random() < WRONG}

    def reply(request: Mapping[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        return wrong.get(text, references[text])

    tiers = {
        "words": TextClassifierTier.train(texts, targets, analyzer="word"),
        "characters": TextClassifierTier.train(texts, targets, analyzer="char_wb"),
    }
    prompt = ChatPromptTemplate.from_messages([("system", "Answer with one label."), ("human", "{text}")])
    with ScriptedServer(reply) as server, TraceStore(store_file) as store:
        chain = (
            prompt | ChatOpenAI(model="frontier", base_url=server.url, api_key=SecretStr("none")) | StrOutputParser()
        )
        with Shadow(store, portfolio, tiers, ShadowOptions(share=1.0, waiting=10**6)) as shadow:
            handler = SignalCallbackHandler(
                store, portfolio=portfolio, tiers={"frontier": FRONTIER}, task=task, shadow=shadow
            )
            for row in queries:
                chain.invoke({"text": row["text"]}, {"callbacks": [handler]})
        store.flush()


def truth(row: OutcomeRow, gold: Mapping[str, str]) -> OutcomeRow:
    """The row with the true quality of every answer."""
    reference = gold[row.query.text]
    outcomes = {t: replace(o, quality=same_label(o.completion.text, reference)) for t, o in row.outcomes.items()}
    return replace(row, outcomes=outcomes)


def releases(
    file: Path, served: Sequence[Row], rows: Sequence[OutcomeRow], portfolio: Portfolio, seed: int
) -> dict[str, Release | None]:
    """What is certified by each way of labelling, None where nothing is."""
    rng = np.random.default_rng(1000 + seed)
    mine = {row["text"] for row in served}
    known = {row.query.id: row for row in rows if row.query.text in mine}
    with TraceStore(file) as store:
        audited = {one.id for one in store.draw(AUDITED, seed=seed)}
        for name, row in known.items():
            right = row.outcomes[FRONTIER].quality == 1
            store.signal(str(name), "thumbs", float(rng.random() < (UP_GOOD if right else UP_BAD)))
            if name in audited:
                for tier, outcome in row.outcomes.items():
                    store.signal(str(name), "audit", outcome.quality or 0.0, "reviewer", tier=tier)
        store.flush()

        def served_only(some: Iterable[OutcomeRow]) -> list[OutcomeRow]:
            return [row for row in some if row.query.id in known]

        thumbs = served_only(store.outcomes(thumb, agree=same_label))
        audits = served_only(store.outcomes(labelled=True))
        found = {
            "gold": fitted(list(known.values()), portfolio, seed, None),
            "thumbs of known error": fitted(thumbs, portfolio, seed, Noise(UP_GOOD, UP_BAD)),
            "audits alone": fitted(audits, portfolio, seed, None),
            "thumbs order, audits certify": fitted(audits, portfolio, seed, Noise(UP_GOOD, UP_BAD), thumbs),
        }
        try:
            model = LabelModel.learn(store.judged(agree=same_label), delta=DELTA / 4, seed=seed, frontier=FRONTIER)
        except DataError:
            found["learned labels"] = None
            found["labels order, audits certify"] = found["audits alone"]
        else:
            labelled = served_only(store.outcomes(model, unaudited=True, agree=same_label))
            found["learned labels"] = fitted(labelled, portfolio, seed, model.noise)
            audits = served_only(store.outcomes(labelled=True, without=model.learned_from))
            hints = served_only(store.outcomes(model, agree=same_label))
            found["labels order, audits certify"] = fitted(audits, portfolio, seed, model.expected, hints)
    return found


def thumb(opinion: Opinion) -> float | None:
    """What the user said of the answer that was returned, of the same answer of another tier too; others are bad."""
    said = [signal.value for signal in opinion.returned if signal.kind == "thumbs"]
    if not said or opinion.agreement is None:
        return None
    return said[-1] if opinion.agreement == 1 else 0.0


def fitted(
    rows: list[OutcomeRow],
    portfolio: Portfolio,
    seed: int,
    noise: Noise | None,
    hints: list[OutcomeRow] | None = None,
) -> Release | None:
    try:
        return fit(
            rows,
            portfolio,
            alpha=ALPHA,
            delta=DELTA,
            seed=seed,
            options=FitOptions(noise=noise, hints=hints, router=None),
        )
    except RiskNotControlledError:
        return None


def worth(release: Release | None, judged: list[OutcomeRow]) -> dict[str, Any]:
    if release is None:
        return {"refused": True, "cost_ratio": 1.0, "violation": 0.0, "quality_ratio": 1.0}
    told = replay(judged, release)
    return {
        "refused": False,
        "cost_ratio": told.cost_ratio,
        "violation": told.violation_rate,
        "quality_ratio": told.quality_ratio,
    }


def summary(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the repetitions; how many were refused, and how many break the promise among the judged queries."""
    return {
        "refused": sum(one["refused"] for one in some),
        "above_alpha": sum(one["violation"] > ALPHA for one in some),
        **{name: round(fmean(one[name] for one in some), 4) for name in ("cost_ratio", "violation", "quality_ratio")},
    }


if __name__ == "__main__":
    main()
