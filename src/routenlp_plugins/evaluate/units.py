"""What is drawn from the population (queries or groups), how it was selected, and which part of a fit it is for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .outcomes import OutcomeRow

__all__ = ["Split", "check_design", "one_row_per_unit", "propensity", "split", "unit_interval"]


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of the units that order candidates, and that report cost; the rest certifies."""

    ordering: float = 0.4
    reporting: float = 0.1

    def __post_init__(self) -> None:
        for share in (self.ordering, self.reporting):
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise DataError(f"split: shares must be numbers, got {share!r}")
        if not (0 < self.ordering < 1 and 0 <= self.reporting < 1 and self.ordering + self.reporting < 1):
            raise DataError(
                f"split: ordering and reporting must be shares that leave rows to certify with, got {self.ordering!r} "
                f"and {self.reporting!r}"
            )

    @property
    def certification(self) -> float:
        """Share of the units that certify."""
        return 1 - self.ordering - self.reporting


def split(rows: Sequence[OutcomeRow], shares: Split, seed: int, *, pooled: bool = False) -> dict[str, list[OutcomeRow]]:
    """Ordering, certification and reporting part: these shares of each task's units, in order of their hash.

    A group that has rows in several tasks is in one part, by its first task.

    Args:
        pooled: shares of all units instead: of a stream of tasks it is drawn too which task comes next.
    """
    parts: dict[str, list[OutcomeRow]] = {"ordering": [], "certification": [], "reporting": []}
    of: dict[str, str] = {}
    for _, members in sorted(_strata(rows, pooled=pooled).items()):
        draws = unit_interval(members, seed, "split")
        for rank, place in enumerate(np.argsort(draws, kind="stable")):
            share = (rank + 0.5) / len(members)
            beyond = "certification" if share < 1 - shares.reporting else "reporting"
            of.setdefault(members[place], "ordering" if share < shares.ordering else beyond)
    for row in rows:
        parts[of[row.unit]].append(row)
    return parts


def _strata(rows: Sequence[OutcomeRow], *, pooled: bool) -> dict[str, list[str]]:
    """The units of each task, or all of them."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found["" if pooled else row.query.task or ""].add(row.unit)
    return {task: sorted(units) for task, units in found.items()}


def unit_interval(names: Sequence[str] | NDArray[np.str_], seed: int, purpose: str) -> NDArray[np.float64]:
    """(n,) values in [0, 1), the same for the same name, seed and purpose on every machine.

    What serves two purposes must not be drawn from the same values: the folds of a split would be cut by the split.
    """
    digests = [sha256(f"{purpose}:{seed}:{name}".encode()).digest()[:8] for name in names]
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.float64) / 2.0**64


def check_design(rows: Sequence[OutcomeRow], smallest: float | None) -> None:
    """Refuse rows whose selection for labelling is not described well enough to speak of those not selected.

    Args:
        smallest: propensity that the design gives to any query; None if it gives all the same.

    Raises:
        DataError: propensities differ and no smallest is declared, one is below it, or rows of groups carry any.
    """
    if smallest is not None and (isinstance(smallest, bool) or not 0 < smallest <= 1):
        raise DataError(f"smallest_propensity must be in (0, 1], got {smallest!r}")
    found = sorted({propensity(row) for row in rows})
    if smallest is None and len(found) > 1:
        raise DataError(
            f"propensity: rows were selected with different probabilities ({found[0]:g} to {found[-1]:g}); declare "
            "FitOptions(smallest_propensity=...), or --smallest-propensity, the smallest that your design gives to any "
            "query, selected or not"
        )
    if smallest is not None and found[0] < smallest:
        least = min(rows, key=propensity)
        raise DataError(f"{least.source}: propensity {found[0]:g} is below the smallest of the design, {smallest:g}")
    if any(row.group is not None and not row.whole_groups for row in rows) and found != [1.0]:
        raise DataError(
            "propensity: it is the chance of a row, and these rows carry groups, whose chance depends on their size; "
            "label whole groups that are drawn alike, and leave propensity out"
        )


def propensity(row: OutcomeRow) -> float:
    """The chance with which the row was selected for labelling."""
    return 1.0 if row.propensity is None else row.propensity


def one_row_per_unit(rows: Sequence[OutcomeRow], seed: int, *, pooled: bool) -> list[OutcomeRow]:
    """One row of each unit, drawn by hash: rows of a group are not independent, groups are.

    Args:
        pooled: one over all tasks, for a stream of them, instead of one for each task.
    """
    draws = unit_interval([f"{row.unit}#{row.query.id}" for row in rows], seed, "row of unit")
    first: dict[tuple[str | None, str], int] = {}
    for place in np.argsort(draws, kind="stable"):
        first.setdefault((None if pooled else rows[place].query.task, rows[place].unit), int(place))
    return [rows[place] for place in sorted(first.values())]
