"""What routers learn from, as arrays, and how one is judged by rows it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..logistic import cross_entropy

__all__ = [
    "SMALLEST",
    "Examples",
    "Method",
    "Trainer",
    "best",
    "cross_fitted",
    "log_loss",
    "row_losses",
]

SMALLEST = 1e-3
"""Probabilities are kept this far away from 0 and 1: no query is that easy."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Queries and how well K tiers answered them.

    Attributes:
        vectors: (n, d) float32.
        tasks: (n,) places of their tasks in a list of T; T is any other.
        good: (n, K) in [0, 1], NaN where unknown.
        weights: (n,) one over the probability with which the row was selected.
        folds: (n,) number of the fold in which the row's unit is held out.
        cost: (K,) mean USD of a call; tiers are in this order.
        preferences: (m, 3) rows, each with the column of the tier whose answer was preferred, and of the other.
    """

    vectors: NDArray[np.float32]
    tasks: NDArray[np.intp]
    good: NDArray[np.float64]
    weights: NDArray[np.float64]
    folds: NDArray[np.intp]
    cost: NDArray[np.float64]
    preferences: NDArray[np.intp] = field(default_factory=lambda: np.empty((0, 3), dtype=np.intp))

    def __len__(self) -> int:
        return len(self.tasks)

    def take(self, rows: NDArray[np.bool_]) -> Examples:
        """The rows that are marked, and what is preferred among them."""
        kept = self.preferences[rows[self.preferences[:, 0]]]
        place = np.cumsum(rows) - 1
        return replace(
            self,
            vectors=self.vectors[rows],
            tasks=self.tasks[rows],
            good=self.good[rows],
            weights=self.weights[rows],
            folds=self.folds[rows],
            preferences=np.column_stack([place[kept[:, 0]], kept[:, 1:]]),
        )


class Method(Protocol):
    """A trained predictor: frozen arrays."""

    def __call__(self, vectors: NDArray[np.float32], tasks: NDArray[np.intp]) -> NDArray[np.float64]:
        """(n, K) probabilities that an answer is good enough."""
        ...

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """What it is made of, by name: given to its class by keyword, they make it again."""
        ...


Trainer = Callable[[Examples], Method]


def cross_fitted(train: Trainer, examples: Examples) -> NDArray[np.float64]:
    """(n, K) predictions, each by a method that was trained without the row's fold."""
    found = np.full(examples.good.shape, np.nan)
    for fold in np.unique(examples.folds):
        held_out = examples.folds == fold
        method = train(examples.take(~held_out))
        found[held_out] = method(examples.vectors[held_out], examples.tasks[held_out])
    return found


def best(trainers: Sequence[Trainer], examples: Examples) -> tuple[Method, NDArray[np.float64]]:
    """The method with the least cross-validated log loss, and its (n, K) cross-fitted predictions.

    Args:
        trainers: from simple to complex; one is taken over a simpler one only if its loss is lower by more than a
            standard error of the difference.
    """
    chosen, held_out = trainers[0], cross_fitted(trainers[0], examples)
    losses = row_losses(held_out, examples)
    for train in trainers[1:]:
        predicted = cross_fitted(train, examples)
        gain = losses - (new := row_losses(predicted, examples))
        gain = gain[np.isfinite(gain)]
        if gain.mean() > gain.std() / np.sqrt(len(gain)):
            chosen, held_out, losses = train, predicted, new
    return chosen(examples), held_out


def row_losses(predicted: NDArray[np.float64], examples: Examples) -> NDArray[np.float64]:
    """(n,) weighted log loss of each row, in nats, mean over the tiers whose answer is known; NaN without any."""
    losses = cross_entropy(predicted, examples.good, SMALLEST)
    known = np.isfinite(losses)
    counts = known.sum(axis=1)
    total = np.where(known, losses, 0.0).sum(axis=1) * examples.weights / examples.weights.mean()
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def log_loss(predicted: NDArray[np.float64], examples: Examples) -> float:
    """Mean of `row_losses`."""
    return float(np.nanmean(row_losses(predicted, examples)))
