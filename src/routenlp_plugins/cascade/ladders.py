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
FIRST = 0.15
"""Expected bad answers, as a share of all queries, up to which levels are finest."""
PRICES = 48
BETWEEN = 4


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
    confidence[~table.supported] = -np.inf
    spent = np.cumsum(np.where(table.supported[:, None], table.cost[:, columns], 0.0), axis=1)
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
    """One level of confidence for all steps.

    A third of the levels lets through equal shares of the rows, a third equal shares of the bad answers that the
    confidences expect, and a third resolves the first of these, where promises are made.
    """
    best = ladder.confidence.max(axis=1)
    falling = -np.sort(-best[np.isfinite(best)])
    if not len(falling):
        return
    values = np.unique(falling)
    # between two values, so that no rounding decides
    between = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2])
    bad = np.cumsum(1 - falling)
    places = [
        np.linspace(0, len(falling) - 1, LEVELS).astype(np.intp),
        np.searchsorted(bad, np.linspace(0, bad[-1], LEVELS)),
        np.searchsorted(bad, np.linspace(0, min(bad[-1], FIRST * len(best)), LEVELS)),
    ]
    lowest = np.unique(falling[np.concatenate(places).clip(0, len(falling) - 1)])
    for level in between[np.searchsorted(values, lowest)]:
        yield np.full(ladder.confidence.shape[1], np.clip(level, 0.0, 1.0))


def optimal_stopping(table: TaskTable, ladder: Judged, risk: Risk) -> Iterator[NDArray[np.float64]]:
    """Thresholds of each step that minimise expected cost plus a price times expected excess, for rising prices.

    Backward induction: the last step weighs its answer against the frontier's cost, each step before against what
    going on costs under the thresholds after it. Expectations are those of the confidences, not of the labels: what is
    searched over should not be noise. Prices reach the convex hull of cost and risk only, so that thresholds between
    those of neighbouring prices are tried too.
    """
    unit = float(table.cost[:, -1].mean()) or 1.0
    excess = risk.expected_excess(np.clip(ladder.confidence, 0.0, 1.0))
    orders = np.argsort(-ladder.confidence, axis=0, kind="stable")
    found = [_at_price(ladder, orders, excess, price) for price in unit * np.geomspace(0.3, 3000, PRICES)]
    found = [np.minimum(thresholds, 1.0) for thresholds in found if np.isfinite(thresholds).any()]
    seen: set[bytes] = set()
    for first, second in zip(found, found[1:] + found[-1:], strict=True):
        for weight in np.arange(BETWEEN) / BETWEEN:
            thresholds = (1 - weight) * first + weight * second
            key = np.round(thresholds, 9).tobytes()
            if key not in seen:
                seen.add(key)
                yield thresholds


def _at_price(
    ladder: Judged, orders: NDArray[np.intp], excess: NDArray[np.float64], price: float
) -> NDArray[np.float64]:
    """(J,) best thresholds at a price of excess; inf where the step should never stop.

    Args:
        orders: (n, J) rows by falling confidence of each step.
    """
    steps = excess.shape[1]
    step_cost = np.diff(ladder.cost, axis=1)
    thresholds = np.full(steps, np.inf)
    onward = step_cost[:, -1]
    for j in reversed(range(steps)):
        stop = price * excess[:, j]
        order = orders[:, j]
        saved = np.concatenate([[0.0], np.cumsum((stop - onward)[order])])
        thresholds[j] = _between(ladder.confidence[order, j], int(saved.argmin()))
        value = np.where(ladder.confidence[:, j] >= thresholds[j], stop, onward)
        onward = value if j == 0 else step_cost[:, j - 1] + value
    return thresholds


def _between(falling: NDArray[np.float64], accepted: int) -> float:
    """A threshold that the first `accepted` of these values reach."""
    if accepted == 0:
        return np.inf
    lowest = falling[accepted - 1]
    if not np.isfinite(lowest):
        return 0.0 if lowest < 0 else np.inf
    following = falling[accepted] if accepted < len(falling) else -np.inf
    return float(np.clip((lowest + following) / 2 if np.isfinite(following) else lowest - 1e-6, 0.0, 1.0))
