"""What a policy does on every row of a table: the flow, vectorised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable
from ..policy import Confidence, Offer, RelativeCost, Rung
from .calibration import confidences

__all__ = ["best_answer", "climb"]


def climb(
    table: TaskTable,
    rungs: Sequence[Rung],
    offers: Sequence[Offer] = (),
    relative_cost: RelativeCost | None = None,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """What the flow does with these rungs on every row; a tier that was never tried is charged as the answer.

    Returns:
        (n,) column of the tier that answers, and (n,) USD of all attempts.
    """
    n, last = len(table), len(table.tiers) - 1
    expected = table.relative_cost(relative_cost)
    column, cost = np.full(n, last, dtype=np.intp), np.zeros(n)
    climbing = table.supported.copy()
    first = _first_rung(table, rungs, offers, expected)
    answered, called = np.zeros(n, dtype=np.int64), np.zeros((n, last), dtype=np.bool_)
    bits = {tier: 1 << k for k, tier in enumerate(table.tiers)}
    for place, rung in enumerate(rungs):
        k = table.tiers.index(rung.tier)
        at = climbing & (first <= place) & ~called[:, k]
        if rung.after is not None:
            at &= answered == sum(bits[tier] for tier in set(rung.after))
        if rung.belief is not None:
            at &= _seen(table, rung.belief, rung.belief.read, answered, bits) >= _needed(rung, rung.level, expected)
        called[at, k] = True
        cost[at] += table.cost[at, k]
        untried = at & ~table.tried[:, k]
        column[untried], climbing[untried] = k, False
        at &= table.tried[:, k] & table.answered[:, k]
        answered[at] |= 1 << k
        if rung.threshold is None:
            column[at], climbing[at] = k, False
        elif rung.confidences:
            judged = [(c.tier, _seen(table, c, c.tiers, answered, bits)) for c in rung.confidences]
            best, confidence = best_answer(table, judged)
            accepted = at & (confidence >= _needed(rung, rung.threshold, expected))
            column[accepted], climbing[accepted] = best[accepted], False
    escalated = column == last
    cost[escalated] += table.cost[escalated, -1]
    return column, cost


def _seen(
    table: TaskTable, confidence: Confidence, tiers: set[str], answered: NDArray[np.int64], bits: Mapping[str, int]
) -> NDArray[np.float64]:
    """(n,) a confidence where the answers of all these tiers are there, NaN elsewhere."""
    needed = sum(bits[tier] for tier in tiers)
    return np.where(answered & needed == needed, confidences(table, confidence), np.nan)


def _needed(rung: Rung, level: float, expected: NDArray[np.float64]) -> NDArray[np.float64] | float:
    return level if rung.lossless is None else rung.lossless - (rung.lossless - level) * expected


def _first_rung(
    table: TaskTable, rungs: Sequence[Rung], offers: Sequence[Offer], expected: NDArray[np.float64]
) -> NDArray[np.intp]:
    """(n,) place of the rung at which each climb begins."""
    if not offers:
        return np.zeros(len(table), dtype=np.intp)
    tiers = [rung.tier for rung in rungs]
    places = np.array([tiers.index(o.tier) if o.tier in tiers else len(tiers) for o in offers], dtype=np.intp)
    worth = np.column_stack([confidences(table, offer.belief) - offer.price * expected for offer in offers])
    return np.asarray(places[np.where(np.isnan(worth), -np.inf, worth).argmax(axis=1)])


Judgement = Sequence[tuple[str, NDArray[np.float64]]]
"""The tiers whose answers may be returned, each with the (n,) confidence in it, NaN where it is not known."""


def best_answer(table: TaskTable, judged: Judgement) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(n,) column of the answer with the highest confidence, and that; -inf where none is known."""
    values = np.column_stack([np.where(np.isnan(v), -np.inf, v) for _, v in judged])
    best = values.argmax(axis=1)
    columns = np.array([table.tiers.index(tier) for tier, _ in judged], dtype=np.intp)
    return columns[best], values[np.arange(len(table)), best]
