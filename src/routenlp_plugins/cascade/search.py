"""From the ordering split to a short path of joint policies, safest first.

A ladder is a choice of tiers below the frontier. All its thresholds move together: one level of the probability
that an answer is good enough, translated into the score of each tier. So a path has one parameter however many
tiers a ladder has, and a policy is tested end to end: separate tests per tier would add up to a multiple of alpha.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluate.table import TaskTable
from ..types import Rung

__all__ = ["Candidate", "candidate_path", "climb", "violations"]

MAX_RUNGS = 3
LEVELS = 96
PATH_LENGTH = 24
RISK_MARGIN = 1.25
"""Candidates whose estimated risk is above this multiple of alpha are left out: they would hardly ever pass."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ladder with thresholds and what it did on the ordering split.

    Attributes:
        risk: share of violations.
        cost: mean USD of a query.
    """

    rungs: tuple[Rung, ...]
    risk: float
    cost: float


def climb(table: TaskTable, rungs: tuple[Rung, ...]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """What the flow does with these rungs on every row.

    Returns:
        (n,) column of the tier that answers, and (n,) USD of all attempts.

    Raises:
        DataError: a rung compares another kind of score than the table holds.
    """
    answered = np.full(len(table), len(table.tiers) - 1, dtype=np.intp)
    cost = np.zeros(len(table))
    waiting = np.ones(len(table), dtype=np.bool_)
    for rung in rungs:
        column = table.tiers.index(rung.tier)
        if rung.score not in (None, table.kinds[column]):
            raise DataError(
                f"task {table.task!r}: {rung.tier} is gated by {rung.score}, the table has {table.kinds[column]}"
            )
        cost[waiting] += table.cost[waiting, column]
        accepted = waiting & ~table.failed[:, column]
        if rung.threshold is not None:
            accepted &= table.score[:, column] >= rung.threshold
        answered[accepted] = column
        waiting &= ~accepted
    cost[waiting] += table.cost[waiting, -1]
    return answered, cost


def violations(table: TaskTable, answered: NDArray[np.intp]) -> NDArray[np.bool_]:
    """(n,) whether the answer came from below the frontier and is not known to reach tau."""
    quality = table.quality[np.arange(len(table)), answered]
    return (answered < len(table.tiers) - 1) & ~(quality >= table.tau)


def candidate_path(table: TaskTable, alpha: float) -> tuple[Candidate, ...]:
    """At most `PATH_LENGTH` candidates on the cost-risk Pareto front of the ordering split, by rising risk.

    A candidate must save a larger share of the cost than its risk: giving no answer at all to as many queries would
    save as much, and alpha is no licence for that.
    """
    if not len(table):
        return ()
    frontier_cost = float(table.cost[:, -1].mean())
    candidates = [_measured(table, rungs) for rungs in _ladders(table)]
    useful = [c for c in candidates if c.cost < (1 - c.risk) * frontier_cost and c.risk <= RISK_MARGIN * alpha]
    front: list[Candidate] = []
    for candidate in sorted(useful, key=lambda c: (c.risk, c.cost, len(c.rungs))):
        if not front or candidate.cost < front[-1].cost:
            front.append(candidate)
    if len(front) > PATH_LENGTH:
        risks = [candidate.risk for candidate in front]
        keep = np.unique(np.searchsorted(risks, np.linspace(risks[0], risks[-1], PATH_LENGTH)))
        front = [front[i] for i in keep]
    return tuple(front)


def _measured(table: TaskTable, rungs: tuple[Rung, ...]) -> Candidate:
    answered, cost = climb(table, rungs)
    return Candidate(rungs, risk=float(violations(table, answered).mean()), cost=float(cost.mean()))


def _ladders(table: TaskTable) -> Iterator[tuple[Rung, ...]]:
    below = range(len(table.tiers) - 1)
    maps = [_GoodAnswer.fitted(table, column) for column in below]
    for size in range(1, min(MAX_RUNGS, len(below)) + 1):
        for columns in combinations(below, size):
            yield from _joint_thresholds(table, columns, maps)


def _joint_thresholds(
    table: TaskTable, columns: tuple[int, ...], maps: list[_GoodAnswer | None]
) -> Iterator[tuple[Rung, ...]]:
    """The ladder of these columns at every level, with and without a threshold on its last rung."""
    *gates, last = columns
    fitted = [(column, good) for column in columns if (good := maps[column]) is not None]
    if any(maps[column] is None for column in gates):
        return
    if not gates:
        yield (Rung(table.tiers[last]),)
    for level in _levels(table, fitted):
        rungs = tuple(Rung(table.tiers[column], good.threshold(level), table.kinds[column]) for column, good in fitted)
        if maps[last] is not None:
            yield rungs
        if gates:
            yield (*rungs[: len(gates)], Rung(table.tiers[last]))


def _levels(table: TaskTable, fitted: list[tuple[int, _GoodAnswer]]) -> NDArray[np.float64]:
    if not fitted:
        return np.array([])
    seen = np.concatenate([good.probability(_finite(table.score[:, column])) for column, good in fitted])
    return np.unique(np.quantile(seen, np.linspace(0, 1, LEVELS)))


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


@dataclass(frozen=True, slots=True)
class _GoodAnswer:
    """P(quality >= tau | score) as a logistic curve in the log-odds of the score; rising, so it can be inverted."""

    slope: float
    intercept: float

    @classmethod
    def fitted(cls, table: TaskTable, column: int) -> _GoodAnswer | None:
        """None where the score tells nothing: too little of it, or not rising with quality."""
        from sklearn.linear_model import LogisticRegression

        score, quality = table.score[:, column], table.quality[:, column]
        known = np.isfinite(score)
        good = quality[known] >= table.tau
        if known.sum() < 2 or np.ptp(score[known]) == 0:
            return None
        if good.all() or not good.any():
            return cls(slope=1.0, intercept=0.0)  # one class only: order by score, the test decides
        model = LogisticRegression(C=100.0).fit(_log_odds(score[known])[:, None], good)
        slope = float(model.coef_[0, 0])
        return cls(slope, float(model.intercept_[0])) if slope > 1e-6 else None

    def probability(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1 / (1 + np.exp(-(self.slope * _log_odds(score) + self.intercept))))

    def threshold(self, level: float) -> float:
        log_odds = (float(_log_odds(np.array([level]))[0]) - self.intercept) / self.slope
        return float(1 / (1 + np.exp(-np.clip(log_odds, -40, 40))))


def _log_odds(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.asarray(np.log(inside) - np.log1p(-inside))
