"""What can be known before a call: routers, a task table and the cascade on recorded outcomes of language models.

Ten random halves of each file. Everything is learned on one half; on the other, two questions are asked:

- in hindsight, at what share of the frontier's cost a method's curve reaches 95, 97 and 99 % of its quality, mixtures
  of two points allowed. The price that does it is picked on the half itself, for all methods alike;
- aimed at the same targets, what it costs and keeps if the price is chosen on the half that was learned on, by
  cross-fitted predictions, and how often the target is missed.

A router sends a query to the tier with the highest predicted quality less a price times the mean cost of the tier on
the task. Halves of one file overlap, so that ten of them say less than ten independent ones would.

    ROUTENLP_DATA=... python benchmarks/routers.py [FILE ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from local_tiers import data_folder
from numpy.typing import NDArray

from routenlp_plugins import Portfolio
from routenlp_plugins.cascade.ladders import climb
from routenlp_plugins.cascade.risks import Retention
from routenlp_plugins.cascade.search import Point, pooled_paths, task_paths
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.evaluate.table import TaskTable, task_tables
from routenlp_plugins.routing.difficulty import DifficultyRouter, TrainingOptions
from routenlp_plugins.routing.observations import Observations

FILES = (
    "routellm_mmlu",
    "routellm_gsm8k",
    "llmrouter",
    "anlp_cnli_coqa",
    "routerarena",
    "medmcqa_nine",
    "routerbench_arc_challenge",
)
HALVES = 10
TARGETS = (0.95, 0.97, 0.99)
PRICES = np.r_[0.0, np.geomspace(0.003, 30, 60)]
"""Quality for the mean cost of the frontier."""
LEARNED: Mapping[str, tuple[str, ...]] = {
    "task means": ("task means",),
    "nearest neighbours": ("nearest neighbours",),
    "logistic": ("logistic",),
    "matrix factorisation": ("matrix factorisation",),
    "difficulty router": TrainingOptions().methods,
}

Curve = NDArray[np.float64]
"""(L, 2): share of the frontier's cost, and of its quality."""


@dataclass(frozen=True)
class Recorded:
    """The queries of a file in order of task and id; K tiers, the frontier last.

    Attributes:
        quality, cost: (n, K); a tier that may not serve a task has quality 0 and infinite cost there.
    """

    texts: Sequence[str]
    tasks: NDArray[np.str_]
    tiers: tuple[str, ...]
    tables: Mapping[str, TaskTable]
    quality: NDArray[np.float64]
    cost: NDArray[np.float64]

    @classmethod
    def read(cls, name: str) -> Recorded:
        folder = data_folder() / "outcomes"
        portfolio = Portfolio.from_yaml(folder / f"{name}.portfolio.yaml")
        rows = read_outcomes(folder / f"{name}.jsonl.gz")
        rows.sort(key=lambda row: (row.query.task or "", row.query.id or ""))
        tables = task_tables(rows, portfolio)
        tiers = (*(tier for tier in portfolio.names if tier != portfolio.frontier), portfolio.frontier)
        quality, cost = [], []
        for table in tables.values():
            q, c = np.zeros((len(table), len(tiers))), np.full((len(table), len(tiers)), np.inf)
            columns = [tiers.index(tier) for tier in table.tiers]
            q[:, columns], c[:, columns] = np.nan_to_num(table.quality), table.cost
            quality.append(q)
            cost.append(c)
        tasks = np.array([row.query.task for row in rows])
        return cls([r.query.text for r in rows], tasks, tiers, tables, np.vstack(quality), np.vstack(cost))

    def achieved(self, rows: NDArray[np.intp], column: NDArray[np.intp]) -> NDArray[np.float64]:
        """(2,) cost and quality against the frontier alone if these tiers answer these rows."""
        cost, quality = self.cost[rows, column].sum(), self.quality[rows, column].sum()
        return np.array([cost / self.cost[rows, -1].sum(), quality / self.quality[rows, -1].sum()])


def main() -> None:
    file = Path(__file__).parent / "results" / "routers.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in sys.argv[1:] or FILES:
        with get_context("spawn").Pool(2) as pool:
            halves = pool.starmap(half, [(name, seed) for seed in range(HALVES)])
        results[name] = summary(halves)
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(table_of(name, results[name]), flush=True)


def half(name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Method -> what it reaches on one half after learning on the other."""
    data = Recorded.read(name)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.texts))
    fit, test = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    mean_cost = mean_costs(data, fit)
    found: dict[str, dict[str, Any]] = {}
    for method, kinds in LEARNED.items():
        on_fit, on_test, kind = predictions(data, fit, test, kinds)
        curves = [priced(data, *of, mean_cost) for of in ((fit, on_fit), (test, on_test))]
        found[method] = reached(*curves) | {"kind": kind}
    # perfect foresight of quality, on the half itself
    found["oracle"] = reached(*(priced(data, rows, data.quality[rows], data.cost) for rows in (fit, test)))
    singles = [
        np.array([data.achieved(rows, np.full(len(rows), k)) for k in range(len(data.tiers))]) for rows in (fit, test)
    ]
    usable = np.isfinite(singles[0]).all(axis=1)
    found["best single tier"] = reached(*(of[usable] for of in singles), mixed=False)
    shares = np.linspace(0, 1, 101)[:, None, None]
    found["random mix"] = reached(*((shares * of[usable] + 1 - shares).reshape(-1, 2) for of in singles))
    found["cascade"] = reached(*cascade(data, fit, test))
    return found


def mean_costs(data: Recorded, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """(n, K) mean cost of each tier on the task of each query, by these rows; of all tasks if they have none of it."""
    means = np.tile(data.cost[rows].mean(axis=0), (len(data.texts), 1))
    for task in np.unique(data.tasks[rows]):
        means[data.tasks == task] = data.cost[rows[data.tasks[rows] == task]].mean(axis=0)
    return means


def predictions(
    data: Recorded, fit: NDArray[np.intp], test: NDArray[np.intp], kinds: tuple[str, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """(n, K) predicted quality on both halves, cross-fitted on the first."""
    known = np.where(np.isfinite(data.cost[fit]), data.quality[fit], np.nan)
    good = {tier: known[:, k] for k, tier in enumerate(data.tiers)}
    observed = Observations([data.texts[i] for i in fit], [str(task) for task in data.tasks[fit]], good)
    trained = DifficultyRouter.train(observed, TrainingOptions(kinds))
    on_test = trained.router([data.texts[i] for i in test], [str(task) for task in data.tasks[test]])
    return trained.held_out, on_test, trained.router.kind


def priced(
    data: Recorded, rows: NDArray[np.intp], predicted: NDArray[np.float64], mean_cost: NDArray[np.float64]
) -> Curve:
    """A point for each price: the tier with the most predicted quality less the price of its cost."""
    unit = data.cost[rows, -1].mean()
    values = (predicted - price * mean_cost[rows] / unit for price in PRICES)
    return np.array([data.achieved(rows, np.nan_to_num(value, nan=-np.inf).argmax(axis=1)) for value in values])


def cascade(data: Recorded, fit: NDArray[np.intp], test: NDArray[np.intp]) -> tuple[Curve, Curve]:
    """The policies that `fit` would test, for the three targets, without the test."""
    of_fit, of_test = taken(data, fit), taken(data, test)
    found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for target in TARGETS:
        risk = Retention(target)
        first, *more = of_fit.values()
        paths = pooled_paths(of_fit, risk) if more else task_paths(first, risk)
        for point in (point for path in paths for point in path):
            found.append((replayed(of_fit, point), replayed(of_test, point)))
    always = np.ones(2)
    return np.array([always, *(a for a, _ in found)]), np.array([always, *(b for _, b in found)])


def taken(data: Recorded, rows: NDArray[np.intp]) -> dict[str, TaskTable]:
    tables, start = {}, 0
    for task, table in data.tables.items():
        mine = rows[(rows >= start) & (rows < start + len(table))] - start
        start += len(table)
        if len(mine):
            tables[task] = table.take(mine)
    return tables


def replayed(tables: Mapping[str, TaskTable], point: Point) -> NDArray[np.float64]:
    sums = np.zeros(4)
    for task, table in tables.items():
        column, cost = point.candidates[task].climb(table) if task in point.candidates else climb(table, ())
        quality = np.nan_to_num(table.quality)
        mine = (cost, quality[np.arange(len(table)), column], table.cost[:, -1], quality[:, -1])
        sums += [of.sum() for of in mine]
    return np.array([sums[0] / sums[2], sums[1] / sums[3]])


def reached(on_fit: Curve, on_test: Curve, *, mixed: bool = True) -> dict[str, Any]:
    """Both answers, for each target."""
    found: dict[str, Any] = {"hindsight": [hull_cost(on_test, target, mixed=mixed) for target in TARGETS]}
    found["aimed"] = []
    for target in TARGETS:
        good = np.flatnonzero(on_fit[:, 1] >= target)
        place = good[on_fit[good, 0].argmin()] if len(good) else None
        found["aimed"].append([1.0, 1.0] if place is None else on_test[place].tolist())
    return found


def hull_cost(curve: Curve, target: float, *, mixed: bool) -> float:
    """The least cost at which the curve, or a mixture of two of its points and the frontier alone, has this quality."""
    points = np.vstack([curve, np.ones(2)])
    if not mixed:
        return float(points[points[:, 1] >= target, 0].min())
    above, below = points[points[:, 1] >= target], points[points[:, 1] < target]
    best = above[:, 0].min()
    if len(below):
        share = (target - below[:, None, 1]) / (above[None, :, 1] - below[:, None, 1])
        best = min(best, ((1 - share) * below[:, None, 0] + share * above[None, :, 0]).min())
    return float(best)


def summary(halves: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means over the halves."""
    found: dict[str, Any] = {}
    for method in halves[0]:
        hindsight = np.array([half[method]["hindsight"] for half in halves])
        aimed = np.array([half[method]["aimed"] for half in halves])
        found[method] = {
            "hindsight": hindsight.mean(axis=0).round(4).tolist(),
            "aimed_cost": aimed[:, :, 0].mean(axis=0).round(4).tolist(),
            "aimed_quality": aimed[:, :, 1].mean(axis=0).round(4).tolist(),
            "missed": (aimed[:, :, 1] < TARGETS).mean(axis=0).round(2).tolist(),
        }
        kinds = [half[method]["kind"] for half in halves if "kind" in half[method]]
        if len(set(kinds)) > 1 or method == "difficulty router":
            found[method]["kinds"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return found


def table_of(name: str, results: Mapping[str, Any]) -> str:
    heads = ("method", "95 %", "97 %", "99 %", "aimed at 95 %", "97 %", "99 %")
    lines = [f"\n{name}", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, of in results.items():
        aimed = zip(of["aimed_cost"], of["aimed_quality"], of["missed"], strict=True)
        cells = [f"{cost:.3f}" for cost in of["hindsight"]]
        cells += [f"{cost:.3f} at {quality:.3f} ({missed:.0%})" for cost, quality, missed in aimed]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
