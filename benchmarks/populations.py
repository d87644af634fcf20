"""Populations whose risks are known exactly: tables of real outcomes, and synthetic ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from local_tiers import data_folder, folds
from numpy.typing import NDArray

from routenlp_plugins import Portfolio
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.evaluate.table import TaskTable, task_tables
from routenlp_plugins.evaluate.units import unit_interval
from routenlp_plugins.routing.difficulty import TrainingOptions
from routenlp_plugins.routing.foresight import foreseen, learned

OF_TIERS = {2: (0,), 3: (0, 2), 5: (0, 1, 2, 3)}
"""Number of tiers -> which of the four cheap ones below are in."""
RECORDED = {
    "medmcqa": ("medmcqa_nine", ("llama3.2-3b", "llama3.1-8b", "gpt-4o-mini", "qwen2.5-72b-instruct")),
    "arc_challenge": ("routerbench_arc_challenge", None),
}
LOCAL = ("cs_intent", "legal_clause", "legal_risk", "cs_response", "finance_ner")


def synthetic(tiers: int, n: int = 20_000, seed: int = 0) -> TaskTable:
    """Answers are right with a probability that falls with a query's difficulty; confidences are noisy views of it.

    Two tiers that are both wrong give the same wrong answer one time in four.
    """
    rng = np.random.default_rng(seed)
    skill, price = np.array([0.0, 0.6, 1.2, 1.8]), np.array([1.0, 3.0, 8.0, 20.0])
    columns = list(OF_TIERS[tiers])
    names = tuple(f"tier-{i}" for i in columns)
    difficulty = rng.normal(size=n)
    probability = 1 / (1 + np.exp(-1.6 * (skill[columns] + 0.8 - difficulty[:, None])))
    right = rng.random((n, len(columns))) < probability
    answer = np.where(right, -1, rng.integers(4, size=(n, len(columns))))
    seen = 1 / (1 + np.exp(-(np.log(probability / (1 - probability)) + rng.normal(0, 0.8, probability.shape))))
    frontier = rng.random(n) < 1 / (1 + np.exp(-(3.6 - difficulty)))
    return TaskTable(
        task="synthetic",
        tiers=(*names, "frontier"),
        texts=np.full(n, "", dtype=np.object_),
        tau=np.ones(n),
        units=np.array([f"q{i}" for i in range(n)]),
        weights=np.ones(n),
        quality=np.column_stack([right, frontier]).astype(np.float64),
        cost=np.broadcast_to(np.r_[price[columns], 60.0], (n, len(columns) + 1)).copy(),
        answered=np.ones((n, len(columns)), dtype=np.bool_),
        tried=np.ones((n, len(columns)), dtype=np.bool_),
        evidence={(name, "confidence"): seen[:, i] for i, name in enumerate(names)},
        agreement={
            (names[i], names[j]): (answer[:, i] == answer[:, j]).astype(np.float64)
            for i in range(len(names))
            for j in range(i + 1, len(names))
        },
        supported=np.ones(n, dtype=np.bool_),
    )


def recorded(name: str, tiers: int | None = None) -> TaskTable:
    """Outcomes of language models, recorded by others; of `tiers` of them, the frontier included, or of all."""
    file, cheap = RECORDED[name]
    folder = data_folder() / "outcomes"
    portfolio = Portfolio.from_yaml(folder / f"{file}.portfolio.yaml")
    table = task_tables(read_outcomes(folder / f"{file}.jsonl.gz"), portfolio)[name]
    if tiers is None:
        return table
    below = cheap or tuple(np.array(table.tiers[:-1])[np.linspace(2, len(table.tiers) - 2, 4).astype(int)])
    return only(table, tuple(tier for i, tier in enumerate(below) if i in OF_TIERS[tiers]))


def only(table: TaskTable, below: tuple[str, ...]) -> TaskTable:
    """The table with these tiers below the frontier."""
    places = [i for i, tier in enumerate(table.tiers[:-1]) if tier in below]
    columns = [*places, len(table.tiers) - 1]
    return replace(
        table,
        tiers=tuple(table.tiers[i] for i in columns),
        quality=table.quality[:, columns],
        cost=table.cost[:, columns],
        answered=table.answered[:, places],
        tried=table.tried[:, places],
        evidence={key: values for key, values in table.evidence.items() if key[0] in below},
        agreement={key: values for key, values in table.agreement.items() if set(key) <= set(below)},
    )


def populations() -> Mapping[str, TaskTable]:
    """All of them, by name and number of tiers."""
    found = {f"synthetic, {k} tiers": synthetic(k) for k in OF_TIERS}
    found |= {f"{name}, {k} tiers": recorded(name, k) for name in RECORDED for k in OF_TIERS}
    found |= {f"{task}, {len(table.tiers)} tiers": table for task in LOCAL if (table := folds(task)[1])}
    return found


def foretold(file: str, seed: int = 0) -> Mapping[str, TaskTable]:
    """Two thirds of a file, task by task, with what a router says of them that learned from the other third."""
    folder = data_folder() / "outcomes"
    portfolio = Portfolio.from_yaml(folder / f"{file}.portfolio.yaml")
    tables = task_tables(read_outcomes(folder / f"{file}.jsonl.gz"), portfolio)
    third = {task: unit_interval(table.units, seed, "third") < 1 / 3 for task, table in tables.items()}
    known = {task: table.take(np.flatnonzero(third[task])) for task, table in tables.items()}
    found = learned(known, TrainingOptions(), graded=False)
    rest = {task: table.take(np.flatnonzero(~third[task])) for task, table in tables.items()}
    return rest if found is None else foreseen(found[0], rest)


def foretold_populations() -> Mapping[str, Mapping[str, TaskTable]]:
    """Those with predictions; of many tasks the whole stream."""
    return {"gsm8k, 2 tiers, router": foretold("routellm_gsm8k"), "llmrouter, 9 tiers, router": foretold("llmrouter")}


def drawn_stream(tables: Mapping[str, TaskTable], n: int, rng: np.random.Generator) -> dict[str, TaskTable]:
    """n rows of all tasks with replacement, as `drawn`; it is drawn too how many each task has."""
    ends = np.cumsum([len(table) for table in tables.values()])
    places = rng.integers(ends[-1], size=n)
    return {
        task: drawn(table, 0, rng, places[(places >= end - len(table)) & (places < end)] - (end - len(table)))
        for (task, table), end in zip(tables.items(), ends.tolist(), strict=True)
    }


def drawn(population: TaskTable, n: int, rng: np.random.Generator, places: NDArray[np.intp] | None = None) -> TaskTable:
    """n rows with replacement, or those of these places; each a unit of its own: a row drawn twice is two queries."""
    sample = population.take(rng.integers(len(population), size=n) if places is None else places)
    return replace(sample, units=np.array([f"{unit}#{i}" for i, unit in enumerate(sample.units)]))
