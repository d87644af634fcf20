"""Does the certificate hold on real data? Monte Carlo over certification samples of a known population.

For each task: tiers are trained on fold A and candidates are ordered on a held-out part of it. Fold B is the
population. 200 certification samples of 1,000 are drawn from it with replacement; each certifies a policy, whose
risk on B is then known exactly. The share of samples whose policy exceeds alpha must not exceed delta, and the mean
cost ratio must be below 1 by MARGIN: a policy that always calls the frontier is no success.

    ROUTENLP_DATA=... python benchmarks/certified_risk.py
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from routenlp_plugins import Call, Completion, LlamaCppTier, Portfolio, Query, Reference, TextClassifierTier, collect
from routenlp_plugins.cascade.certification import Stream, certify
from routenlp_plugins.cascade.risks import Violation
from routenlp_plugins.cascade.search import Candidate, task_paths
from routenlp_plugins.comparing import rouge_l
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.evaluate.table import Split, TaskTable, split, task_tables
from routenlp_plugins.testing import count_tokens

HERE = Path(__file__).parent
SCRATCH = HERE / "scratch"
ALPHA, DELTA, SAMPLE, DRAWS = 0.05, 0.1, 1000, 200
MARGIN = 0.05
"""How far below 1 the mean cost ratio must be."""
RESPONSE_ROWS = {"A": 400, "B": 1000}
"""Rows of cs_response that the language model answers: it has no time for all of them."""
RECORDED = ("medmcqa_nine", "anlp_cnli_coqa")
"""Outcomes of language models with log-probabilities, recorded by others; their frontier is a real one."""
NEIGHBOURS, EXAMPLES = 20, 3


def main() -> None:
    folder = os.environ.get("ROUTENLP_DATA")
    if folder is None:
        sys.exit("set ROUTENLP_DATA to the data folder; benchmarks/README.md tells where the originals are published")
    portfolio = Portfolio.from_yaml(HERE / "portfolios" / "certified_risk.yaml")
    SCRATCH.mkdir(exist_ok=True)
    folds = {task: tables(task, Path(folder), portfolio) for task in ("cs_intent", "legal_clause", "cs_response")}
    alone = {task: monte_carlo({task: fold}) for task, fold in folds.items()}
    recorded = {task: fold for name in RECORDED for task, fold in recorded_folds(name, Path(folder)).items()}
    models = {task: monte_carlo({task: fold}) for task, fold in recorded.items()}
    results = {
        "alpha": ALPHA,
        "delta": DELTA,
        "margin": MARGIN,
        "sample": SAMPLE,
        "draws": DRAWS,
        "each_task_alone": {task: result["tasks"][task] for task, result in alone.items()},
        "all_tasks_at_once": monte_carlo(folds),
        "recorded_language_models": {task: result["tasks"][task] for task, result in models.items()},
    }
    file = HERE / "results" / "certified_risk.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(markdown(results))
    print(f"{file.name} written")


def tables(task: str, folder: Path, portfolio: Portfolio) -> tuple[TaskTable, TaskTable]:
    """The ordering rows of fold A, and fold B: what every tier did there."""
    with gzip.open(folder / "tasks" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rng = np.random.default_rng(0)
    known, ordering = halves([row for row in rows if row["split"] == "train"], rng)
    test = [row for row in rows if row["split"] == "test"]
    if task == "cs_response":
        ordering, test = some(ordering, RESPONSE_ROWS["A"], rng), some(test, RESPONSE_ROWS["B"], rng)
    local = response_tiers(known) if task == "cs_response" else classifiers(known)
    frontier = ReferenceFrontier({row["query_id"]: row["reference"] for row in rows}, instruction(task, known))
    done: dict[str, TaskTable] = {}
    for fold, members in (("A", ordering), ("B", test)):
        references = [Reference(Query(r["text"], task, r["query_id"]), r["reference"]) for r in members]
        out = SCRATCH / f"{task}-{fold}.jsonl"
        collect(references, {**local, portfolio.frontier: frontier}, out, portfolio=portfolio)
        like = {task: done["A"]} if done else None
        done[fold] = task_tables(read_outcomes(out), portfolio, like)[task]
    return done["A"], done["B"]


def recorded_folds(name: str, folder: Path) -> dict[str, tuple[TaskTable, TaskTable]]:
    """Two fifths of the rows to order with, the rest as the population."""
    portfolio = Portfolio.from_yaml(folder / "outcomes" / f"{name}.portfolio.yaml")
    parts = split(read_outcomes(folder / "outcomes" / f"{name}.jsonl.gz"), Split(0.4, 0.0), seed=0)
    ordering = task_tables(parts["ordering"], portfolio)
    population = task_tables(parts["certification"], portfolio, ordering)
    return {task: (table, population[task]) for task, table in ordering.items()}


def halves(rows: list[Any], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Seven tenths to train on and three to order with; the turns of a dialogue stay together."""
    starts = np.cumsum(["\nAgent: " not in row["text"] for row in rows])
    held_out = rng.random(starts[-1] + 1) < 0.3
    return (
        [row for row, start in zip(rows, starts, strict=True) if not held_out[start]],
        [row for row, start in zip(rows, starts, strict=True) if held_out[start]],
    )


def some(rows: list[Any], n: int, rng: np.random.Generator) -> list[Any]:
    return [rows[i] for i in sorted(rng.choice(len(rows), n, replace=False))]


def instruction(task: str, known: Sequence[Mapping[str, str]]) -> str:
    """What the frontier's prompt says beside the query; its length is part of its price."""
    if task == "cs_response":
        return "You are a bank's support agent. Give the agent's next reply."
    return "Answer with one of: " + ", ".join(sorted({row["reference"] for row in known}))


def classifiers(known: Sequence[Mapping[str, str]]) -> dict[str, TextClassifierTier]:
    texts, labels = [row["text"] for row in known], [row["reference"] for row in known]
    return {
        "word-classifier": TextClassifierTier.train(texts, labels, analyzer="word"),
        "character-classifier": TextClassifierTier.train(texts, labels, analyzer="char_wb"),
    }


def response_tiers(known: Sequence[Mapping[str, str]]) -> dict[str, Callable[[Call], Completion]]:
    """Retrieval over known dialogues, and SmolLM2 shown the three most similar ones.

    Retrieval returns, of the replies to similar dialogues, the one that agrees best with all of them, and that
    agreement is its confidence: minimum Bayes risk decoding (Kumar and Byrne 2004) with ROUGE-L.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    index = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(
        vectorizer.fit_transform([tail(row["text"]) for row in known])
    )
    model = LlamaCppTier(request={"max_tokens": 40, "stop": ["\n"]})

    def nearest(text: str) -> list[tuple[float, Mapping[str, str]]]:
        distance, rows = index.kneighbors(vectorizer.transform([tail(text)]))
        return [(max(1 - float(d), 1e-3), known[i]) for d, i in zip(distance[0], rows[0], strict=True)]

    def retrieval(call: Call) -> Completion:
        similar = nearest(call.query.text)
        weight = sum(similarity**2 for similarity, _ in similar)
        agreement = {
            reply: sum(similarity**2 * rouge_l(reply, row["reference"]) for similarity, row in similar) / weight
            for reply in dict.fromkeys(row["reference"] for _, row in similar)
        }
        best = max(agreement, key=lambda reply: agreement[reply])
        return Completion(best, confidence=min(agreement[best], 1.0))

    def smollm2(call: Call) -> Completion:
        messages = [{"role": "system", "content": "You are a bank's support agent. Give the agent's next reply."}]
        for _, row in reversed(nearest(call.query.text)[:EXAMPLES]):
            messages.append({"role": "user", "content": tail(row["text"])})
            messages.append({"role": "assistant", "content": row["reference"]})
        messages.append({"role": "user", "content": tail(call.query.text)})
        return model(Call(call.tier, replace(call.query, messages=tuple(messages))))

    return {"retrieval": retrieval, "smollm2-135m": smollm2}


def tail(text: str) -> str:
    """The last two turns of a dialogue: what a small context has room for."""
    return "\n".join(text.split("\n")[-2:])


@dataclass(frozen=True)
class ReferenceFrontier:
    """Replays the reference; tokens are estimated as one for every four characters."""

    references: Mapping[str, str]
    instruction: str

    def __call__(self, call: Call) -> Completion:
        text = self.references[call.query.id or ""]
        tokens = count_tokens(self.instruction) + count_tokens(call.query.text)
        return Completion(text, input_tokens=tokens, output_tokens=count_tokens(text))


def monte_carlo(folds: Mapping[str, tuple[TaskTable, TaskTable]]) -> dict[str, Any]:
    """Certify on every draw; delta is shared by the tasks given."""
    risk = Violation(ALPHA)
    paths = {task: task_paths(ordering, risk) for task, (ordering, _) in folds.items()}
    rng = np.random.default_rng(1)
    draws: dict[str, list[Candidate | None]] = {task: [] for task in folds}
    for _ in range(DRAWS):
        streams = [(Stream({t: drawn(population, rng)}), paths[t]) for t, (_, population) in folds.items()]
        chosen, _ = certify(risk, streams, DELTA)
        for task in folds:
            draws[task].append(chosen.get(task))
    tasks = {task: summary(folds[task][1], draws[task], sum(map(len, paths[task]))) for task in folds}
    exceeded = np.any([tasks[task].pop("exceeds") for task in folds], axis=0)
    return {"tasks": tasks, "exceeding": int(exceeded.sum()), "p_value": p_value(int(exceeded.sum()))}


def drawn(population: TaskTable, rng: np.random.Generator) -> TaskTable:
    """A certification sample, each row a unit of its own: a row drawn twice is two queries."""
    sample = population.take(rng.integers(len(population), size=SAMPLE))
    return replace(sample, units=np.array([f"{unit}#{i}" for i, unit in enumerate(sample.units)]))


def summary(population: TaskTable, chosen: Sequence[Candidate | None], candidates: int) -> dict[str, Any]:
    """Exact risk, cost and quality on the population of every certified policy."""
    stream = Stream({population.task: population})
    risk, cost, quality = np.zeros(DRAWS), np.ones(DRAWS), np.ones(DRAWS)
    for i, candidate in enumerate(chosen):
        if candidate is not None:
            rows = stream.under({population.task: candidate})
            risk[i], cost[i] = rows.violation.mean(), rows.cost_ratio
            quality[i] = rows.quality.mean() / rows.reference.mean()
    exceeds = risk > ALPHA
    return {
        "population": len(population),
        "candidates": candidates,
        "tier_quality": {
            t: round(float(q), 4) for t, q in zip(population.tiers, population.quality.mean(0), strict=True)
        },
        "refused": sum(candidate is None for candidate in chosen),
        "exceeding": int(exceeds.sum()),
        "p_value": p_value(int(exceeds.sum())),
        "mean_risk": round(float(risk.mean()), 4),
        "largest_risk": round(float(risk.max()), 4),
        "mean_cost_ratio": round(float(cost.mean()), 4),
        "below_margin": bool(cost.mean() <= 1 - MARGIN),
        "mean_quality_ratio": round(float(quality.mean()), 4),
        "exceeds": exceeds,
    }


def p_value(exceeding: int) -> float:
    """One-sided test of "the share of exceeding draws is at most delta"."""
    return round(float(binomtest(exceeding, DRAWS, DELTA, alternative="greater").pvalue), 4)


def markdown(results: Mapping[str, Any]) -> str:
    lines = [
        "| task | tiers below it (quality) | refused | risk > alpha | p | mean risk | cost ratio | quality ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, row in (results["each_task_alone"] | results["recorded_language_models"]).items():
        below = [f"{tier} {quality:.3f}" for tier, quality in list(row["tier_quality"].items())[:-1]]
        cells = (
            task,
            ", ".join(below) if len(below) < 4 else f"{len(below)} language models",
            f"{row['refused']} of {DRAWS}",
            f"{row['exceeding']} of {DRAWS}",
            *(row[name] for name in ("p_value", "mean_risk", "mean_cost_ratio", "mean_quality_ratio")),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    joint = results["all_tasks_at_once"]
    lines.append(
        f"\nAll tasks at once: {joint['exceeding']} of {DRAWS} draws exceed alpha in any task (p {joint['p_value']})."
    )
    for task, row in joint["tasks"].items():
        lines.append(
            f"- {task}: refused {row['refused']}, cost ratio {row['mean_cost_ratio']}, "
            f"quality ratio {row['mean_quality_ratio']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
