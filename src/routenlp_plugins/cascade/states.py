"""A ladder as the states that a climb can be in, and levels for all its decisions by backward induction.

A climb comes to each tier in turn. What is known there is which of the tiers before it have answered, the *state*: bit
j is set once the j-th tier has. The tier is called if the belief in its answer reaches a gate, and the best answer so
far is returned if its confidence then reaches a threshold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable

__all__ = ["Known", "Levels", "Steps", "joint_levels", "optimal_levels", "walk"]

LEVELS = 64
FIRST = 0.15
"""Expected excess, per query, up to which levels are finest."""
PRICES = 48
BETWEEN = 4
NEVER, ALWAYS = np.inf, -1e9
"""Levels that nothing reaches, and all that is known at all."""

Array = NDArray[np.float64]
Gate = tuple[int, int]
"""Place of a tier in the ladder, and the state in which the climb comes to it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The J tiers of a ladder on n rows, the frontier after them.

    Attributes:
        columns: (J + 1,) of the table.
        cost: (n, J + 1) USD of a call.
        tried, answered, allowed: (n, J) whether the tier was called, gave an answer, may be called for the row's task.
        supported: (n,) whether the row is climbed at all.
        gated: whether tiers can be skipped. If so a tier that failed counts as skipped; if not, as called.
    """

    columns: NDArray[np.intp]
    cost: Array
    tried: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    allowed: NDArray[np.bool_]
    supported: NDArray[np.bool_]
    gated: bool

    @classmethod
    def of(cls, table: TaskTable, tiers: Sequence[str], allowed: NDArray[np.bool_], *, gated: bool) -> Steps:
        """These tiers of a table; `allowed` is (n, K - 1), by its columns."""
        below = [table.tiers.index(tier) for tier in tiers]
        columns = np.array([*below, len(table.tiers) - 1], dtype=np.intp)
        return cls(
            columns,
            table.cost[:, columns],
            table.tried[:, below],
            table.answered[:, below],
            allowed[:, below],
            table.supported,
            gated,
        )

    def __len__(self) -> int:
        return len(self.columns) - 1

    def before(self, place: int) -> list[int]:
        """The states in which a climb can come to a place."""
        return list(range(1 << place)) if self.gated else [(1 << place) - 1]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known on n rows in each state.

    Attributes:
        worth: state after a call -> (n,) of the best answer so far: its confidence, or its tolerable loss in units of
            the relative cost; -inf where no answer can be returned.
        excess: state -> (n,) expected excess if that answer is returned.
        column: state -> (n,) tier that gave it.
        belief: gate -> (n,) in the answer of the tier before its call, on the same scale; a place without belief
            is always called.
    """

    worth: Mapping[int, Array]
    excess: Mapping[int, Array]
    column: Mapping[int, NDArray[np.intp]]
    belief: Mapping[Gate, Array]


@dataclass(frozen=True, slots=True)
class Levels:
    """What decides: gate -> level that a belief has to reach, state -> threshold that the worth has to reach."""

    gates: Mapping[Gate, float]
    thresholds: Mapping[int, float]

    @property
    def values(self) -> Array:
        """All of them, in one order for a ladder."""
        return np.array([*self.gates.values(), *self.thresholds.values()])


def walk(steps: Steps, known: Known, levels: Levels) -> tuple[NDArray[np.intp], Array]:
    """(n,) column of the tier that answers each row and (n,) USD of all attempts; an untried tier is charged as one
    that answered."""
    n = len(steps.supported)
    column, cost = np.full(n, steps.columns[-1], dtype=np.intp), np.zeros(n)
    groups: dict[int, NDArray[np.intp]] = {0: np.flatnonzero(steps.supported)}
    for place in range(len(steps)):
        onward: dict[int, list[NDArray[np.intp]]] = defaultdict(list)
        for state, rows in groups.items():
            after = state | 1 << place
            call = steps.allowed[rows, place]
            if (place, state) in levels.gates:
                call = call & (known.belief[place, state][rows] >= levels.gates[place, state])
            called = rows[call]
            onward[state].append(rows[~call])
            cost[called] += steps.cost[called, place]
            untried = ~steps.tried[called, place]
            column[called[untried]] = steps.columns[place]
            answered = steps.answered[called, place]
            onward[state if steps.gated else after].append(called[~answered & ~untried])
            judged = called[answered & ~untried]
            accept = known.worth[after][judged] >= levels.thresholds[after]
            column[judged[accept]] = known.column[after][judged[accept]]
            onward[after].append(judged[~accept])
        groups = {state: np.concatenate(parts) for state, parts in onward.items() if any(map(len, parts))}
    escalated = column == steps.columns[-1]
    cost[escalated] += steps.cost[escalated, -1]
    return column, cost


class _Cuts:
    """Where (n,) values can be cut in two: between those that differ, so that no rounding decides."""

    def __init__(self, values: Array) -> None:
        finite = np.flatnonzero(np.isfinite(values))
        self.order = finite[np.argsort(-values[finite], kind="stable")]
        falling = values[self.order]
        inside = np.flatnonzero(falling[1:] < falling[:-1]) + 1
        self.places = np.r_[0, inside, len(falling)]
        self.levels = np.r_[NEVER, (falling[inside - 1] + falling[inside]) / 2, ALWAYS]
        self.ends = (falling[-1], falling[0]) if len(falling) else (0.0, 0.0)

    def between(self, one: float, other: float, weight: float) -> float:
        """This much of the way between two levels; where one is never or always reached, from the end of the values."""
        if one == other or not weight:
            return one
        first, second = np.clip([one, other], *self.ends)
        return float((1 - weight) * first + weight * second)

    def best(self, change: Array) -> float:
        """The level for which the sum of (n,) changes over all rows that reach it is least."""
        sums = np.concatenate([[0.0], np.cumsum(change[self.order])])[self.places]
        return float(self.levels[sums.argmin()])


def optimal_levels(steps: Steps, known: Known, *, coarse: bool = False) -> Iterator[Levels]:
    """Levels that minimise expected cost plus a price times expected excess, for rising prices.

    Backward induction: after the last tier its answer is weighed against the frontier's cost, at each decision before
    against what going on costs under the levels after it. Expectations are those of the confidences, not of the
    labels: what is searched over should not be noise. Prices reach the convex hull of cost and risk only, so that
    levels between those of neighbouring prices are tried too, unless only a coarse look is wanted.
    """
    unit = float(steps.cost[:, -1].mean()) or 1.0
    prices = unit * np.geomspace(0.3, 3000, PRICES // BETWEEN if coarse else PRICES)
    gates = {gate: _Cuts(belief) for gate, belief in known.belief.items()}
    thresholds = {state: _Cuts(worth) for state, worth in known.worth.items()}
    found = [_at_price(steps, known, gates, thresholds, price) for price in prices]
    seen: set[bytes] = set()
    for first, second in zip(found, found[1:] + found[-1:], strict=True):
        for weight in [0.0] if coarse else (np.arange(BETWEEN) / BETWEEN).tolist():
            levels = Levels(
                {gate: gates[gate].between(of, second.gates[gate], weight) for gate, of in first.gates.items()},
                {
                    state: thresholds[state].between(of, second.thresholds[state], weight)
                    for state, of in first.thresholds.items()
                },
            )
            key = np.round(levels.values, 9).tobytes()
            if key not in seen:
                seen.add(key)
                yield levels


def _at_price(
    steps: Steps, known: Known, gates: Mapping[Gate, _Cuts], thresholds: Mapping[int, _Cuts], price: float
) -> Levels:
    gate: dict[Gate, float] = {}
    threshold: dict[int, float] = {}
    last = len(steps)
    value = dict.fromkeys(steps.before(last), steps.cost[:, -1])
    for place in reversed(range(last)):
        onward, value = value, {}
        for state in steps.before(place):
            after = state | 1 << place
            stop = price * known.excess[after]
            threshold[after] = thresholds[after].best(stop - onward[after])
            accepted = known.worth[after] >= threshold[after]
            call = steps.cost[:, place] + np.where(accepted, stop, onward[after])
            skip = onward[state] if steps.gated else onward[after]
            if steps.gated:
                call = np.where(steps.answered[:, place], call, steps.cost[:, place] + skip)
            call = np.where(steps.allowed[:, place], call, skip)
            if (place, state) in gates:
                gate[place, state] = gates[place, state].best(call - skip)
                call = np.where(known.belief[place, state] >= gate[place, state], call, skip)
            value[state] = call
    # in the order of the ladder, which is that of `Known`
    return Levels({key: gate[key] for key in known.belief}, {key: threshold[key] for key in known.worth})


def joint_levels(known: Known) -> Iterator[Levels]:
    """One level of worth for all steps of a ladder without gates.

    A third of the levels lets through equal shares of the rows, a third equal shares of the excess that the confidences
    expect, and a third resolves the first of these, where promises are made.
    """
    worth = np.column_stack(list(known.worth.values()))
    excess = np.column_stack(list(known.excess.values()))
    best = worth.argmax(axis=1)
    rows = np.arange(len(best))
    highest, expected = worth[rows, best], excess[rows, best]
    order = np.argsort(-highest, kind="stable")
    order = order[np.isfinite(highest[order])]
    if not len(order):
        return
    falling = highest[order]
    values = np.unique(falling)
    # between two values, so that no rounding decides
    between = np.concatenate([[ALWAYS], (values[1:] + values[:-1]) / 2])
    bad = np.cumsum(np.maximum(expected[order], 0.0))
    places = [
        np.linspace(0, len(falling) - 1, LEVELS).astype(np.intp),
        np.searchsorted(bad, np.linspace(0, bad[-1], LEVELS)),
        np.searchsorted(bad, np.linspace(0, min(bad[-1], FIRST * len(best)), LEVELS)),
    ]
    lowest = np.unique(falling[np.concatenate(places).clip(0, len(falling) - 1)])
    for level in between[np.searchsorted(values, lowest)]:
        yield Levels({}, dict.fromkeys(known.worth, float(level)))
