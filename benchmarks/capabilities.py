"""Leave one tier out: what a router that never saw a tier's outcomes saves once its profile is added.

Ten random halves of `llmrouter` (9 models, 14 tasks). A profile is the tier's mean score on four groups of benchmarks,
by the half that is learned on: what a model card would say of them. Everything else is learned from the outcomes of the
other eight tiers; the curves are of the other half, all nine tiers at hand:

- retrained: task means of all nine tiers, at a price;
- added: the heads of eight tiers over the portfolio of nine, by tolerance (HyDRA) and at a price;
- without: the retrained router's predictions, the tier left out of the pool.

The share of the frontier's cost at which a target is reached is in hindsight, mixtures of two points allowed, for all.

    ROUTENLP_DATA=... python benchmarks/capabilities.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
from curves import TARGETS, Routed, hull_cost
from local_tiers import HERE, data_folder
from numpy.typing import NDArray
from routers import HALVES, Recorded, halves_of, mean_costs, predictions, priced

from routenlp_plugins import CapabilityHeads, CapabilityRouter, Matching, Observations, Portfolio
from routenlp_plugins.portfolio import Task
from routenlp_plugins.routing.shortfall import matched

GROUPS = {
    "mathematics": ("agentverse-mgsm", "gsm8k", "math"),
    "code": ("human_eval", "mbpp"),
    "knowledge": ("mmlu", "gpqa", "natural_qa", "trivia_qa"),
    "common sense": ("arc_challenge", "commonsense_qa", "openbook_qa", "agentverse-logicgrid", "commongen"),
}
TOLERANCES = 101
WAYS = ("retrained", "added, at a price", "added, by tolerance", "without")


def main() -> None:
    with get_context("spawn").Pool(2) as pool:
        halves = pool.map(half, range(HALVES), chunksize=1)
    # (halves, tiers, ways, targets)
    costs = np.array([[[of[way] for way in WAYS] for of in tiers.values()] for tiers in halves])
    names = list(halves[0])
    results: dict[str, object] = {
        "targets": TARGETS,
        "tiers": {name: rounded(costs[:, i]) for i, name in enumerate(names)},
    }
    results["all"] = rounded(costs.reshape(-1, *costs.shape[2:]))
    savings = 1 - costs
    for way in WAYS[1:]:
        share = savings[:, :, WAYS.index(way)].sum(axis=(0, 1)) / savings[:, :, 0].sum(axis=(0, 1))
        least = (savings[:, :, WAYS.index(way)].mean(axis=0) / savings[:, :, 0].mean(axis=0)).min(axis=0)
        results[f"share of savings, {way}"] = share.round(4).tolist()
        results[f"least share of savings of a tier, {way}"] = least.round(4).tolist()
    (HERE / "results" / "capabilities.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def rounded(costs: NDArray[np.float64]) -> dict[str, list[float]]:
    return {way: costs[:, i].mean(axis=0).round(4).tolist() for i, way in enumerate(WAYS)}


def half(seed: int) -> dict[str, dict[str, list[float]]]:
    """Tier that is left out -> way -> cost at each target."""
    data, fit, test = halves_of("llmrouter", seed)
    mean_cost = mean_costs(data, fit)
    portfolio = with_profiles(data, fit)
    _, retrained = predictions(data, fit, test, ("task means",))
    found = {}
    for out, name in enumerate(data.tiers):
        if name == portfolio.frontier:
            continue
        rest = [k for k in range(len(data.tiers)) if k != out]
        texts, tasks = [data.texts[i] for i in fit], [str(task) for task in data.tasks[fit]]
        observed = Observations(texts, tasks, {data.tiers[k]: data.quality[fit, k] for k in rest})
        heads = CapabilityHeads.from_outcomes(observed, portfolio)
        router = CapabilityRouter(heads, portfolio, Matching(cost=dict.fromkeys(portfolio.names, 0.0)))
        columns = [router.tiers.index(tier) for tier in data.tiers]
        asked = [data.texts[i] for i in test], [str(task) for task in data.tasks[test]]
        lacking = router.shortfalls(*asked)[:, columns]
        curves = {
            "retrained": priced(data, test, retrained, mean_cost),
            "added, at a price": priced(data, test, heads.good_enough(lacking), mean_cost),
            "added, by tolerance": tolerated(data, test, lacking, mean_cost),
            "without": priced(data, test, np.where(np.arange(len(data.tiers)) == out, -np.inf, retrained), mean_cost),
        }
        found[name] = {way: [hull_cost(curves[way].curve, target) for target in TARGETS] for way in WAYS}
    return found


def with_profiles(data: Recorded, rows: NDArray[np.intp]) -> Portfolio:
    """The file's portfolio with profiles, and what each task calls for."""
    plain = Portfolio.from_yaml(data_folder() / "outcomes" / "llmrouter.portfolio.yaml")
    column = {name: k for k, name in enumerate(data.tiers)}
    of_group = {group: rows[np.isin(data.tasks[rows], tasks)] for group, tasks in GROUPS.items()}
    tiers = tuple(
        replace(tier, profile={g: float(data.quality[own, column[tier.name]].mean()) for g, own in of_group.items()})
        for tier in plain.tiers
    )
    tasks = tuple(Task(task, capabilities=(group,)) for group, members in GROUPS.items() for task in members)
    return Portfolio(tiers, plain.frontier, tasks, tuple(GROUPS))


def tolerated(
    data: Recorded, rows: NDArray[np.intp], lacking: NDArray[np.float64], mean_cost: NDArray[np.float64]
) -> Routed:
    """A point for each tolerance."""
    every = np.ones(lacking.shape, dtype=np.bool_)
    tolerances = np.quantile(lacking, np.linspace(0, 1, TOLERANCES))
    return data.routed(rows, np.array([matched(lacking, mean_cost[rows], t, every) for t in tolerances]))


if __name__ == "__main__":
    main()
