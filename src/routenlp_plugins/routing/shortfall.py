"""Matching what a query requires with what tiers are capable of (HyDRA, Garg et al. 2026, equations 3 to 5).

Pure functions: D capabilities, M tiers. Requirements are predicted, in [0, 1]; profiles are the tiers' raw scores in
any unit, put into the band that predictions live in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

__all__ = ["band_weights", "bands_of", "in_bands", "matched", "shortfalls"]

BAND = (5.0, 95.0)
"""Percentiles of the predictions between which profiles are laid."""


def bands_of(required: NDArray[np.float64], percentiles: tuple[float, float] = BAND) -> NDArray[np.float64]:
    """(D, 2) where the (n, D) predicted requirements of held-out queries lie, capability by capability.

    Raises:
        DataError: there is no prediction to go by.
    """
    if required.ndim != 2 or not len(required):
        raise DataError(f"required: expected (n, D) predictions of at least one query, got shape {required.shape}")
    return np.percentile(required, percentiles, axis=0).T


def in_bands(raw: NDArray[np.float64], bands: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M, D) profiles relative to the pool (equation 3): its weakest at the lower end of a band, its best at the upper.

    Where all tiers are equal, all are at the upper end, so that the cheapest will do. The scale is that of the pool: a
    tier that is added or removed may move all others.

    Args:
        raw: (M, D) scores, higher for a more capable tier.
        bands: (D, 2) as of `bands_of`.

    Raises:
        DataError: a score is missing, or shapes do not fit.
    """
    if raw.ndim != 2 or bands.shape != (raw.shape[1], 2):
        raise DataError(f"raw and bands: expected (M, D) and (D, 2), got {raw.shape} and {bands.shape}")
    if not np.isfinite(raw).all():
        tier, capability = np.argwhere(np.isnan(raw) | np.isinf(raw))[0]
        raise DataError(f"raw: tier {tier} has no score for capability {capability}")
    low, width = raw.min(axis=0), np.ptp(raw, axis=0)
    share = np.where(width > 0, (raw - low) / np.where(width > 0, width, 1.0), 1.0)
    return np.asarray(bands[:, 0] + share * (bands[:, 1] - bands[:, 0]))


def band_weights(weights: NDArray[np.float64], bands: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D,) weights over the width of their bands, rescaled to the same sum (equation 4).

    A capability whose predictions hardly differ would otherwise hardly count. One whose band has no width tells
    queries apart in nothing and keeps no weight; if none has any, the weights stay as they are.
    """
    if (weights < 0).any() or not weights.sum() > 0:
        raise DataError(f"weights: expected numbers >= 0, one of them positive, got {weights.tolist()}")
    width = bands[:, 1] - bands[:, 0]
    found = np.where(width > 0, weights / np.where(width > 0, width, 1.0), 0.0)
    return np.asarray(found * weights.sum() / found.sum()) if found.sum() > 0 else weights


def shortfalls(
    required: NDArray[np.float64], profiles: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, M) weighted sum of what each tier lacks (equation 5): more than enough of one makes up for nothing.

    Args:
        required: (n, D).
        profiles: (M, D) as of `in_bands`.
        weights: (D,) as of `band_weights`.
    """
    lacking = np.maximum(required[:, None, :] - profiles[None, :, :], 0.0)
    return np.asarray(lacking @ weights)


def matched(
    shortfall: NDArray[np.float64], cost: NDArray[np.float64], tolerance: float, allowed: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """(n,) the cheapest tier that lacks no more than tolerated; if there is none, the one that lacks least.

    Among equals the cheaper is taken, then the one that lacks less, then the first. So the cost of what is chosen never
    rises with the tolerance.

    Args:
        shortfall: (n, M).
        cost: (n, M) USD, finite.
        allowed: (n, M) what hard gates let through (context window, tools, images, health, allow list). Where they let
            nothing through, -1 is returned: a gate is never overruled.
    """
    enough = allowed & (shortfall <= tolerance)
    first, second = np.where(enough, cost, np.inf), np.where(enough, shortfall, np.inf)
    open_first, open_second = np.where(allowed, shortfall, np.inf), np.where(allowed, cost, np.inf)
    some = np.asarray(enough.any(axis=1))[:, None]
    keys = np.where(some, second, open_second), np.where(some, first, open_first)
    # lexsort is stable, its last key the first to decide
    chosen = np.lexsort(keys, axis=1)[:, 0]
    return np.where(allowed.any(axis=1), chosen, -1)
