"""The mean quality of each tier on the queries nearest to a query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoders import of_length_one
from .examples import Examples, Trainer

__all__ = ["NearestNeighbours"]

COUNTS = (160, 80, 40, 20, 10)
PRIOR = 5.0
"""Neighbours that the mean of all counts as."""
BATCH = 1024


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """By the angle between vectors; where a tier's answer to a neighbour is unknown, the neighbour does not count.

    Attributes:
        vectors: (m, d) float32, of length 1.
        good: (m, K) times `weights`; 0 where unknown.
        weights: (m, K); 0 where unknown.
        overall: (K,) mean of all.
        count: (1,) neighbours that are asked.
    """

    vectors: NDArray[np.float32]
    good: NDArray[np.float64]
    weights: NDArray[np.float64]
    overall: NDArray[np.float64]
    count: NDArray[np.int64]

    @classmethod
    def trainers(cls, tasks: int) -> list[Trainer]:
        """One for each number of neighbours, the smoothest first."""
        return [partial(cls.train, count=count) for count in COUNTS]

    @classmethod
    def train(cls, examples: Examples, count: int) -> NearestNeighbours:
        """Keep the examples."""
        known = np.isfinite(examples.good)
        weights = examples.weights[:, None] / examples.weights.mean() * known
        good = np.where(known, examples.good, 0.0) * weights
        overall = (good.sum(axis=0) + 1) / (weights.sum(axis=0) + 2)
        return cls(of_length_one(examples.vectors), good, weights, overall, np.array([count]))

    def __call__(self, vectors: NDArray[np.float32], tasks: NDArray[np.intp]) -> NDArray[np.float64]:
        """(n, K) means of the neighbours; tasks are not looked at."""
        found = np.empty((len(vectors), len(self.overall)))
        count = min(int(self.count[0]), len(self.vectors))
        for start in range(0, len(vectors), BATCH):
            likeness = of_length_one(vectors[start : start + BATCH]) @ self.vectors.T
            nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
            good, weights = self.good[nearest].sum(axis=1), self.weights[nearest].sum(axis=1)
            found[start : start + BATCH] = (good + PRIOR * self.overall) / (weights + PRIOR)
        return found

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All that was seen."""
        return {
            "vectors": self.vectors,
            "good": self.good,
            "weights": self.weights,
            "overall": self.overall,
            "count": self.count,
        }
