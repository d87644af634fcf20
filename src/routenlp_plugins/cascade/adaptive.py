"""Thresholds that follow the audits: proposals, which mean nothing before they are certified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp

from ..errors import DataError
from ..evidence import log_odds
from ..types import Rung

__all__ = ["AdaptiveLevel", "shifted"]


@dataclass(frozen=True, slots=True)
class AdaptiveLevel:
    """How far, in log-odds, all thresholds of a ladder should move (Gibbs and Candes 2021, equation 2).

    Each audited row moves the level up by `step` times its excess: up after a bad answer, a little down after a good
    one. Over many rows the mean excess at the level of the moment tends to 0, whatever the stream does.

    Attributes:
        step: log-odds a unit of excess.
        floor: it never falls below; 0 are the thresholds that were certified.
    """

    step: float = 0.5
    floor: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise DataError(f"adaptive level: step must be above 0, got {self.step!r}")

    def update(self, excess: float) -> AdaptiveLevel:
        """After one more audited row."""
        return replace(self, shift=max(self.shift + self.step * excess, self.floor))


def shifted(rungs: Sequence[Rung], shift: float) -> tuple[Rung, ...]:
    """The ladder with all its thresholds moved by this much in log-odds.

    A rung that accepts without looking cannot be made stricter: above a shift of 0 its answer is evidence for later
    rungs only, and it is left out where none needs it.
    """
    moved: list[Rung] = []
    for place, rung in enumerate(rungs):
        if rung.threshold is None and shift > 0:
            needed = any(
                rung.tier in confidence.tiers for later in rungs[place + 1 :] for confidence in later.confidences
            )
            moved += [Rung(rung.tier, 1.0)] if needed else []
        elif rung.threshold is None or rung.threshold in (0.0, 1.0):
            moved.append(rung)
        else:
            moved.append(replace(rung, threshold=1 / (1 + exp(-(log_odds(rung.threshold) + shift)))))
    return tuple(moved)
