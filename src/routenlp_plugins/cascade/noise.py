"""Promises about the truth, tested on labels that are not it.

A label is in [0, 1]; of good answers it is a on average, of bad ones b, whatever the query and the tier
(class-conditional noise: Natarajan et al. 2013). Then among any answers ``E[label] = b + (a - b) P(good)``, so that
what is promised of the truth is a promise about means of labels, with a and b in it. Upper bounds of both make it
stricter, never laxer: only where a policy accepts less than alpha of all answers would a larger a help it, and such a
policy breaks no promise. What an answer's label lacks for another reason than noise only makes it stricter too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, log, log1p

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluate.table import TaskTable
from .bounds import LARGEST_STAKE
from .risks import Answered, Retention, Violation

__all__ = ["Noise", "NoisyRetention", "NoisyViolation"]


@dataclass(frozen=True, slots=True)
class Noise:
    """What is known of the labels that stand where quality does.

    Attributes:
        on_good: upper bound of the mean label of answers whose quality reaches tau.
        on_bad: upper bound of the mean label of the others.
        delta: chance that a bound does not hold; it is taken off that of the certificate.
        tau: floor of quality that good and bad were told apart by; None for that of the task.
        tasks: for which this is known; None for all.
        seen: traces of which this was learned: they certify nothing.
    """

    on_good: float
    on_bad: float
    delta: float = 0.0
    tau: float | None = None
    tasks: frozenset[str] | None = None
    seen: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        for name in ("on_good", "on_bad", "delta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise DataError(f"noise: {name} must be in [0, 1], got {value!r}")
        if not self.on_bad < self.on_good:
            raise DataError(
                f"noise: labels that are {self.on_good:g} where answers are good and {self.on_bad:g} where they are "
                "bad tell nothing"
            )

    @property
    def between(self) -> float:
        """How far the labels of good answers are from those of bad ones: Youden's J."""
        return self.on_good - self.on_bad


@dataclass(frozen=True, slots=True)
class NoisyViolation(Violation):
    """`Violation`, with labels in the place of quality; its excess is in their units."""

    noise: Noise
    binomial = False

    @property
    def largest(self) -> float:
        """Of an accepted answer whose label is 0."""
        return self.noise.on_good - self.level * self.noise.between

    @property
    def least(self) -> float:
        """Of an accepted answer whose label is 1, or of one of the frontier."""
        return min(self.noise.on_good - 1, 0.0) - self.level * self.noise.between

    def target(self, table: TaskTable, column: int) -> NDArray[np.float64]:
        """The label."""
        return table.quality[:, column]

    @property
    def lossless(self) -> float:
        """The mean label of good answers."""
        return self.noise.on_good

    def expected_excess(self, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the label is expected to lack."""
        return self.noise.on_good - confidence

    def excess(self, rows: Answered) -> NDArray[np.float64]:
        """What the label of an accepted answer lacks, less what alpha allows."""
        return np.where(rows.below, self.noise.on_good - rows.quality, 0.0) - self.level * self.noise.between

    def estimate(self, rows: Answered) -> float:
        """The violation rate, as far as labels tell."""
        lacking = np.where(rows.below, self.noise.on_good - rows.quality, 0.0)
        return max(rows.mean(lacking) / self.noise.between, 0.0)

    def lost(self, rows: Answered) -> float:
        """The violation rate, as far as labels tell."""
        return self.estimate(rows)

    def fewest_rows(self, delta: float) -> int:
        """As many as bets need that win on every row."""
        return ceil(log(1 / delta) / log1p(LARGEST_STAKE * self.level * self.noise.between / self.largest))


@dataclass(frozen=True, slots=True)
class NoisyRetention(Retention):
    """`Retention` of a quality that is 0 or 1, with labels in its place."""

    noise: Noise

    @property
    def largest(self) -> float:
        """Of a label of 0 where the frontier's is 1."""
        return self.level + (1 - self.level) * self.noise.on_bad

    @property
    def least(self) -> float:
        """Of a label of 1 where the frontier's is 0."""
        return (1 - self.level) * self.noise.on_bad - 1

    def excess(self, rows: Answered) -> NDArray[np.float64]:
        """That of the labels, and what bad answers' labels pretend of it."""
        return self.level * rows.reference - rows.quality + (1 - self.level) * self.noise.on_bad

    def lost(self, rows: Answered) -> float:
        """One less the ratio of the mean qualities, as far as labels tell."""
        kept = rows.mean(rows.reference) - self.noise.on_bad
        return 1 - (rows.mean(rows.quality) - self.noise.on_bad) / kept if kept > 0 else 1.0

    def fewest_rows(self, delta: float) -> int:
        """As many as bets need that win on every row."""
        gain = (1 - self.level) * (1 - self.noise.on_bad)
        return ceil(log(1 / delta) / log1p(LARGEST_STAKE * gain / self.largest))
