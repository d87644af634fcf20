"""What a query requires, capability by capability (HyDRA, Garg et al. 2026): sigmoid heads on its words and task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..arrays import read_arrays, write_arrays
from ..errors import DataError, PortfolioError, ReleaseError
from ..logistic import logistic_regression, probability
from ..portfolio import Portfolio
from .difficulty import DifficultyRouter, TrainingOptions
from .encoders import Encoder
from .observations import Observations
from .shortfall import band_weights, bands_of, in_bands, shortfalls

__all__ = ["CapabilityHeads", "profiles_of", "requirements"]

FORMAT = "routenlp capability heads 1"


@dataclass(frozen=True, slots=True)
class CapabilityHeads:
    """Predicts how much of each capability a query requires, and what a tier that lacks some of it is worth.

    Attributes:
        predictor: D columns, one for each capability.
        bands: (D, 2) where the predictions for held-out queries lie.
        curve: P(good enough) = 1 / (1 + exp(curve[1] * shortfall - curve[0])), one curve for all tiers; None where the
            heads were taught by labels, without outcomes.
    """

    predictor: DifficultyRouter
    bands: NDArray[np.float64]
    curve: tuple[float, float] | None = None

    @property
    def capabilities(self) -> tuple[str, ...]:
        """D names."""
        return self.predictor.tiers

    @property
    def digest(self) -> str:
        """Of all that decides; a certificate speaks of these heads and no others."""
        own = f"{self.predictor.digest} {np.ascontiguousarray(self.bands).tobytes().hex()} {self.curve}"
        return sha256(own.encode()).hexdigest()

    @classmethod
    def from_labels(cls, required: Observations, options: TrainingOptions | None = None) -> CapabilityHeads:
        """Learn from labels, such as those of a judge: columns are capabilities, values how much is required."""
        trained = DifficultyRouter.train(required, options)
        return cls(trained.router, bands_of(trained.held_out))

    @classmethod
    def from_outcomes(
        cls, observed: Observations, portfolio: Portfolio, options: TrainingOptions | None = None
    ) -> CapabilityHeads:
        """Learn from outcomes of tiers that have profiles: what was required is what the least capable good one has.

        Tasks of the portfolio say which capabilities they call for; one that does not say so calls for all.

        Raises:
            PortfolioError: a tier with outcomes has no profile, or an incomplete one.
            DataError: every answer was as good as any other.
        """
        capabilities, good = portfolio.capabilities, observed.columns
        strangers = [tier for tier in observed.good if tier not in portfolio.names]
        if strangers:
            raise PortfolioError(
                f"tier {strangers[0]!r} has outcomes and is not in the portfolio; its tiers: "
                f"{', '.join(portfolio.names)}"
            )
        raw = profiles_of(portfolio, tuple(observed.good), capabilities)
        if not np.ptp(raw, axis=0).any():
            raise PortfolioError("profile: all tiers with outcomes have the same; nothing tells them apart")
        known = np.isfinite(good)
        if np.ptp(good[known]) == 0:
            raise DataError("outcomes: every answer was as good as any other; there is nothing to tell tiers apart by")
        calls_for = {task: portfolio.called_for(task) for task in observed.task_names}
        called = np.array([[c in calls_for[task] for c in capabilities] for task in observed.tasks])
        labels = requirements(good, raw, called)
        told = replace(observed, good={c: labels[:, d] for d, c in enumerate(capabilities)}, cost=None, preferences=())
        trained = DifficultyRouter.train(told, options)
        bands = bands_of(trained.held_out)
        lacking = shortfalls(trained.held_out, in_bands(raw, bands), band_weights(np.ones(len(capabilities)), bands))
        of_pair = np.broadcast_to(observed.row_weights[:, None], good.shape)[known]
        slope, intercept = logistic_regression(-lacking[known][:, None], good[known], of_pair / of_pair.mean(), 1.0)
        return cls(trained.router, bands, (intercept, float(slope[0])))

    def __call__(self, texts: Sequence[str], tasks: Sequence[str | None]) -> NDArray[np.float64]:
        """(n, D) how much of each capability is required, in [0, 1]."""
        return self.predictor(texts, tasks)

    def good_enough(self, shortfall: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, M) probabilities that tiers are good enough which lack that much.

        Raises:
            DataError: the heads were taught by labels, without outcomes.
        """
        if self.curve is None:
            raise DataError("the heads were taught by labels, and nothing is known of how good answers were")
        return probability(self.curve[0] - self.curve[1] * shortfall)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; an existing file is never touched. The encoder is named, not written.

        Raises:
            ReleaseError: there is something at `path` already.
        """
        facts, arrays = self.predictor.parts()
        curve = json.dumps(self.curve)
        return write_arrays(path, {**facts, "format": FORMAT, "curve": curve}, {**arrays, "bands": self.bands})

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder | None = None) -> CapabilityHeads:
        """Read what `save` wrote.

        Args:
            encoder: the one it was trained with; the default one may be left out.

        Raises:
            ReleaseError: the file is missing, truncated, edited or something else, or names another encoder.
        """
        facts, arrays = read_arrays(path, FORMAT)
        try:
            bands, curve = arrays.pop("bands"), json.loads(facts.pop("curve"))
            predictor = DifficultyRouter.of_parts(path, facts, arrays, encoder)
            return cls(predictor, bands, None if curve is None else (float(curve[0]), float(curve[1])))
        except (KeyError, TypeError, ValueError) as error:
            raise ReleaseError(f"{path}: not a saved file of capability heads ({error})") from None


def requirements(good: NDArray[np.float64], raw: NDArray[np.float64], called: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n, D) how much was required: the profile of the least capable tier that was good, 0 being the pool's weakest.

    Where no tier was good, a more capable one adds nothing, and nothing is required. Of graded outcomes it is the
    expectation, taken as independent from tier to tier.

    Args:
        good: (n, M) in [0, 1], NaN where unknown: such a tier is passed over.
        raw: (M, D) profiles.
        called: (n, D) whether the task calls for the capability; nothing is required of one that it does not.
    """
    known = np.nan_to_num(good)
    width = np.ptp(raw, axis=0)
    place = (raw - raw.min(axis=0)) / np.where(width > 0, width, 1.0)
    found = np.empty(called.shape)
    for d in range(raw.shape[1]):
        order = np.argsort(place[:, d], kind="stable")
        first = known[:, order]
        first[:, 1:] *= np.cumprod(1 - known[:, order], axis=1)[:, :-1]
        found[:, d] = np.clip(first @ place[order, d], 0.0, 1.0)
    found[~called] = 0.0
    found[~np.isfinite(good).any(axis=1)] = np.nan
    return found


def profiles_of(portfolio: Portfolio, tiers: Sequence[str], capabilities: Sequence[str]) -> NDArray[np.float64]:
    """(M, D) raw profiles of these tiers.

    Raises:
        PortfolioError: the profile of a tier lacks a capability.
    """
    profiles: list[Mapping[str, float]] = [portfolio.tier(tier).profile for tier in tiers]
    for tier, profile in zip(tiers, profiles, strict=True):
        missing = [name for name in capabilities if name not in profile]
        if missing:
            raise PortfolioError(
                f"tier {tier!r}: its profile has no score for {', '.join(missing)}; give one for each of "
                f"{', '.join(capabilities)}"
            )
    return np.array([[profile[name] for name in capabilities] for profile in profiles], dtype=np.float64)
