"""The rows that policies are searched on: one task, or all tasks as one stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable, tiers_of
from ..policy import RelativeCost

__all__ = ["Ordering", "expected_cost"]
LEAST = 0.2
"""Of the mean cost of its task no answer of the frontier is expected to cost less."""


@dataclass(frozen=True, slots=True)
class Ordering:
    """Ordering rows as one table.

    Attributes:
        tasks: (n,) of the rows.
        allowed: (n, K - 1) whether the tier may be called for the row's task.
        expected: task -> what the frontier's answer is expected to cost, in units of its mean over all rows.
        relative_cost: (n,) that, for each row.
        mean_cost: task -> tier -> mean USD of a call there, of the tiers that may be called.
    """

    table: TaskTable
    tasks: NDArray[np.str_]
    allowed: NDArray[np.bool_]
    expected: Mapping[str, RelativeCost]
    relative_cost: NDArray[np.float64]
    mean_cost: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, tables: Mapping[str, TaskTable]) -> Ordering:
        """Of the tables of one task or more, none of them empty."""
        table, allowed = _together(list(tables.values()))
        unit = _unit(table)
        expected = {task: expected_cost(alone, unit) for task, alone in tables.items()}
        return cls(
            table,
            np.concatenate([np.full(len(table), task) for task, table in tables.items()]),
            allowed,
            expected,
            np.concatenate([table.relative_cost(expected[task]) for task, table in tables.items()]),
            {
                task: dict(zip(table.tiers, table.cost.mean(axis=0).tolist(), strict=True))
                for task, table in tables.items()
            },
        )

    @property
    def sized(self) -> bool:
        """Whether some queries are expected to cost more than others."""
        return bool(np.ptp(self.relative_cost) > 0)

    @property
    def unit(self) -> float:
        """Mean USD of the frontier's answers."""
        return _unit(self.table)


def _unit(table: TaskTable) -> float:
    return float(table.cost[:, -1].mean()) or 1.0


def expected_cost(table: TaskTable, unit: float) -> RelativeCost:
    """Least squares: cost of the frontier's answers, in these units of USD, on the length of the text."""
    lengths = table.lengths
    cost = table.cost[:, -1] / unit
    mean = float(cost.mean())
    least = LEAST * mean or LEAST
    if len(table) < 3 or np.ptp(lengths) == 0:
        return RelativeCost(mean or 1.0, 0.0, least)
    slope, intercept = np.polyfit(lengths, cost, 1)
    # of longer texts than these nothing was seen
    most = max(float((intercept + slope * lengths).max()), least)
    return RelativeCost(float(intercept), float(slope), least, most)


def _together(tables: Sequence[TaskTable]) -> tuple[TaskTable, NDArray[np.bool_]]:
    """One table of all rows, and (n, K - 1) whether the row's task has the tier."""
    first, *more = tables
    if not more:
        return first, np.ones(first.answered.shape, dtype=np.bool_)
    tiers = tiers_of(tables)
    below = tiers[:-1]

    def columns(values: str, missing: float, names: Sequence[str]) -> NDArray[np.float64]:
        parts = []
        for table in tables:
            part = np.full((len(table), len(names)), missing)
            mine = [k for k, tier in enumerate(names) if tier in table.tiers]
            part[:, mine] = getattr(table, values)[:, [table.tiers.index(names[k]) for k in mine]]
            parts.append(part)
        return np.vstack(parts)

    def keyed(values: str, names: Callable[[Any], set[str]]) -> dict[Any, NDArray[np.float64]]:
        """What every task has whose tiers it is about: a task that lacks it could not be climbed."""
        found: dict[Any, list[NDArray[np.float64]]] = {}
        for key in dict.fromkeys(key for table in tables for key in getattr(table, values)):
            parts = [getattr(t, values).get(key) for t in tables]
            lacking = [t for t, part in zip(tables, parts, strict=True) if part is None and names(key) <= set(t.tiers)]
            if not lacking:
                found[key] = [
                    np.full(len(t), np.nan) if part is None else part for t, part in zip(tables, parts, strict=True)
                ]
        return {key: np.concatenate(parts) for key, parts in found.items()}

    # a pair is in order of the columns
    agreement: dict[tuple[str, str], NDArray[np.float64]] = {}
    for (one, two), values in keyed("agreement", set).items():
        pair = (one, two) if below.index(one) < below.index(two) else (two, one)
        agreement[pair] = np.where(np.isnan(values), agreement.get(pair, values), values)
    allowed = np.vstack([np.tile([tier in table.tiers for tier in below], (len(table), 1)) for table in tables])
    joined = ("texts", "tau", "units", "weights", "supported")
    return (
        TaskTable(
            task=", ".join(table.task for table in tables),
            tiers=tiers,
            quality=columns("quality", np.nan, tiers),
            cost=columns("cost", 0.0, tiers),
            answered=columns("answered", 0.0, below) > 0,
            tried=columns("tried", 0.0, below) > 0,
            evidence=keyed("evidence", lambda key: {key[0]}),
            agreement=agreement,
            difficulty=keyed("difficulty", lambda key: {key}),
            **{name: np.concatenate([getattr(table, name) for table in tables]) for name in joined},
        ),
        allowed,
    )
