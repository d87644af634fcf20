"""The tests on the certification split: each path from its safest policy on, until one fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable
from ..evaluate.units import unit_interval
from .bounds import (
    betting_p_value,
    binomial_p_value,
    binomial_upper_bound,
    fallback,
    fixed_sequence,
    labels_needed,
    labels_needed_for_mean,
)
from .candidate import Candidate
from .certificate import Proof
from .ladders import climb
from .risks import Answered, Retention, Risk, SelectiveViolation
from .search import Path

__all__ = ["Stream", "certify", "method", "p_values"]

BINOMIAL = "exact binomial tests"
BETTING = "betting tests"
PATHS = "in a fixed sequence along paths ordered on a separate split"
TABLE_SHARE = 0.1
"""Share of delta that goes to the task table first, if a tier is safe enough to answer everything."""
BOUND_LEVELS = 250


@dataclass(frozen=True)
class Stream:
    """The certification rows of the tasks that one proof speaks about, in order of a hash of their units.

    Attributes:
        smallest_propensity: that the design gives to any query; None if it gives all the same.
    """

    tables: Mapping[str, TaskTable]
    smallest_propensity: float | None = None

    def __len__(self) -> int:
        return sum(map(len, self.tables.values()))

    @cached_property
    def order(self) -> NDArray[np.intp]:
        """(n,) positions in the concatenated tables."""
        draws = [unit_interval(table.units, 0, f"order of {task}") for task, table in self.tables.items()]
        return np.argsort(np.concatenate(draws), kind="stable")

    def under(self, candidate: Mapping[str, Candidate]) -> Answered:
        """What a policy does on it; a task without a candidate stays on the frontier."""
        parts = [
            Answered.of(table, *(candidate[task].climb(table) if task in candidate else climb(table, ())))
            for task, table in self.tables.items()
        ]
        return Answered.together(parts, self.order)


def certify(
    risk: Risk, streams: Sequence[tuple[Stream, Sequence[Path]]], delta: float
) -> tuple[dict[str, Candidate], tuple[Proof, ...]]:
    """Test each stream's paths, safest first, and keep the cheapest policy that passed.

    delta is shared equally by the streams that have a path and rows enough to pass at all; both are known before any
    quality of the certification split is looked at.

    Args:
        streams: certification rows with the paths found on other rows.

    Returns:
        The candidates that passed, by task, and one proof a stream.
    """
    contenders = _contenders(risk, [len(s) if any(paths) else 0 for s, paths in streams], delta)
    chosen: dict[str, Candidate] = {}
    proofs = []
    for place, (stream, paths) in enumerate(streams):
        share = delta / max(len(contenders), 1)
        if place in contenders:
            candidate, proof = _tested(risk, stream, paths, share)
            chosen.update(candidate)
        else:
            proof = _hopeless(risk, stream, paths, delta / (len(contenders) + 1))
        proofs.append(proof)
    return chosen, tuple(proofs)


def _contenders(risk: Risk, sizes: Sequence[int], delta: float) -> set[int]:
    """The largest set of streams that each have rows enough for their equal share of delta."""
    ranked = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    fits = [m for m, place in enumerate(ranked, start=1) if sizes[place] >= max(risk.fewest_rows(delta / m), 1)]
    return set(ranked[: max(fits, default=0)])


def _hopeless(risk: Risk, stream: Stream, paths: Sequence[Path], share: float) -> Proof:
    """Why a stream is not tested at all."""
    needed = risk.fewest_rows(share)
    tables = stream.tables.values()
    mute = sorted({t for table in tables for t in table.tiers[:-1] if not table.kinds(t)})
    labels: int | None = None
    if not tables:
        labels = needed
        reason = f"there are no certification rows; {needed} are needed"
    elif all(len(table.tiers) < 2 for table in tables):
        reason = "no tier below the frontier has outcomes for it"
    elif len(stream) < needed:
        labels = needed
        reason = (
            f"{len(stream)} certification rows; even a policy without a single bad answer needs {needed} to show "
            f"{risk.claim} at level {share:.4g}"
        )
    else:
        reason = "no policy below the frontier looked cheap and safe enough on the ordering split"
        if mute:
            reason += (
                f"; {', '.join(mute)} came without a confidence or log-probability that tells one answer from another: "
                "have them recorded (logprobs=True); where an answer has none, as tool calls at most endpoints, scores "
                "of your own (ScoredTier) or a second cheap tier that agrees are evidence too"
            )
    length = sum(map(len, paths))
    return Proof(
        tuple(stream.tables),
        "frontier",
        reason,
        len(stream),
        delta=share if length else None,
        candidates=length,
        labels_needed=labels,
    )


def _tested(risk: Risk, stream: Stream, paths: Sequence[Path], share: float) -> tuple[dict[str, Candidate], Proof]:
    paths = [path for path in paths if path]
    shares = [1.0] if len(paths) == 1 else [TABLE_SHARE, 1 - TABLE_SHARE]
    tests = [_Test(risk, stream, path) for path in paths]
    passed = fallback([test.passed for test in tests], shares, share)
    spent = [test.level or 0.0 for test in tests]
    last = [(paths[i][p - 1], i) for i, p in enumerate(passed) if p]
    facts: dict[str, Any] = {
        "candidates": sum(map(len, paths)),
        "tested": sum(min(p + 1, len(path)) for p, path in zip(passed, paths, strict=True)),
    }
    if not last:
        best = min(range(len(paths)), key=lambda i: tests[i].excess_of_first)
        rows = stream.under(paths[best][0].candidates)
        found = f"{risk.estimate(rows):.4f} in {len(stream)} rows"
        reason = f"the safest candidate is at {found}; {risk.claim} is not shown"
        return {}, Proof(
            tuple(stream.tables),
            "frontier",
            reason,
            len(stream),
            estimate=risk.estimate(rows),
            bound=_bound(risk, rows, spent[best], paths[best][0].second_moment, stream.smallest_propensity),
            delta=share,
            labels_needed=_labels_needed(risk, rows, spent[best]),
            **facts,
        )
    point, i = min(last, key=lambda found: found[0].cost)
    rows = stream.under(point.candidates)
    estimate = risk.estimate(rows)
    reason = f"{estimate:.4f} in {len(stream)} rows shows {risk.claim} at level {spent[i]:.4g}"
    return dict(point.candidates), Proof(
        tuple(stream.tables),
        "certified",
        reason,
        len(stream),
        estimate=estimate,
        bound=_bound(risk, rows, spent[i], point.second_moment, stream.smallest_propensity),
        delta=share,
        **facts,
    )


class _Test:
    """A path on its certification rows: each candidate is looked at only if those before it have passed."""

    BATCH = 8

    def __init__(self, risk: Risk, stream: Stream, path: Path) -> None:
        self.risk = risk
        self.stream = stream
        self.path = path
        self.level: float | None = None

    def passed(self, level: float) -> tuple[int, int]:
        """How many candidates pass at this level, and how many there are."""
        self.level = level
        count = 0
        for start in range(0, len(self.path), self.BATCH):
            batch = [self.stream.under(point.candidates) for point in self.path[start : start + self.BATCH]]
            moments = [point.second_moment for point in self.path[start : start + self.BATCH]]
            found = fixed_sequence(p_values(self.risk, batch, level, moments, self.stream.smallest_propensity), level)
            count += found
            if found < len(batch):
                break
        return count, len(self.path)

    @property
    def excess_of_first(self) -> float:
        rows = self.stream.under(self.path[0].candidates)
        return rows.mean(self.risk.excess(rows))


def method(risk: Risk, weighted: bool) -> str:
    """How the policies of a certificate were tested."""
    return f"{BINOMIAL if risk.binomial and not weighted else BETTING} {PATHS}"


def _counts(risk: Risk, rows: Answered, *, weighted: bool) -> tuple[int, int] | None:
    """Violations among how many rows, where that number is binomial: they count the same."""
    if weighted or not risk.binomial:
        return None
    trials = rows.below.sum() if isinstance(risk, SelectiveViolation) else len(rows.weights)
    return int(rows.violation.sum()), int(trials)


def p_values(
    risk: Risk,
    policies: Sequence[Answered],
    delta: float,
    second_moments: Sequence[float] | None = None,
    smallest_propensity: float | None = None,
) -> NDArray[np.float64]:
    """(m,) p-values of "the promise is broken", one a policy, on the same rows.

    Exact binomial where a row counts as a violation or not and the design selects all alike; bets otherwise. With known
    propensities the excess is weighted by their inverse: its expectation among the selected rows has the sign of that
    in the population. The scale comes from the design: one taken from the rows would let the first bets know the last.

    Args:
        smallest_propensity: that the design gives to any query; None if it gives all the same.
    """
    weighted = smallest_propensity is not None
    counts = [found for rows in policies if (found := _counts(risk, rows, weighted=weighted)) is not None]
    if counts:
        return np.array([binomial_p_value(violations, trials, risk.level) for violations, trials in counts])
    scale = policies[0].weights * smallest_propensity if smallest_propensity else 1.0
    excess = np.column_stack([scale * risk.excess(rows) for rows in policies])
    return betting_p_value(excess, risk.largest, delta, second_moments)


def _bound(
    risk: Risk, rows: Answered, delta: float, second_moment: float, smallest_propensity: float | None
) -> float | None:
    """The best level that these rows alone would show at 1 - delta."""
    counts = _counts(risk, rows, weighted=smallest_propensity is not None)
    if counts is not None:
        return binomial_upper_bound(*counts, delta)
    levels = np.linspace(*((0.5, 1.0) if isinstance(risk, Retention) else (0.0, 0.5)), BOUND_LEVELS + 2)[1:-1]
    at = [replace(cast("Any", risk), level=float(level)) for level in levels]
    scale = rows.weights * smallest_propensity if smallest_propensity else 1.0
    excess = np.column_stack([scale * r.excess(rows) for r in at])
    largest = np.array([r.largest for r in at])
    shown = levels[betting_p_value(excess, largest, delta, np.full(len(at), second_moment)) <= delta]
    if not len(shown):
        return None
    return float(shown.max() if isinstance(risk, Retention) else shown.min())


def _labels_needed(risk: Risk, rows: Answered, delta: float) -> int | None:
    if not risk.binomial:
        excess = risk.excess(rows)
        return labels_needed_for_mean(float(excess.mean()), float((excess**2).mean()), delta)
    needed = labels_needed(risk.estimate(rows), risk.level, delta)
    if needed is None or not isinstance(risk, SelectiveViolation):
        return needed
    return ceil(needed / max(rows.mean(rows.below), 1e-9))
