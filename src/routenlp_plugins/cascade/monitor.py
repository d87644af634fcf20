"""Does a certificate still hold? An anytime-valid test that goes on as long as audits come in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

from ..errors import DataError
from .risks import Risk

__all__ = ["Monitor"]

STAKES = 8
LARGEST_STAKE, SMALLEST_STAKE = 0.5, 0.01
"""Of what a row can lose at most, so that no single row ends a bet."""


def _start_share(n: int) -> float:
    """Share of the wealth that starts to bet at row n = 1, 2, ...; they add up to less than 1 over all rows.

    Decreasing like 1 / (n log^2 n): what a late start costs grows with the logarithm of n only.
    """
    return 0.5 / ((n + 1) * log(n + 1) ** 2) * _NORM


_NORM = 1 / 1.06
"""``sum 0.5 / ((n + 1) log^2 (n + 1))`` is 1.0555 over n >= 1: 1.0210 up to 2e6, the rest by its integral."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """Evidence against "the promise is kept" for one task, row by row.

    A mixture, over stakes and over the row from which they are placed, of bets that the excess is above 0. While the
    promise is kept the mixture is a nonnegative supermartingale that starts at 1, so that it ever reaches 1 / delta
    with probability at most delta (Ville 1939). Since a share of the wealth is set aside for every later start, what
    was lost in good weeks does not blind it (mixture e-detector: Shin, Ramdas and Rinaldo 2023; here with a bound on
    the chance of any false alarm instead of their rate).

    Attributes:
        delta: chance of ever crying wolf.
        n: rows seen.
        betting: (STAKES,) wealth that is placed, by stake.
        waiting: wealth set aside for later starts.
        highest: largest e-value so far.
        total: sum of the excess.
    """

    risk: Risk
    delta: float
    n: int = 0
    betting: tuple[float, ...] = (0.0,) * STAKES
    waiting: float = 1.0
    highest: float = 1.0
    total: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise DataError(f"monitor: delta must be strictly between 0 and 1, got {self.delta!r}")

    @property
    def e_value(self) -> float:
        """Wealth of all bets together: how much the rows speak against the promise."""
        return self.waiting + sum(self.betting)

    @property
    def expired(self) -> bool:
        """Whether the promise was found broken; it stays so."""
        return self.highest >= 1 / self.delta

    def update(self, excess: float, weight: float = 1.0) -> Monitor:
        """With one more audited row.

        Args:
            excess: of the policy on this row, as `Risk.excess` defines it.
            weight: smallest propensity of the design over the propensity of this row, in (0, 1].
        """
        if not 0 < weight <= 1:
            raise DataError(f"monitor: weight must be in (0, 1], got {weight!r}")
        n = self.n + 1
        share = min(_start_share(n), self.waiting)
        betting = tuple(
            (wealth + share / STAKES) * (1 + stake * weight * excess)
            for wealth, stake in zip(self.betting, self.stakes, strict=True)
        )
        after = replace(self, n=n, betting=betting, waiting=self.waiting - share, total=self.total + weight * excess)
        return replace(after, highest=max(self.highest, after.e_value))

    @property
    def stakes(self) -> tuple[float, ...]:
        """What is bet on a unit of excess; a row can at most lose `LARGEST_STAKE` of it."""
        ratio = (SMALLEST_STAKE / LARGEST_STAKE) ** (1 / (STAKES - 1))
        return tuple(LARGEST_STAKE * ratio**i / -self.risk.least for i in range(STAKES))
