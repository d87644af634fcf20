"""What one task does, and what a policy did on the rows it was searched on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable
from ..policy import Offer, Policy, RelativeCost, Rung
from .ladders import climb
from .risks import Answered, Risk

__all__ = ["TASK_TABLE", "Candidate", "Found", "Make", "Measured", "margin", "measured", "promise", "signal"]

TASK_TABLE = "task table"
PROVABLE = 1.3
"""Standard errors below 0 at which a candidate can probably be certified with as many rows as order it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one task does: a ladder with its levels.

    Attributes:
        offers, relative_cost: as in `Policy`, for the task.
        family: which family of policies it comes from.
    """

    rungs: tuple[Rung, ...]
    family: str
    offers: tuple[Offer, ...] = ()
    relative_cost: RelativeCost | None = None

    @classmethod
    def of(cls, policy: Policy, task: str) -> Candidate:
        """What a policy does for a task."""
        return cls(policy.ladders[task], "", policy.offers.get(task, ()), policy.relative_cost.get(task))

    @staticmethod
    def policy(policy: Policy, chosen: Mapping[str, Candidate]) -> Policy:
        """The policy with these instead of its own; a task that is not among them stays on the frontier."""
        return replace(
            policy,
            ladders={task: chosen[task].rungs if task in chosen else () for task in policy.ladders},
            offers={task: candidate.offers for task, candidate in chosen.items() if candidate.offers},
            relative_cost={t: c.relative_cost for t, c in chosen.items() if c.relative_cost is not None},
        )

    def climb(self, table: TaskTable) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """(n,) column of the tier that answers each row, and (n,) USD of all attempts."""
        return climb(table, self.rungs, self.offers, self.relative_cost)

    @property
    def predicted(self) -> bool:
        """Whether it looks at what a router predicted."""
        confidences = [c for rung in self.rungs for c in (*rung.confidences, rung.belief) if c is not None]
        return any(c.predicted for c in (*confidences, *(offer.belief for offer in self.offers)))


class Make(Protocol):
    """Task -> what a policy does there."""

    def __call__(self, task: str) -> Candidate:
        """What it does there."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """A policy, and what it did on the ordering rows, cross-fitted.

    Attributes:
        ladder: family and tiers; two policies of one ladder differ in their `levels` only.
        excess, second_moment: mean of the excess over the risk's bound and of its square.
        cost: mean USD of a query.
        make: task -> what it does there.
    """

    ladder: tuple[str, ...]
    levels: NDArray[np.float64]
    excess: float
    second_moment: float
    cost: float
    make: Make

    @property
    def family(self) -> str:
        """The family's name."""
        return self.ladder[0]


def measured(rows: Answered, risk: Risk, ladder: tuple[str, ...], levels: NDArray[np.float64], make: Make) -> Found:
    """A policy by what it did."""
    excess = risk.excess(rows)
    return Found(ladder, levels, rows.mean(excess), rows.mean(excess**2), rows.mean(rows.cost), make)


def margin(risk: Risk) -> float:
    """Estimated excess above which a candidate would hardly ever pass."""
    return 0.25 * min(1 - risk.level, risk.level)


class Measured(Protocol):
    """A policy by what it did."""

    @property
    def excess(self) -> float:
        """Mean excess."""
        ...

    @property
    def second_moment(self) -> float:
        """Mean of the squared excess."""
        ...

    @property
    def cost(self) -> float:
        """Mean USD of a query."""
        ...


def signal(policy: Measured) -> float:
    """Mean excess in standard deviations: the lower it is, the fewer rows prove that the mean is below 0."""
    return policy.excess / sqrt(max(policy.second_moment, 1e-12))


def promise(policies: Sequence[Measured], n: int) -> tuple[float, float]:
    """The least cost that can probably be certified with n rows; where none can, the least signal."""
    signals = [signal(policy) for policy in policies]
    provable = -PROVABLE / sqrt(n)
    costs = [policy.cost for policy, found in zip(policies, signals, strict=True) if found <= provable]
    return min(costs, default=inf), min(signals)
