"""Logistic regression of each tier on the words of a query, with an intercept for each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..logistic import log_odds, logistic_regression, probability
from .examples import SMALLEST, Examples, Trainer
from .means import TaskMeans

__all__ = ["Logistic"]

PENALTIES = (30.0, 10.0, 3.0, 1.0)
"""On the weights of vectors, of length 1 on average."""
FREEDOM = (1.0, 4.0)
"""Scale of the tasks among the features: the larger, the less a task is drawn to the mean of all."""
FEWEST = 10
"""Good answers, and bad ones, without which a tier has its task means only."""


@dataclass(frozen=True, slots=True)
class Logistic:
    """log-odds of tier k = tasks_k of the task + weights_k * vector.

    Attributes:
        tasks: (T + 1, K) intercepts, the last for a task that was never seen.
        weights: (K, d).
    """

    tasks: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def trainers(cls, tasks: int) -> list[Trainer]:
        """One for each penalty and freedom, for T tasks, the stiffest first."""
        return [partial(cls.train, tasks=tasks, penalty=p, freedom=f) for p, f in product(PENALTIES, FREEDOM)]

    @classmethod
    def train(cls, examples: Examples, tasks: int, penalty: float, freedom: float) -> Logistic:
        """One penalty and freedom for all tiers."""
        means = TaskMeans.train(examples, tasks).means
        found = cls(log_odds(means, SMALLEST), np.zeros((means.shape[1], examples.vectors.shape[1])))
        of_task = np.eye(tasks + 1)[examples.tasks] * freedom
        of_task[:, -1] = 0.0
        x = np.hstack([of_task, examples.vectors])
        weights = examples.weights / examples.weights.mean()
        for k in range(examples.good.shape[1]):
            known = np.isfinite(examples.good[:, k])
            good = examples.good[known, k]
            if min(good.sum(), (1 - good).sum()) >= FEWEST:
                coefficients, intercept = logistic_regression(x[known], good, weights[known], penalty)
                found.tasks[:, k] = intercept + freedom * np.append(coefficients[:tasks], 0.0)
                found.weights[k] = coefficients[tasks + 1 :]
        return found

    def __call__(self, vectors: NDArray[np.float32], tasks: NDArray[np.intp]) -> NDArray[np.float64]:
        """(n, K) probabilities."""
        return probability(self.tasks[tasks] + vectors @ self.weights.T)

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Intercepts and weights."""
        return {"tasks": self.tasks, "weights": self.weights}
