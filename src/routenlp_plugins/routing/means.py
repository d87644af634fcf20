"""The mean quality of each tier on each task, shrunk towards that of all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .examples import Examples, Trainer, log_loss

__all__ = ["TaskMeans"]

STRENGTHS = np.geomspace(1, 1000, 13)


@dataclass(frozen=True, slots=True)
class TaskMeans:
    """(sum of a task + strength * mean of all) / (weight of the task + strength).

    Attributes:
        means: (T + 1, K) of the tasks, and last of all of them, which stands for a task that was never seen.
    """

    means: NDArray[np.float64]

    @classmethod
    def trainers(cls, tasks: int) -> list[Trainer]:
        """One, for T tasks."""
        return [lambda examples: cls.train(examples, tasks)]

    @classmethod
    def train(cls, examples: Examples, tasks: int) -> TaskMeans:
        """The strength is that with the least log loss where each row is left out of its own task's mean.

        Args:
            tasks: T.
        """
        counted = _Counted.of(examples, tasks)
        return cls(counted.shrunk(counted.best_strength(examples)))

    def __call__(self, vectors: NDArray[np.float32], tasks: NDArray[np.intp]) -> NDArray[np.float64]:
        """(n, K) means of the tasks; vectors are not looked at."""
        return self.means[tasks]

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The means."""
        return {"means": self.means}


@dataclass(frozen=True, slots=True)
class _Counted:
    """Weighted sums of what is known.

    Attributes:
        good, weight: (T + 1, K), the last row for rows of no known task.
        overall: (K,) the mean of all, one good and one bad answer added.
    """

    good: NDArray[np.float64]
    weight: NDArray[np.float64]
    overall: NDArray[np.float64]

    @classmethod
    def of(cls, examples: Examples, tasks: int) -> _Counted:
        known = np.isfinite(examples.good)
        # in units of rows, so that a strength is a number of rows
        weights = examples.weights[:, None] / examples.weights.mean() * known
        good, weight = (np.zeros((tasks + 1, examples.good.shape[1])) for _ in range(2))
        np.add.at(good, examples.tasks, weights * np.where(known, examples.good, 0.0))
        np.add.at(weight, examples.tasks, weights)
        return cls(good, weight, (good.sum(axis=0) + 1) / (weight.sum(axis=0) + 2))

    def shrunk(self, strength: float) -> NDArray[np.float64]:
        means = (self.good + strength * self.overall) / (self.weight + strength)
        means[-1] = self.overall
        return means

    def without(self, examples: Examples, strength: float) -> NDArray[np.float64]:
        known = np.isfinite(examples.good)
        own = examples.weights[:, None] / examples.weights.mean() * known
        good = self.good[examples.tasks] - own * np.where(known, examples.good, 0.0)
        weight = self.weight[examples.tasks] - own
        return np.asarray((good + strength * self.overall) / (np.maximum(weight, 0.0) + strength))

    def best_strength(self, examples: Examples) -> float:
        return float(min(STRENGTHS, key=lambda strength: log_loss(self.without(examples, strength), examples)))
