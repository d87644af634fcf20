"""What each part of the one decision is worth, and from how many labels on a router beats the task table.

Halves as in `routers.py`: policies are searched on one half of a file, without a test, and judged in hindsight on the
other at 97 % of the frontier's quality, mixtures allowed. Without:

- task conditioning: the router is trained as if all queries were of one task;
- cost term: thresholds and prices do not look at what the frontier's answer is expected to cost;
- update: answers tell nothing about tiers that are not called yet;
- skipping, starting: a ladder is climbed from its first rung, or no rung of it is passed over;
- the router altogether.

The preference loss is the network's: log loss on the other half when half of the rows are known by which of two
answers was better only, with these pairs and without them.

The learning curve draws 100 to 10,000 queries to learn from, five times each, and asks what task means, logistic
regression and the difficulty router, which chooses between them, reach at a price on 2,000 others, or on a third of a
file that has not so many.

    ROUTENLP_DATA=... python benchmarks/ablations.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import numpy as np
from curves import hull_cost, markdown
from local_tiers import HERE
from numpy.typing import NDArray
from routers import Recorded, halves_of, mean_costs, predictions, priced, replayed, taken

from routenlp_plugins.cascade.families import Space
from routenlp_plugins.cascade.ordering import Ordering
from routenlp_plugins.cascade.risks import Retention
from routenlp_plugins.cascade.search import pooled_paths
from routenlp_plugins.evaluate.table import TaskTable
from routenlp_plugins.routing.difficulty import TrainingOptions
from routenlp_plugins.routing.examples import log_loss
from routenlp_plugins.routing.foresight import foreseen, learned
from routenlp_plugins.routing.network import Losses, Network
from routenlp_plugins.routing.observations import Observations
from routenlp_plugins.routing.projecting import Projection

FILES = ("routellm_mmlu", "routellm_gsm8k", "llmrouter", "anlp_cnli_coqa", "medmcqa_nine", "routerbench_arc_challenge")
HALVES = 4
TARGET = 0.97
WITHOUT: Mapping[str, Space] = {
    "nothing left out": Space(),
    "no cost term": Space(sized=False),
    "no update": Space(updating=False),
    "no skipping": Space(skipping=False),
    "no starting": Space(starting=False),
    "neither": Space(skipping=False, starting=False),
}
LABELS = (100, 200, 500, 1000, 2000, 5000, 10_000)
DRAWS = 5
CURVES = ("routellm_mmlu", "llmrouter", "routellm_gsm8k")
JUDGED = 2000
METHODS: Mapping[str, tuple[str, ...]] = {
    "task means": ("task means",),
    "logistic": ("logistic",),
    "difficulty router": TrainingOptions().methods,
}


def main() -> None:
    results: dict[str, object] = {"target": TARGET, "halves": HALVES}
    with get_context("spawn").Pool(2) as pool:
        costs = {
            name: np.array(pool.map(partial(half, name), range(HALVES), chunksize=1)).round(4).tolist()
            for name in FILES
        }
        results["ways"] = list(ways())
        results["costs"] = costs
        rows = [[way, *(f"{np.mean(costs[name], axis=0)[i]:.3f}" for name in FILES)] for i, way in enumerate(ways())]
        print(markdown(["without", *FILES], rows), flush=True)
        results["preferences"] = {name: preferences(name) for name in ("llmrouter", "medmcqa_nine")}
        print(results["preferences"], flush=True)
        results["learning curve"] = dict(zip(CURVES, pool.map(learning_curve, CURVES), strict=True))
        print(json.dumps(results["learning curve"], indent=2))
    (HERE / "results" / "ablations.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def ways() -> tuple[str, ...]:
    return (*WITHOUT, "no task conditioning", "no router")


def half(name: str, seed: int) -> list[float]:
    """Cost in hindsight of each way."""
    data, fit, test = halves_of(name, seed)
    of_fit, of_test = taken(data, fit), taken(data, test)
    with_router = routed(of_fit, of_test)
    costs = [hindsight(data, test, *with_router, space) for space in WITHOUT.values()]
    costs.append(hindsight(data, test, *of_one_task(of_fit, of_test), Space()))
    return [*costs, hindsight(data, test, of_fit, of_test, Space())]


Tables = Mapping[str, TaskTable]


def routed(of_fit: Tables, of_test: Tables) -> tuple[Tables, Tables]:
    found = learned(of_fit, TrainingOptions(), graded=True, stream=len(of_fit) > 1)
    if found is None:
        return of_fit, of_test
    return found[1], foreseen(found[0], of_test)


def of_one_task(of_fit: Tables, of_test: Tables) -> tuple[Tables, Tables]:
    """Predictions of a router that was told no tasks."""
    ends = [Ordering.of(tables).table for tables in (of_fit, of_test)]
    found = learned({"all": ends[0]}, TrainingOptions(), graded=True, stream=False)
    if found is None:
        return of_fit, of_test
    known, told = found[1]["all"], foreseen(found[0], {"all": ends[1]})["all"]
    return apart(of_fit, known), apart(of_test, told)


def apart(tables: Tables, together: TaskTable) -> Tables:
    parts, start = {}, 0
    for task, table in tables.items():
        rows = slice(start, start + len(table))
        mine = {tier: values[rows] for tier, values in together.difficulty.items() if tier in table.tiers}
        parts[task] = replace(table, difficulty=mine)
        start += len(table)
    return parts


def hindsight(data: Recorded, test: NDArray[np.intp], of_fit: Tables, of_test: Tables, space: Space) -> float:
    ends = [
        replayed(of_test, point)
        for target in (0.95, TARGET)
        for path in pooled_paths(of_fit, Retention(target), space=space)
        for point in path
    ]
    if not ends:
        return 1.0
    cost, quality = (np.array(of) for of in zip(*ends, strict=True))
    return hull_cost(data.spent(test, cost, quality).curve, TARGET)


def preferences(name: str) -> dict[str, float]:
    """Log loss of the network without and with preferences, mean over halves."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    for seed in range(HALVES):
        data, fit, test = halves_of(name, seed)
        texts, tasks = [data.texts[i] for i in fit], [str(task) for task in data.tasks[fit]]
        hidden = np.random.default_rng(seed).random(len(fit)) < 0.5
        quality = data.quality[fit]
        pairs: list[tuple[int, str, str]] = []
        for row in np.flatnonzero(hidden).tolist():
            a, b = np.random.default_rng(seed * len(fit) + row).permutation(len(data.tiers))[:2].tolist()
            if quality[row, a] > quality[row, b]:
                pairs.append((row, data.tiers[a], data.tiers[b]))
        good = {tier: np.where(hidden, np.nan, quality[:, k]) for k, tier in enumerate(data.tiers)}
        observed = Observations(texts, tasks, good, preferences=pairs)
        encoder = TrainingOptions().encoder
        vectors = encoder(texts)
        projection = Projection.train(vectors, seed)
        examples = observed.examples(projection(vectors), seed)
        told = [data.texts[i] for i in test], [str(task) for task in data.tasks[test]]
        truth = Observations(*told, {tier: data.quality[test, k] for k, tier in enumerate(data.tiers)})
        judged = truth.examples(projection(encoder(told[0])), seed)
        place = {task: i for i, task in enumerate(observed.task_names)}
        of_task = np.array([place.get(task, len(place)) for task in told[1]], dtype=np.intp)
        for way, weight in (("without", 0.0), ("with", 1.0)):
            network = Network.train(examples, np.arange(len(place) + 1), Losses(preference=weight), seed)
            found[way].append(log_loss(network(judged.vectors, of_task), judged))
    return {way: round(float(np.mean(of)), 4) for way, of in found.items()}


def learning_curve(name: str) -> dict[str, dict[str, list[float]]]:
    """Labels -> method -> mean cost at the target, and the standard error of its difference to the task means."""
    data = Recorded.read(name)
    found: dict[str, dict[str, list[float]]] = {}
    judged = min(JUDGED, len(data.texts) // 3)
    for count in (some for some in LABELS if some <= len(data.texts) - judged):
        costs = np.array([with_labels(data, count, judged, seed) for seed in range(DRAWS)])
        spread = (costs - costs[:, :1]).std(axis=0, ddof=1) / np.sqrt(DRAWS)
        found[str(count)] = {
            method: [round(float(costs[:, i].mean()), 4), round(float(spread[i]), 4)]
            for i, method in enumerate(METHODS)
        }
    return found


def with_labels(data: Recorded, count: int, judged: int, seed: int) -> list[float]:
    order = np.random.default_rng(seed).permutation(len(data.texts))
    fit, test = np.sort(order[:count]), np.sort(order[-judged:])
    mean_cost = mean_costs(data, fit)
    return [
        hull_cost(priced(data, test, predictions(data, fit, test, kinds)[1], mean_cost).curve, TARGET)
        for kinds in METHODS.values()
    ]


if __name__ == "__main__":
    main()
