"""What a policy may not exceed, row by row: each risk is the mean of an excess that must not be above 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil, log, log1p, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluate.table import TaskTable
from .bounds import LARGEST_STAKE, smallest_sample

__all__ = ["Answered", "Retention", "Risk", "SelectiveViolation", "Violation", "risk_of"]


@dataclass(frozen=True, slots=True)
class Answered:
    """What a policy did on n rows; what is unknown counts as the worst case.

    Attributes:
        below: (n,) whether a tier below the frontier answered.
        good: (n,) whether the answer is known to reach tau; False without a tau.
        quality: (n,) of the answer, an unknown one 0.
        reference: (n,) of the frontier's answer, an unknown one 1 where another tier answered.
        cost, always: (n,) USD of the policy, and of the frontier alone.
        weights: (n,) one over the probability of having been labelled.
    """

    below: NDArray[np.bool_]
    good: NDArray[np.bool_]
    quality: NDArray[np.float64]
    reference: NDArray[np.float64]
    cost: NDArray[np.float64]
    always: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, table: TaskTable, column: NDArray[np.intp], cost: NDArray[np.float64]) -> Answered:
        """The policy that returns the answers of these (n,) columns for these (n,) USD."""
        rows, last = np.arange(len(table)), len(table.tiers) - 1
        known, frontier = table.quality[rows, column], table.quality[:, -1]
        return cls.seen(column < last, known, frontier, table.tau, cost, table.cost[:, -1], table.weights)

    @classmethod
    def seen(
        cls,
        below: NDArray[np.bool_],
        quality: NDArray[np.float64],
        frontier: NDArray[np.float64],
        tau: NDArray[np.float64] | float,
        cost: NDArray[np.float64],
        always: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> Answered:
        """From (n,) qualities of the answers and of the frontier's, and tau, NaN where they are unknown."""
        known = np.where(np.isnan(quality), 0.0, quality)
        return cls(
            below=below,
            good=quality >= tau,
            quality=known,
            reference=np.where(below, np.where(np.isnan(frontier), 1.0, frontier), known),
            cost=cost,
            always=always,
            weights=weights,
        )

    @classmethod
    def together(cls, parts: Sequence[Answered], order: NDArray[np.intp]) -> Answered:
        """Several tasks as one stream, its rows in this order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts])[order] for f in fields(cls)))

    @property
    def violation(self) -> NDArray[np.bool_]:
        """(n,) whether the answer came from below the frontier and is not known to reach tau."""
        return self.below & ~self.good

    def mean(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
        """Mean over the population that the rows were selected from."""
        return float(values @ self.weights / self.weights.sum()) if len(values) else 0.0

    @property
    def cost_ratio(self) -> float:
        """Mean cost against always-frontier; 1 where that is free."""
        always = self.mean(self.always)
        return self.mean(self.cost) / always if always else 1.0

    @property
    def cost_interval(self) -> tuple[float, float] | None:
        """Of the cost ratio at 95 %: asymptotic (delta method for a ratio of means); None with fewer than two rows."""
        n, always = len(self.cost), self.mean(self.always)
        if n < 2 or not always:
            return None
        share = self.weights / self.weights.mean()
        deviations = share * (self.cost - self.cost_ratio * self.always) / always
        half = 1.96 * float(deviations.std(ddof=1)) / sqrt(n)
        return max(self.cost_ratio - half, 0.0), self.cost_ratio + half


class Risk(Protocol):
    """A promise about a policy, as ``E[excess] <= 0`` over the queries of a task."""

    @property
    def level(self) -> float:
        """The bound that is promised: alpha or rho."""
        ...

    @property
    def claim(self) -> str:
        """The promise, in words."""
        ...

    @property
    def kind(self) -> str:
        """Its name in a certificate."""
        ...

    @property
    def binomial(self) -> bool:
        """Whether a row breaks it or not, so that their number is binomial."""
        ...

    @property
    def largest(self) -> float:
        """The largest excess of a row."""
        ...

    @property
    def least(self) -> float:
        """The least excess of a row."""
        ...

    @property
    def lossless(self) -> float:
        """The confidence at which nothing is expected to be lost."""
        ...

    def target(self, table: TaskTable, column: int) -> NDArray[np.float64]:
        """(n,) in [0, 1]: what the confidence in a tier's answer estimates; NaN where it is unknown."""
        ...

    def expected_excess(self, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """Expected excess of an answer of this confidence, less that of the frontier's."""
        ...

    def excess(self, rows: Answered) -> NDArray[np.float64]:
        """(n,) of each row."""
        ...

    def estimate(self, rows: Answered) -> float:
        """What is promised to be within the level, as it is among these rows."""
        ...

    def lost(self, rows: Answered) -> float:
        """Share of the quality that is given up: a saving has to be larger."""
        ...

    def fewest_rows(self, delta: float) -> int:
        """With fewer rows even a flawless policy cannot pass at level delta."""
        ...


@dataclass(frozen=True, slots=True)
class Violation:
    """P(answer accepted below the frontier and its quality < tau) <= alpha: the joint risk of RouteNLP."""

    level: float
    kind = "violation"
    binomial = True

    def __post_init__(self) -> None:
        _check("alpha", self.level)

    @property
    def claim(self) -> str:
        """The promise, in words."""
        return f"P(answer accepted below the frontier and its quality < tau) <= {self.level:g}"

    @property
    def largest(self) -> float:
        """An accepted bad answer exceeds by 1 - alpha."""
        return 1 - self.level

    @property
    def least(self) -> float:
        """Any other answer by -alpha."""
        return -self.level

    def target(self, table: TaskTable, column: int) -> NDArray[np.float64]:
        """1 where quality reaches tau."""
        return table.good[:, column]

    @property
    def lossless(self) -> float:
        """1: an answer that is surely good."""
        return 1.0

    def expected_excess(self, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """One less the confidence."""
        return 1 - confidence

    def excess(self, rows: Answered) -> NDArray[np.float64]:
        """The violation less alpha."""
        return np.asarray(rows.violation - self.level, dtype=np.float64)

    def estimate(self, rows: Answered) -> float:
        """The violation rate."""
        return rows.mean(rows.violation)

    def lost(self, rows: Answered) -> float:
        """The violation rate."""
        return rows.mean(rows.violation)

    def fewest_rows(self, delta: float) -> int:
        """As many as exclude alpha without any violation."""
        return smallest_sample(self.level, delta)


@dataclass(frozen=True, slots=True)
class SelectiveViolation(Violation):
    """P(quality < tau | answer accepted below the frontier) <= alpha: selective risk (Geifman and El-Yaniv 2017)."""

    kind = "selective violation"

    @property
    def claim(self) -> str:
        """The promise, in words."""
        return f"P(quality < tau, given that the answer was accepted below the frontier) <= {self.level:g}"

    @property
    def lossless(self) -> float:
        """1 - alpha: the promise allows that share of bad answers."""
        return 1 - self.level

    def expected_excess(self, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """One less the confidence, less alpha."""
        return 1 - confidence - self.level

    def excess(self, rows: Answered) -> NDArray[np.float64]:
        """The violation less alpha where a tier below the frontier answers, else 0."""
        return np.where(rows.below, rows.violation - self.level, 0.0)

    def estimate(self, rows: Answered) -> float:
        """The violation rate among the accepted answers, 0 if there are none."""
        accepted = rows.mean(rows.below)
        return rows.mean(rows.violation) / accepted if accepted else 0.0


@dataclass(frozen=True, slots=True)
class Retention:
    """E[quality of the routed answers] >= rho * E[quality of the frontier's answers], on the same queries."""

    level: float
    kind = "retention"
    binomial = False

    def __post_init__(self) -> None:
        _check("retention", self.level)

    @property
    def claim(self) -> str:
        """The promise, in words."""
        return f"E[quality of the routed answers] >= {self.level:g} E[quality of the frontier's answers]"

    @property
    def largest(self) -> float:
        """The loss of an answer that the frontier had right."""
        return self.level

    @property
    def least(self) -> float:
        """The gain of an answer that the frontier had wrong."""
        return -1.0

    def target(self, table: TaskTable, column: int) -> NDArray[np.float64]:
        """``(1 + q - q_frontier) / 2``: above one half, the answer is expected to be better than the frontier's."""
        return (1 + table.quality[:, column] - table.quality[:, -1]) / 2

    @property
    def lossless(self) -> float:
        """One half: as good as the frontier's answer."""
        return 0.5

    def expected_excess(self, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """Minus the expected gain over the frontier."""
        return 1 - 2 * confidence

    def excess(self, rows: Answered) -> NDArray[np.float64]:
        """``rho q_frontier - q``: X of the betting test is ``(rho - excess) / (1 + rho)``, in [0, 1]."""
        return self.level * rows.reference - rows.quality

    def estimate(self, rows: Answered) -> float:
        """Ratio of the mean qualities; 1 where the frontier's is 0."""
        return 1 - self.lost(rows)

    def lost(self, rows: Answered) -> float:
        """One less the ratio of the mean qualities."""
        kept = rows.mean(rows.reference)
        return 1 - rows.mean(rows.quality) / kept if kept else 0.0

    def fewest_rows(self, delta: float) -> int:
        """As many as bets need that win on every row."""
        return ceil(log(1 / delta) / log1p(LARGEST_STAKE * (1 - self.level) / self.level))


def risk_of(kind: str, level: float) -> Risk:
    """The risk of that name.

    Raises:
        DataError: there is none.
    """
    known: dict[str, type[Violation] | type[Retention]] = {
        cls.kind: cls for cls in (Violation, SelectiveViolation, Retention)
    }
    if kind not in known:
        raise DataError(f"risk {kind!r} is unknown; known: {', '.join(known)}")
    return known[kind](level)


def _check(name: str, level: float) -> None:
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise DataError(f"{name} must be strictly between 0 and 1, got {level!r}")
