"""One decision against everything simpler: routers, a task table, cascades and ours on recorded outcomes.

Ten random halves of each file. Everything is learned on one half; on the other, two questions are asked:

- in hindsight, at what share of the frontier's cost a method's curve reaches 95, 97 and 99 % of its quality, mixtures
  of two points allowed. The price that does it is picked on the half itself, for all methods alike;
- aimed at the same targets, what it costs and keeps if the policy is chosen on the half that was learned on, by
  cross-fitted predictions, and how often the target is missed.

A router sends a query to the tier with the highest predicted quality less a price times the mean cost of the tier on
the task. FrugalGPT's optimiser is that of `cre-router`; its scorer, per tier, is a logistic regression on hashed
n-grams of question and answer, which take the place of a fine-tuned DistilBERT here. The confidence cascade judges each
answer alone, by its calibrated confidence. "Ours" is what `fit` would test, "no router" what it tests with
``FitOptions(router=None)``: not a method of others, and not among those that ours is compared with.

Ours is compared with the best of the others, picked by its mean over the halves of the very file: the corrected
resampled t test, Holm over all files and targets, and a bootstrap over the queries of the first half.

    ROUTENLP_DATA=... python benchmarks/routers.py [FILE ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from cre_router.baselines.frugalgpt import apply_cascade, fit_cascade
from curves import TARGETS, Curve, Routed, aimed, bootstrapped, corrected_p_values, holm, hull_cost, markdown
from local_tiers import data_folder
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from routenlp_plugins import Portfolio
from routenlp_plugins.cascade.families import Space
from routenlp_plugins.cascade.ladders import climb
from routenlp_plugins.cascade.risks import Retention
from routenlp_plugins.cascade.search import Point, pooled_paths
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.evaluate.table import TaskTable, task_tables
from routenlp_plugins.routing.difficulty import DifficultyRouter, TrainingOptions
from routenlp_plugins.routing.encoders import HashedNgrams
from routenlp_plugins.routing.foresight import foreseen, learned
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
PRICES = np.r_[0.0, np.geomspace(0.003, 30, 60)]
"""Quality for the mean cost of the frontier."""
LEARNED: Mapping[str, tuple[str, ...]] = {
    "task means": ("task means",),
    "nearest neighbours": ("nearest neighbours",),
    "logistic": ("logistic",),
    "matrix factorisation": ("matrix factorisation",),
}
BUDGETS = np.linspace(0.02, 1.0, 25)
"""Of FrugalGPT, mean cost of a query in units of the frontier's."""
LOWEST = 0.9
PLAIN = Space(together=False, sized=False, starting=False, skipping=False)
"""Each answer is judged alone by its own calibrated evidence, with a threshold for each tier of the ladder."""
REFERENCES = ("oracle", "ours", "ours, no router")
"""What is not among the methods that ours is compared with."""


@dataclass(frozen=True)
class Recorded:
    """The queries of a file in order of task and id; K tiers, the frontier last.

    Attributes:
        quality, cost: (n, K); a tier that may not serve a task has quality 0 and infinite cost there.
    """

    texts: Sequence[str]
    answers: Sequence[Sequence[str]]
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
        answers = [[r.outcomes[t].completion.text if t in r.outcomes else "" for t in tiers] for r in rows]
        return cls([r.query.text for r in rows], answers, tasks, tiers, tables, np.vstack(quality), np.vstack(cost))

    def routed(self, rows: NDArray[np.intp], columns: NDArray[np.intp], *, mixed: bool = True) -> Routed:
        """L policies that each have these (L, n) tiers answer these n rows."""
        return self.spent(rows, self.cost[rows, columns], self.quality[rows, columns], mixed=mixed)

    def spent(self, rows: NDArray[np.intp], cost: Curve, quality: Curve, *, mixed: bool = True) -> Routed:
        return Routed(cost, quality, self.cost[rows, -1], self.quality[rows, -1], mixed)


def main() -> None:
    file = Path(__file__).parent / "results" / "routers.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results.setdefault("files", {})
    for name in sys.argv[1:] or FILES:
        with get_context("spawn").Pool(2) as pool:
            halves = pool.starmap(half, [(name, seed) for seed in range(HALVES)], chunksize=1)
        results["files"][name] = {"methods": summary(halves), "against the best": compared(name, halves)}
        results["tests"] = tests(results["files"])
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(table_of(name, results["files"][name]), flush=True)
    print(json.dumps(results["tests"], indent=2))


def half(name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Method -> what it reaches on one half after learning on the other."""
    return {method: reached(*of) for method, of in methods(name, seed).items()}


def halves_of(name: str, seed: int) -> tuple[Recorded, NDArray[np.intp], NDArray[np.intp]]:
    """A file, the rows to learn from and the rows that judge."""
    data = Recorded.read(name)
    order = np.random.default_rng(seed).permutation(len(data.texts))
    return data, np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])


def methods(name: str, seed: int) -> dict[str, tuple[Routed, Routed | Curve, Any]]:
    """Method -> its policies on the half that judges, what they were seen to do where they were learned, remarks."""
    data, fit, test = halves_of(name, seed)
    mean_cost = mean_costs(data, fit)
    found: dict[str, tuple[Routed, Routed | Curve, Any]] = {}
    every = np.arange(len(data.tiers))[:, None]
    usable = np.isfinite(data.cost[fit]).all(axis=0) & np.isfinite(data.cost[test]).all(axis=0)
    on_test, on_fit = (data.routed(rows, np.tile(every[usable], (1, len(rows)))) for rows in (test, fit))
    found["best single tier"] = replace(on_test, mixed=False), on_fit, None
    found["random mix"] = on_test, on_fit, None
    for method, kinds in LEARNED.items():
        known, told = predictions(data, fit, test, kinds)
        found[method] = priced(data, test, told, mean_cost), priced(data, fit, known, mean_cost), None
    scores = scored(data, fit, test)
    if scores is not None:
        found["FrugalGPT"] = frugal(data, fit, test, *scores)
    found["confidence cascade"] = paths(data, fit, test, None, PLAIN)
    found["ours, no router"] = paths(data, fit, test, None, Space())
    found["ours"] = paths(data, fit, test, TrainingOptions(), Space())
    # perfect foresight of quality, on the half itself
    best, best_on_fit = (priced(data, rows, data.quality[rows], data.cost) for rows in (test, fit))
    found["oracle"] = best, best_on_fit, None
    return found


def mean_costs(data: Recorded, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """(n, K) mean cost of each tier on the task of each query, by these rows; of all tasks if they have none of it."""
    means = np.tile(data.cost[rows].mean(axis=0), (len(data.texts), 1))
    for task in np.unique(data.tasks[rows]):
        means[data.tasks == task] = data.cost[rows[data.tasks[rows] == task]].mean(axis=0)
    return means


def predictions(
    data: Recorded, fit: NDArray[np.intp], test: NDArray[np.intp], kinds: tuple[str, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, K) predicted quality on both halves, cross-fitted on the first."""
    known = np.where(np.isfinite(data.cost[fit]), data.quality[fit], np.nan)
    good = {tier: known[:, k] for k, tier in enumerate(data.tiers)}
    observed = Observations([data.texts[i] for i in fit], [str(task) for task in data.tasks[fit]], good)
    trained = DifficultyRouter.train(observed, TrainingOptions(kinds))
    on_test = trained.router([data.texts[i] for i in test], [str(task) for task in data.tasks[test]])
    return trained.held_out, on_test


def priced(
    data: Recorded, rows: NDArray[np.intp], predicted: NDArray[np.float64], mean_cost: NDArray[np.float64]
) -> Routed:
    """A policy for each price: the tier with the most predicted quality less the price of its cost."""
    unit = data.cost[rows, -1].mean()
    values = (predicted - price * mean_cost[rows] / unit for price in PRICES)
    return data.routed(rows, np.array([np.nan_to_num(value, nan=-np.inf).argmax(axis=1) for value in values]))


def scored(
    data: Recorded, fit: NDArray[np.intp], test: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """(n, K) probabilities that an answer is right, by its words and the question's; None without any answers."""
    if not any(any(answers) for answers in data.answers):
        return None
    encoder, columns = HashedNgrams(), []
    for k in range(len(data.tiers)):
        vectors = encoder([f"{text} {answers[k]}" for text, answers in zip(data.texts, data.answers, strict=True)])
        right = data.quality[fit, k] >= 0.5
        if right.all() or not right.any():
            columns.append((right.astype(np.float64), np.full(len(test), float(right[0]))))
            continue
        model = LogisticRegression(C=1.0)
        own = cross_val_predict(model, vectors[fit], right, cv=5, method="predict_proba")[:, 1]
        columns.append((own, model.fit(vectors[fit], right).predict_proba(vectors[test])[:, 1]))
    on_fit, on_test = (np.column_stack(of) for of in zip(*columns, strict=True))
    return on_fit, on_test


def frugal(
    data: Recorded,
    fit: NDArray[np.intp],
    test: NDArray[np.intp],
    on_fit: NDArray[np.float64],
    on_test: NDArray[np.float64],
) -> tuple[Routed, Routed, str]:
    """A cascade of two tiers for each budget, list and thresholds by FrugalGPT's optimiser."""
    ends: list[list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = [[], []]
    for budget in BUDGETS * data.cost[fit, -1].mean():
        try:
            found = fit_cascade(data.quality[fit], data.cost[fit], on_fit, float(budget), depth=2)
        except ValueError:  # nothing costs so little
            continue
        for end, rows, scores in ((ends[0], test, on_test), (ends[1], fit, on_fit)):
            quality, cost, _ = apply_cascade(found, data.quality[rows], data.cost[rows], scores)
            end.append((cost, quality))
    if not ends[0]:
        alone = [data.routed(rows, np.full((1, len(rows)), len(data.tiers) - 1)) for rows in (test, fit)]
        return alone[0], alone[1], "nothing within any budget"
    routed = [
        data.spent(rows, np.array([cost for cost, _ in of]), np.array([quality for _, quality in of]))
        for rows, of in ((test, ends[0]), (fit, ends[1]))
    ]
    return routed[0], routed[1], "two tiers"


def paths(
    data: Recorded, fit: NDArray[np.intp], test: NDArray[np.intp], options: TrainingOptions | None, space: Space
) -> tuple[Routed, Curve, list[str]]:
    """The policies that `fit` would test, without the test; with a router if it has options.

    A path stops a little below its target, so that a lower one is walked too: hindsight asks how far to go.
    """
    of_fit, of_test = taken(data, fit), taken(data, test)
    found = None if options is None else learned(of_fit, options, graded=True, stream=len(of_fit) > 1)
    if found is not None:
        of_fit, of_test = found[1], foreseen(found[0], of_test)
    always, kept = (float(np.mean(of)) for of in (data.cost[fit, -1], data.quality[fit, -1]))
    ends, seen, families = [], [], []
    for target in (LOWEST, *TARGETS):
        for point in (point for path in pooled_paths(of_fit, Retention(target), space=space) for point in path):
            ends.append(replayed(of_test, point))
            # the excess is target * frontier - quality
            seen.append([point.cost / always, target - point.excess / kept])
            families.append(next(iter(point.candidates.values())).family)
    if not ends:
        return data.routed(test, np.full((1, len(test)), len(data.tiers) - 1)), np.ones((1, 2)), []
    cost, quality = (np.array(of) for of in zip(*ends, strict=True))
    return data.spent(test, cost, quality), np.array(seen), sorted(set(families))


def taken(data: Recorded, rows: NDArray[np.intp]) -> dict[str, TaskTable]:
    tables, start = {}, 0
    for task, table in data.tables.items():
        mine = rows[(rows >= start) & (rows < start + len(table))] - start
        start += len(table)
        if len(mine):
            tables[task] = table.take(mine)
    return tables


def replayed(tables: Mapping[str, TaskTable], point: Point) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) cost and quality of all rows, in order of their tasks."""
    costs, qualities = [], []
    for task, of in tables.items():
        column, cost = point.candidates[task].climb(of) if task in point.candidates else climb(of, ())
        costs.append(cost)
        qualities.append(np.nan_to_num(of.quality)[np.arange(len(of)), column])
    return np.concatenate(costs), np.concatenate(qualities)


def reached(on_test: Routed, on_fit: Routed | Curve, remarks: Any) -> dict[str, Any]:
    """Both answers, for each target."""
    curve = on_test.curve
    seen = on_fit.curve if isinstance(on_fit, Routed) else on_fit
    return {
        "hindsight": [hull_cost(curve, target, mixed=on_test.mixed) for target in TARGETS],
        "aimed": [aimed(seen, curve, target) for target in TARGETS],
        "remarks": remarks,
    }


def summary(halves: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means over the halves."""
    found: dict[str, Any] = {}
    for method in halves[0]:
        hindsight = np.array([half[method]["hindsight"] for half in halves])
        ends = np.array([half[method]["aimed"] for half in halves])
        found[method] = {
            "hindsight": hindsight.mean(axis=0).round(4).tolist(),
            "aimed_cost": ends[:, :, 0].mean(axis=0).round(4).tolist(),
            "aimed_quality": ends[:, :, 1].mean(axis=0).round(4).tolist(),
            "missed": (ends[:, :, 1] < TARGETS).mean(axis=0).round(2).tolist(),
        }
        remarks = [half[method]["remarks"] for half in halves if half[method]["remarks"]]
        if remarks:
            found[method]["remarks"] = remarks
    return found


def compared(name: str, halves: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Ours against the best of the others at each target, in hindsight."""
    found = {}
    of_first = methods(name, 0)
    for i, target in enumerate(TARGETS):
        costs = {method: np.array([half[method]["hindsight"][i] for half in halves]) for method in halves[0]}
        best = min((method for method in costs if method not in REFERENCES), key=lambda method: costs[method].mean())
        differences = costs["ours"] - costs[best]
        below, above = corrected_p_values(differences)
        gap = costs[best].mean() - costs["oracle"].mean()
        found[str(target)] = {
            "best": best,
            "difference": round(float(differences.mean()), 4),
            "p_not_better": below,
            "p_not_worse": above,
            "gap_closed": round(float(-differences.mean() / gap), 3) if gap else 0.0,
            "bootstrap_first_half": bootstrapped(of_first["ours"][0], of_first[best][0], target),
        }
    return found


def tests(files: Mapping[str, Any]) -> dict[str, Any]:
    """Holm over all files and targets, both ways."""
    cells = {f"{name} {t}": of for name, file in files.items() for t, of in file["against the best"].items()}
    better, worse = (
        {name: round(p, 4) for name, p in holm({name: of[key] for name, of in cells.items()}).items() if p <= 0.05}
        for key in ("p_not_better", "p_not_worse")
    )
    return {"cells": len(cells), "ours better (adjusted p)": better, "ours worse (adjusted p)": worse}


def table_of(name: str, results: Mapping[str, Any]) -> str:
    heads = ("method", "95 %", "97 %", "99 %", "aimed at 95 %", "97 %", "99 %")
    rows = []
    for method, of in results["methods"].items():
        ends = zip(of["aimed_cost"], of["aimed_quality"], of["missed"], strict=True)
        cells = [f"{cost:.3f}" for cost in of["hindsight"]]
        rows.append(
            [method, *cells, *(f"{cost:.3f} at {quality:.3f} ({missed:.0%})" for cost, quality, missed in ends)]
        )
    return f"\n{name}\n{markdown(heads, rows)}\n{json.dumps(results['against the best'])}"


if __name__ == "__main__":
    main()
