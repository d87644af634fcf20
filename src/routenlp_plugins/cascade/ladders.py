"""What a ladder does on every row of a table, and thresholds for it: the flow, vectorised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable
from ..types import Rung
from .calibration import confidences
from .risks import Risk

__all__ = ["Judged", "climb", "joint_levels", "judged", "optimal_stopping", "stopping_step"]

LEVELS = 64
PRICES = 48


@dataclass(frozen=True, slots=True)
class Judged:
    """A ladder of J rungs on n rows: what it would know and spend if it never stopped.

    Attributes:
        confidence: (n, J) of the best answer after each step; -inf where none can be returned, inf where the tier was
            never tried, so that the worst case is charged.
        column: (n, J + 1) tier that answers if the climb ends at this step, the frontier last.
        cost: (n, J + 1) USD spent until then.
    """

    confidence: NDArray[np.float64]
    column: NDArray[np.intp]
    cost: NDArray[np.float64]


Step = Sequence[tuple[str, NDArray[np.float64]]]
"""The tiers whose answers may be returned at a step, each with the (n,) confidence in it."""


def judged(table: TaskTable, tiers: Sequence[str], steps: Sequence[Step]) -> Judged:
    """A ladder of these tiers with these confidences."""
    n, last = len(table), len(table.tiers) - 1
    columns = [table.tiers.index(tier) for tier in tiers]
    confidence = np.full((n, len(tiers)), -np.inf)
    column = np.full((n, len(tiers) + 1), last, dtype=np.intp)
    for j, step in enumerate(steps):
        if step:
            _judge(table, step, confidence[:, j], column[:, j])
        confidence[~table.answered[:, columns[j]], j] = -np.inf
        untried = ~table.tried[:, columns[j]]
        confidence[untried, j], column[untried, j] = np.inf, columns[j]
    spent = np.cumsum(table.cost[:, columns], axis=1)
    total = spent[:, -1:] + table.cost[:, -1:]
    return Judged(confidence, column, np.column_stack([spent, total]))


def _judge(
    table: TaskTable,
    step: Step,
    confidence: NDArray[np.float64],
    column: NDArray[np.intp],
) -> None:
    """Fill in the best answer of a step and its confidence, -inf where no confidence is known."""
    values = np.column_stack([np.where(np.isnan(v), -np.inf, v) for _, v in step])
    best = values.argmax(axis=1)
    confidence[:] = values[np.arange(len(table)), best]
    column[:] = np.array([table.tiers.index(tier) for tier, _ in step])[best]


def stopping_step(confidence: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """(n,) first step whose confidence reaches its threshold, J where none does."""
    reached = np.column_stack([confidence >= thresholds, np.ones(len(confidence), dtype=np.bool_)])
    return np.asarray(reached.argmax(axis=1))


def climb(table: TaskTable, rungs: Sequence[Rung]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """What the flow does with these rungs on every row.

    Returns:
        (n,) column of the tier that answers, and (n,) USD of all attempts.
    """
    rows = np.arange(len(table))
    if not rungs:
        return np.full(len(table), len(table.tiers) - 1, dtype=np.intp), table.cost[:, -1].copy()
    always = np.ones(len(table))
    steps = [
        [(rung.tier, always)] if rung.threshold is None else [(c.tier, confidences(table, c)) for c in rung.confidences]
        for rung in rungs
    ]
    ladder = judged(table, [rung.tier for rung in rungs], steps)
    thresholds = np.array([1.0 if rung.threshold is None else rung.threshold for rung in rungs])
    step = stopping_step(ladder.confidence, thresholds)
    return ladder.column[rows, step], ladder.cost[rows, step]


def joint_levels(ladder: Judged) -> Iterator[NDArray[np.float64]]:
    """One level of confidence for all steps, from strict to lenient."""
    seen = ladder.confidence[np.isfinite(ladder.confidence)]
    values = np.unique(seen)
    if not len(values):
        return
    # between two values, so that no rounding decides
    between = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2])
    at = np.unique(np.searchsorted(between, np.quantile(seen, np.linspace(0, 1, LEVELS))).clip(0, len(between) - 1))
    for level in between[at]:
        yield np.full(ladder.confidence.shape[1], np.clip(level, 0.0, 1.0))


def optimal_stopping(table: TaskTable, ladder: Judged, risk: Risk) -> Iterator[NDArray[np.float64]]:
    """Thresholds of each step that minimise expected cost plus a price times expected excess, for rising prices.

    Backward induction: the last step weighs its answer against the frontier's cost, each step before against what
    going on costs under the thresholds after it. Expectations are those of the confidences, not of the labels: what is
    searched over should not be noise.
    """
    steps = ladder.confidence.shape[1]
    excess = risk.expected_excess(np.clip(ladder.confidence, 0.0, 1.0))
    step_cost = np.diff(ladder.cost, axis=1)
    orders = [np.argsort(-ladder.confidence[:, j], kind="stable") for j in range(steps)]
    unit = float(table.cost[:, -1].mean()) or 1.0
    seen: set[bytes] = set()
    for price in unit * np.geomspace(0.3, 3000, PRICES):
        thresholds = np.full(steps, np.inf)
        onward = step_cost[:, -1]
        for j in reversed(range(steps)):
            stop = price * excess[:, j]
            order = orders[j]
            saved = np.concatenate([[0.0], np.cumsum((stop - onward)[order])])
            accepted = int(saved.argmin())
            thresholds[j] = _between(ladder.confidence[order, j], accepted)
            value = np.where(ladder.confidence[:, j] >= thresholds[j], stop, onward)
            onward = value if j == 0 else step_cost[:, j - 1] + value
        key = np.round(thresholds, 9).tobytes()
        if key not in seen and np.isfinite(thresholds).any():
            seen.add(key)
            yield thresholds


def _between(falling: NDArray[np.float64], accepted: int) -> float:
    """A threshold that the first `accepted` of these values reach."""
    if accepted == 0:
        return np.inf
    lowest = falling[accepted - 1]
    if not np.isfinite(lowest):
        return 0.0 if lowest < 0 else np.inf
    following = falling[accepted] if accepted < len(falling) else -np.inf
    return float(np.clip((lowest + following) / 2 if np.isfinite(following) else lowest - 1e-6, 0.0, 1.0))
