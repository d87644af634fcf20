"""Curves of cost against quality, what they reach, and whether one method reaches it for less than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

TARGETS = (0.95, 0.97, 0.99)
Array = NDArray[np.float64]
Curve = Array
"""(L, 2): share of the frontier's cost, and of its quality."""


@dataclass(frozen=True)
class Routed:
    """What L policies of a method do on n queries.

    Attributes:
        cost, quality: (L, n); the frontier's are (n,).
        mixed: whether a mixture of two policies is one too.
    """

    cost: Array
    quality: Array
    frontier_cost: Array
    frontier_quality: Array
    mixed: bool = True

    @property
    def curve(self) -> Curve:
        whole: Curve = self.weighted(np.ones((1, len(self.frontier_cost))))[0]
        return whole

    def weighted(self, weights: Array) -> Array:
        """(B, L, 2) curves with each query counted as often as one of (B, n) weights says."""
        shares = [
            (weights @ of.T) / (weights @ frontier)[:, None]
            for of, frontier in ((self.cost, self.frontier_cost), (self.quality, self.frontier_quality))
        ]
        return np.stack(shares, axis=2)


def hull_cost(curve: Curve, target: float, *, mixed: bool = True) -> float:
    """The least cost at which the curve, or a mixture of two of its points and the frontier alone, has this quality."""
    points = np.vstack([curve, np.ones(2)])
    above, below = points[points[:, 1] >= target], points[points[:, 1] < target]
    best = above[:, 0].min()
    if mixed and len(below):
        share = (target - below[:, None, 1]) / (above[None, :, 1] - below[:, None, 1])
        best = min(best, ((1 - share) * below[:, None, 0] + share * above[None, :, 0]).min())
    return float(best)


def aimed(on_fit: Curve, on_test: Curve, target: float) -> list[float]:
    """Cost and quality of the cheapest policy that reaches the target where it was learned; else the frontier's."""
    good = np.flatnonzero(on_fit[:, 1] >= target)
    cost, quality = on_test[good[on_fit[good, 0].argmin()]] if len(good) else np.ones(2)
    return [float(cost), float(quality)]


def bootstrapped(mine: Routed, other: Routed, target: float, draws: int = 200) -> list[float]:
    """95 % interval of the difference of hindsight costs, queries drawn with replacement, the same for both."""
    n = len(mine.frontier_cost)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    own, others = (
        np.array([hull_cost(curve, target, mixed=of.mixed) for curve in of.weighted(weights)]) for of in (mine, other)
    )
    interval: list[float] = np.quantile(own - others, [0.025, 0.975]).round(4).tolist()
    return interval


def corrected_p_values(differences: Array) -> tuple[float, float]:
    """P-values of "not below 0" and "not above 0" for differences over J random halves.

    Halves overlap, so that the variance of their mean is taken as (1 / J + n_test / n_fit) of theirs (Nadeau and
    Bengio 2003); here n_test = n_fit.
    """
    count, spread = len(differences), differences.std(ddof=1)
    if spread == 0:
        return (1.0, 1.0) if differences.mean() == 0 else (float(differences.mean() > 0), float(differences.mean() < 0))
    t = differences.mean() / (spread * np.sqrt(1 / count + 1))
    return float(stats.t.cdf(t, count - 1)), float(stats.t.sf(t, count - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted for all of them together (Holm 1979)."""
    names = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(names):
        largest = max(largest, min((len(names) - rank) * p_values[name], 1.0))
        adjusted[name] = largest
    return adjusted


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
