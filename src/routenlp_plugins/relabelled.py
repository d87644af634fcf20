"""Fits on labels that are not the truth, or on policies that they have found: what goes with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .cascade.noise import Noise, NoisyRetention, NoisyViolation
from .cascade.risks import Retention, Risk
from .errors import DataError
from .evaluate.outcomes import OutcomeRow, Outcomes, outcome_rows
from .evaluate.table import TaskTable
from .portfolio import Portfolio

__all__ = ["check_labels", "noisy", "others_than", "with_floors"]


def noisy(risk: Risk, noise: Noise) -> Risk:
    """The promise as labels can tell it."""
    kind = NoisyRetention if isinstance(risk, Retention) else NoisyViolation
    return kind(risk.level, noise)


def others_than(rows: Sequence[OutcomeRow], hints: Outcomes) -> list[OutcomeRow]:
    """The hints of other queries and groups than these outcomes; how they were drawn is of no consequence.

    Raises:
        DataError: there is none.
    """
    units, sources = {row.unit for row in rows}, {row.source for row in rows if row.source}
    found = [
        replace(row, propensity=None)
        for row in outcome_rows(hints)
        if row.unit not in units and row.source not in sources
    ]
    if not found:
        raise DataError("hints: none is of another query or group than the outcomes; there is nothing to order on")
    return found


def with_floors(tables: Mapping[str, TaskTable], floors: Mapping[str, float | None]) -> dict[str, TaskTable]:
    """The tables of hints with the quality floors of the outcomes."""
    found = {task: floors.get(task) for task in tables}
    return {
        task: replace(table, tau=np.full(len(table), np.nan if found[task] is None else found[task]))
        for task, table in tables.items()
    }


def check_labels(rows: Sequence[OutcomeRow], portfolio: Portfolio, noise: Noise, *, hints: bool) -> None:
    """That labels were not learned from what certifies, and where they certify themselves are of its tasks and floors.

    Raises:
        DataError: they are not.
    """
    seen = next((row for row in rows if row.source.removeprefix("trace ") in noise.seen), None)
    if seen is not None:
        raise DataError(
            f"{seen.source}: the labels were learned from its audit, so that it certifies nothing; take "
            "store.outcomes(model, unaudited=True), or with hints store.outcomes(labelled=True, "
            "without=model.learned_from)"
        )
    if hints:
        return
    for task in sorted({row.query.task or "" for row in rows}):
        if noise.tasks and task not in noise.tasks:
            raise DataError(f"noise: no answer of task {task!r} was audited: nothing is known of its labels")
        # without a floor quality is 0 or 1
        floor = portfolio.task(task).tau or 1.0
        if noise.tau is not None and floor != noise.tau:
            raise DataError(
                f"noise: labels tell whether quality reaches {noise.tau:g}, and tau of task {task!r} is {floor:g}; "
                f"learn them with tau={floor:g}"
            )
