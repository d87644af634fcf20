"""What a router predicts of the queries of a table: learned from ordering rows, served to all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable, tiers_of
from .difficulty import DifficultyRouter, TrainingOptions
from .observations import Observations

__all__ = ["foreseen", "learned"]


def learned(
    tables: Mapping[str, TaskTable], options: TrainingOptions, *, graded: bool, stream: bool = True
) -> tuple[DifficultyRouter, dict[str, TaskTable]] | None:
    """A router for all tiers, and the tables with what it says of their rows without having seen them.

    A router that was trained on texts that are not known would meet others when it serves. If none are, it learns the
    task alone; if those of some tasks are not, it says nothing of these tasks.

    Args:
        graded: whether it learns quality itself, instead of whether that reaches tau.
        stream: whether one promise is for all of them: then it is something to know their tasks apart.

    Returns:
        None where all queries of a promise are alike to a router, or there are too few of them.
    """
    everything = tables
    tables = {task: table for task, table in tables.items() if len(table)}
    written = {task: table for task, table in tables.items() if table.written}
    if not written:
        options = replace(options, methods=("task means",))
    elif len(written) < len(tables):
        tables = written
    texts = [str(text) for table in tables.values() for text in table.texts]
    units = [str(unit) for table in tables.values() for unit in table.units]
    if len(set(units)) < 2 or (len(tables) < 2 and len(set(texts)) < 2):
        return None
    quality = {task: table.quality if graded else table.good for task, table in tables.items()}
    columns = {tier: _column(tier, tables, quality) for tier in tiers_of(tables.values())}
    good = {tier: column for tier, column in columns.items() if np.isfinite(column).any()}
    if not good:
        return None
    weights = np.concatenate([table.weights for table in tables.values()])
    tasks = [task for task, table in tables.items() for _ in range(len(table))]
    trained = DifficultyRouter.train(Observations(texts, tasks, good, units, weights), options)
    if trained.router.kind == "task means" and not stream:
        return None
    known: dict[str, TaskTable] = {}
    start = 0
    for task, table in tables.items():
        known[task] = _with(table, trained.router.tiers, trained.held_out[start : start + len(table)])
        start += len(table)
    return trained.router, {**everything, **known}


def foreseen(router: DifficultyRouter, tables: Mapping[str, TaskTable]) -> dict[str, TaskTable]:
    """The tables with what the router predicts of their rows, of the tasks that it knows."""
    return {
        task: _with(table, router.tiers, router([str(text) for text in table.texts], [task] * len(table)))
        if task in router.tasks
        else table
        for task, table in tables.items()
    }


def _with(table: TaskTable, tiers: Sequence[str], predicted: NDArray[np.float64]) -> TaskTable:
    mine = {tier: predicted[:, k] for k, tier in enumerate(tiers) if tier in table.tiers}
    return replace(table, difficulty=mine)


def _column(
    tier: str, tables: Mapping[str, TaskTable], quality: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """(n,) quality of a tier over all tables, NaN for a task that has it not."""
    return np.concatenate(
        [
            quality[task][:, table.tiers.index(tier)] if tier in table.tiers else np.full(len(table), np.nan)
            for task, table in tables.items()
        ]
    )
