"""Does the certificate hold on real data? Monte Carlo over certification samples of a known population.

For each task: tiers are trained on fold A and candidates are ordered on a held-out part of it. Fold B is the
population. 200 certification samples of 1,000 are drawn from it with replacement; each certifies a policy, whose
risk on B is then known exactly. The share of samples whose policy exceeds alpha must not exceed delta, and the mean
cost ratio must be below 1 by MARGIN: a policy that always calls the frontier is no success.

    ROUTENLP_DATA=... python benchmarks/certified_risk.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from local_tiers import HERE, TASKS, data_folder, folds
from populations import drawn
from scipy.stats import binomtest

from routenlp_plugins import Portfolio
from routenlp_plugins.cascade.candidate import Candidate
from routenlp_plugins.cascade.certification import Stream, certify
from routenlp_plugins.cascade.risks import Violation
from routenlp_plugins.cascade.search import task_paths
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.evaluate.table import TaskTable, task_tables
from routenlp_plugins.evaluate.units import Split, split

ALPHA, DELTA, SAMPLE, DRAWS = 0.05, 0.1, 1000, 200
MARGIN = 0.05
"""How far below 1 the mean cost ratio must be."""
RECORDED = ("medmcqa_nine", "anlp_cnli_coqa")
"""Outcomes of language models with log-probabilities, recorded by others; their frontier is a real one."""


def main() -> None:
    local = {task: folds(task) for task in TASKS}
    alone = {task: monte_carlo({task: fold}) for task, fold in local.items()}
    recorded = {task: fold for name in RECORDED for task, fold in recorded_folds(name, data_folder()).items()}
    models = {task: monte_carlo({task: fold}) for task, fold in recorded.items()}
    results = {
        "alpha": ALPHA,
        "delta": DELTA,
        "margin": MARGIN,
        "sample": SAMPLE,
        "draws": DRAWS,
        "each_task_alone": {task: result["tasks"][task] for task, result in alone.items()},
        "all_tasks_at_once": monte_carlo(local),
        "recorded_language_models": {task: result["tasks"][task] for task, result in models.items()},
    }
    file = HERE / "results" / "certified_risk.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(markdown(results))
    print(f"{file.name} written")


def recorded_folds(name: str, folder: Path) -> dict[str, tuple[TaskTable, TaskTable]]:
    """Two fifths of the rows to order with, the rest as the population."""
    portfolio = Portfolio.from_yaml(folder / "outcomes" / f"{name}.portfolio.yaml")
    parts = split(read_outcomes(folder / "outcomes" / f"{name}.jsonl.gz"), Split(0.4, 0.0), seed=0)
    ordering = task_tables(parts["ordering"], portfolio)
    population = task_tables(parts["certification"], portfolio, ordering)
    return {task: (table, population[task]) for task, table in ordering.items()}


def monte_carlo(folds: Mapping[str, tuple[TaskTable, TaskTable]]) -> dict[str, Any]:
    """Certify on every draw; delta is shared by the tasks given."""
    risk = Violation(ALPHA)
    paths = {task: task_paths(ordering, risk) for task, (ordering, _) in folds.items()}
    rng = np.random.default_rng(1)
    draws: dict[str, list[Candidate | None]] = {task: [] for task in folds}
    for _ in range(DRAWS):
        streams = [(Stream({t: drawn(population, SAMPLE, rng)}), paths[t]) for t, (_, population) in folds.items()]
        chosen, _ = certify(risk, streams, DELTA)
        for task in folds:
            draws[task].append(chosen.get(task))
    tasks = {task: summary(folds[task][1], draws[task], sum(map(len, paths[task]))) for task in folds}
    exceeded = np.any([tasks[task].pop("exceeds") for task in folds], axis=0)
    return {"tasks": tasks, "exceeding": int(exceeded.sum()), "p_value": p_value(int(exceeded.sum()))}


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
