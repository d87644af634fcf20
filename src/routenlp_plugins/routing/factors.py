"""Matrix factorisation: queries and tiers as factors whose product is the log-odds of a good answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..logistic import log_odds, probability
from .examples import SMALLEST, Examples, Trainer

__all__ = ["MatrixFactorisation"]

PENALTIES = (30.0, 10.0, 3.0)
RANK = 8


@dataclass(frozen=True, slots=True)
class MatrixFactorisation:
    """log-odds of tier k = (features * queries) * tiers_k + intercept_k, as in RouteLLM (Ong et al. 2024).

    Features are the vector and the task.

    Attributes:
        queries: (d + T + 1, r).
        tiers: (K, r).
        intercept: (K,).
    """

    queries: NDArray[np.float64]
    tiers: NDArray[np.float64]
    intercept: NDArray[np.float64]

    @classmethod
    def trainers(cls, tasks: int) -> list[Trainer]:
        """One for each penalty, for T tasks, the stiffest first."""
        return [partial(cls.train, tasks=tasks, penalty=penalty) for penalty in PENALTIES]

    @classmethod
    def train(cls, examples: Examples, tasks: int, penalty: float) -> MatrixFactorisation:
        """By L-BFGS from small random factors."""
        from scipy.optimize import minimize

        x = _features(examples.vectors, examples.tasks, tasks)
        (_, size), count = x.shape, examples.good.shape[1]
        rank = min(RANK, count)
        known = np.isfinite(examples.good)
        good = np.where(known, examples.good, 0.0)
        weights = examples.weights[:, None] / examples.weights.mean() * known
        overall = ((weights * good).sum(axis=0) + 1) / (weights.sum(axis=0) + 2)
        cuts = np.cumsum([size * rank, count * rank])

        def parts(flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
            queries, tiers, intercept = np.split(flat, cuts)
            return queries.reshape(size, rank), tiers.reshape(count, rank), intercept

        def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            queries, tiers, intercept = parts(flat)
            hidden = x @ queries
            odds = hidden @ tiers.T + intercept
            wrong = weights * (probability(odds) - good)
            value = float((weights * (np.logaddexp(0, odds) - good * odds)).sum())
            value += penalty / 2 * float((queries**2).sum() + (tiers**2).sum())
            slopes = (x.T @ (wrong @ tiers) + penalty * queries, wrong.T @ hidden + penalty * tiers, wrong.sum(axis=0))
            return value, np.concatenate([slope.ravel() for slope in slopes])

        rng = np.random.default_rng(0)
        start = np.concatenate([0.1 * rng.normal(size=int(cuts[1])), log_odds(overall, SMALLEST)])
        return cls(*parts(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}).x))

    def __call__(self, vectors: NDArray[np.float32], tasks: NDArray[np.intp]) -> NDArray[np.float64]:
        """(n, K) probabilities."""
        x = _features(vectors, tasks, len(self.queries) - vectors.shape[1] - 1)
        return probability(x @ self.queries @ self.tiers.T + self.intercept)

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Both factors and the intercepts."""
        return {"queries": self.queries, "tiers": self.tiers, "intercept": self.intercept}


def _features(vectors: NDArray[np.float32], tasks: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    """(n, d + T + 1) vectors, and one for the task; a task that was never seen has none."""
    of_task = np.zeros((len(tasks), count + 1))
    seen = tasks < count
    of_task[np.flatnonzero(seen), tasks[seen]] = 1.0
    return np.hstack([vectors.astype(np.float64), of_task])
