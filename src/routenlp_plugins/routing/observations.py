"""What was observed of queries that several tiers have answered, checked, and as the arrays that routers learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluate.units import unit_interval
from .examples import Examples

__all__ = ["Observations"]

FOLDS = 5


@dataclass(frozen=True, slots=True)
class Observations:
    """Queries, and how good the answers of each tier were.

    Attributes:
        texts, tasks: (n,) of the queries.
        good: tier -> (n,) how good its answers were, in [0, 1]; NaN where unknown. Cheapest tier first, dearest last.
        units: (n,) what each query was drawn with, such as a dialogue: held out whole. None: each is its own.
        weights: (n,) one over the probability with which each was selected. None: all alike.
        cost: tier -> mean USD of a call; None counts in equal steps from tier to tier.
        preferences: pairs of answers to one query, (row, preferred tier, other tier).

    Raises:
        DataError: lengths differ, a value is out of range, a tier is unknown or has no outcome at all.
    """

    texts: Sequence[str]
    tasks: Sequence[str]
    good: Mapping[str, Sequence[float] | NDArray[np.float64]]
    units: Sequence[str] | None = None
    weights: Sequence[float] | NDArray[np.float64] | None = None
    cost: Mapping[str, float] | None = None
    preferences: Sequence[tuple[int, str, str]] = ()

    def __post_init__(self) -> None:
        for name, strings in (("texts", self.texts), ("tasks", self.tasks)):
            if isinstance(strings, str) or not all(isinstance(one, str) for one in strings):
                raise DataError(f"{name}: expected a sequence of strings, one for each query")
        n = len(self.texts)
        if not n or not self.good:
            raise DataError("a router needs queries and outcomes of at least one tier, got none")
        given: dict[str, Sized | None] = {
            "tasks": self.tasks,
            "units": self.units,
            "weights": self.weights,
            **self.good,
        }
        for name, of in given.items():
            if of is not None and len(of) != n:
                raise DataError(f"{name}: expected {n} values, one for each text, got {len(of)}")
        columns, tiers = self.columns, list(self.good)
        wrong = ~(np.isnan(columns) | ((columns >= 0) & (columns <= 1)))
        if wrong.any():
            row, k = np.argwhere(wrong)[0]
            raise DataError(f"{tiers[k]}: outcomes are in [0, 1], or NaN, got {columns[row, k]} in row {row}")
        empty = [tier for k, tier in enumerate(tiers) if np.isnan(columns[:, k]).all()]
        if empty:
            raise DataError(f"{empty[0]}: no outcome at all; leave the tier out, it cannot be learned")
        if not (np.isfinite(self.row_weights) & (self.row_weights > 0)).all():
            raise DataError("weights: expected positive numbers")
        if len(set(self._units)) < 2:
            raise DataError("units: a router needs at least two, to be judged by one that it has not seen")
        if not all(cost >= 0 for cost in self._cost):
            raise DataError(f"cost: expected numbers >= 0 of {', '.join(tiers)}, got {self.cost}")
        for row, *pair in self.preferences:
            if not 0 <= row < n or len(set(pair)) < 2 or not set(pair) <= set(tiers):
                raise DataError(f"preferences: expected (row below {n}, tier, other tier), got {(row, *pair)}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The T tasks there are."""
        return tuple(sorted(set(self.tasks)))

    def some(self, most: int, seed: int) -> NDArray[np.intp] | None:
        """Places of at most this many queries, in whole units drawn by their hash; None if there are no more.

        At least two units, and as many as it takes for every tier to have an outcome.
        """
        if len(self.texts) <= most:
            return None
        units = np.array(self._units)
        names, of_row, counts = np.unique(units, return_inverse=True, return_counts=True)
        order = np.argsort(unit_interval(names, seed, "router rows"), kind="stable")
        known = np.isfinite(self.columns)
        for count in range(max(int(np.searchsorted(np.cumsum(counts[order]), most, "right")), 2), len(names)):
            rows = np.flatnonzero(np.isin(of_row, order[:count]))
            if known[rows].any(axis=0).all():
                return rows
        return None

    def _folds(self, seed: int) -> NDArray[np.intp]:
        """(n,) those of the policy search: predictions and confidences hold the same rows out.

        Where so few units leave a fold empty, they are dealt out in turn.
        """
        folds = (unit_interval(self._units, seed, "fold") * FOLDS).astype(np.intp)
        if len(np.unique(folds)) == FOLDS:
            return folds
        names = sorted(set(self._units))
        ranks = np.argsort(np.argsort(unit_interval(names, seed, "fold"), kind="stable"))
        fold = {unit: int(rank) % FOLDS for unit, rank in zip(names, ranks, strict=True)}
        return np.array([fold[unit] for unit in self._units], dtype=np.intp)

    def take(self, rows: NDArray[np.intp]) -> Observations:
        """The queries of these places, and what is preferred among them."""
        place = {int(row): i for i, row in enumerate(rows)}
        return Observations(
            [self.texts[i] for i in rows],
            [self.tasks[i] for i in rows],
            {tier: np.asarray(of, dtype=np.float64)[rows] for tier, of in self.good.items()},
            None if self.units is None else [self.units[i] for i in rows],
            None if self.weights is None else self.row_weights[rows],
            self.cost,
            [(place[row], better, worse) for row, better, worse in self.preferences if row in place],
        )

    def examples(self, vectors: NDArray[np.float32], seed: int) -> Examples:
        """With these (n, d) vectors, in `FOLDS` folds of units drawn by their hash."""
        task = {name: i for i, name in enumerate(self.task_names)}
        tier = {name: k for k, name in enumerate(self.good)}
        pairs = [(row, tier[better], tier[worse]) for row, better, worse in self.preferences]
        return Examples(
            vectors=vectors,
            tasks=np.array([task[name] for name in self.tasks], dtype=np.intp),
            good=self.columns,
            weights=self.row_weights,
            folds=self._folds(seed),
            cost=self._cost,
            preferences=np.array(pairs, dtype=np.intp).reshape(-1, 3),
        )

    @property
    def columns(self) -> NDArray[np.float64]:
        """(n, K) how good the answers were, NaN where unknown."""
        return np.column_stack([np.asarray(of, dtype=np.float64) for of in self.good.values()])

    @property
    def _units(self) -> Sequence[str]:
        return [str(i) for i in range(len(self.texts))] if self.units is None else self.units

    @property
    def row_weights(self) -> NDArray[np.float64]:
        """(n,) weights, 1 where none were given."""
        return np.ones(len(self.texts)) if self.weights is None else np.asarray(self.weights, dtype=np.float64)

    @property
    def _cost(self) -> NDArray[np.float64]:
        if self.cost is None:
            return np.arange(1.0, len(self.good) + 1)
        return np.array([self.cost.get(tier, np.nan) for tier in self.good])
