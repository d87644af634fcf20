"""Thresholds that follow the audits: proposals, which mean nothing before they are certified."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp

from ..errors import DataError
from ..evidence import log_odds
from ..policy import Rung
from .candidate import Candidate

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


def shifted(candidate: Candidate, shift: float) -> Candidate:
    """With all thresholds and levels moved by this much in log-odds; tolerated losses by it in logarithms.

    Where a climb begins at the best offer, prices fall as tolerated losses do. Else a rung that accepts without looking
    cannot be made stricter: above a shift of 0 its answer is evidence for later rungs only, and it is left out where
    none needs it.
    """
    if candidate.offers:
        return replace(candidate, offers=tuple(replace(o, price=o.price * exp(-shift)) for o in candidate.offers))
    moved: list[Rung] = []
    for place, rung in enumerate(candidate.rungs):
        asked = rung if rung.belief is None else replace(rung, level=_moved(rung, rung.level, shift))
        if rung.threshold is None and shift > 0:
            later = [c for other in candidate.rungs[place + 1 :] for c in other.confidences]
            moved += [replace(asked, threshold=1.0)] if any(rung.tier in c.tiers for c in later) else []
        elif rung.threshold is None or not rung.confidences:
            moved.append(asked)
        else:
            moved.append(replace(asked, threshold=_moved(rung, rung.threshold, shift)))
    return replace(candidate, rungs=tuple(moved))


def _moved(rung: Rung, level: float, shift: float) -> float:
    if rung.lossless is not None:
        loss = rung.lossless - level
        return rung.lossless - loss * exp(-shift if loss > 0 else shift)
    return level if level in (0.0, 1.0) else 1 / (1 + exp(-(log_odds(level) + shift)))
