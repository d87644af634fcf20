"""What a release would have done on recorded outcomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .comparing import Comparator
from .errors import DataError, TierError
from .evaluate.outcomes import Outcome, OutcomeRow, Outcomes, outcome_rows
from .evaluate.table import check, cost_of, known_cost, quality_floors
from .evaluate.units import propensity
from .flow import drive, route
from .portfolio import Portfolio
from .release import Release
from .types import Answer, Attempt, Call, Completion

__all__ = ["Replay", "cost_of_attempts", "replay", "replayed"]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a release would have cost and kept on recorded outcomes; ratios are against always-frontier.

    Means and shares are of the traffic: rows are weighted by their inverse propensities.

    Attributes:
        quality: mean over the queries whose routed answer has a known quality; an accepted cheaper answer of
            unknown quality counts as 0.
        quality_ratio: against the frontier on the same queries, whose unknown quality then counts as 1; None if
            the frontier's mean is 0.
        cost_usd: mean USD of a query, all attempts included.
        cost_ratio: None if always-frontier costs nothing.
        violation_rate: share of the queries of tasks with a tau that were answered below the frontier with quality not
            known to reach it; None where no task has one.
    """

    queries: int
    quality: float | None
    quality_ratio: float | None
    cost_usd: float
    cost_ratio: float | None
    tier_share: dict[str, float]
    escalation_rate: float
    violation_rate: float | None
    violation_rate_by_task: dict[str, float]
    certificate: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


def replay(outcomes: Outcomes, release: Release, comparators: Mapping[str, Comparator] | None = None) -> Replay:
    """Run the release's own flow over recorded outcomes.

    Raises:
        DataError: outcomes are malformed, or a query has no outcome of a tier the release would call.
        PortfolioError: the cost of a call is not known.
    """
    rows = outcome_rows(outcomes)
    check(rows, release.portfolio)
    floors = quality_floors(rows, release.portfolio)
    foreseen = release.difficulty([row.seen for row in rows])
    ends = [_end(row, release, comparators, predicted) for row, predicted in zip(rows, foreseen, strict=True)]
    tasks: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    frontier = release.portfolio.frontier
    pairs: list[tuple[float, float, float]] = []
    # rows that were less probable stand for more of the traffic
    weights = [1 / propensity(row) for row in rows]
    for row, (tier, _), weight in zip(rows, ends, weights, strict=True):
        quality, reference = row.outcomes[tier].quality, row.outcomes[frontier].quality
        task = row.query.task or ""
        below, tau = tier != frontier, floors[task]
        if tau is not None:
            tasks[task].append((below and not (quality is not None and quality >= tau), weight))
        if below:
            pairs.append((quality or 0.0, 1.0 if reference is None else reference, weight))
        elif quality is not None:
            pairs.append((quality, quality, weight))
    spent = _mean(
        [cost_of_attempts(row, made, release.portfolio) for row, (_, made) in zip(rows, ends, strict=True)], weights
    )
    always = _mean(
        [cost_of(row.outcomes[frontier], release.portfolio.tier(frontier), row.source) for row in rows], weights
    )
    routed = kept = None
    if pairs:
        qualities, references, of_pairs = zip(*pairs, strict=True)
        routed, kept = _mean(qualities, of_pairs), _mean(references, of_pairs)
    violations = [one for of in tasks.values() for one in of]
    certificate = None if release.policy.void is not None else release.certificate
    return Replay(
        queries=len(rows),
        quality=routed,
        quality_ratio=routed / kept if routed is not None and kept else None,
        cost_usd=spent,
        cost_ratio=spent / always if always else None,
        tier_share={name: _mean([tier == name for tier, _ in ends], weights) for name in release.portfolio.names},
        escalation_rate=_mean([len(made) > 1 for _, made in ends], weights),
        violation_rate=_mean(*zip(*violations, strict=True)) if violations else None,
        violation_rate_by_task={task: _mean(*zip(*of, strict=True)) for task, of in sorted(tasks.items())},
        certificate=None if certificate is None else certificate.as_dict(),
    )


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return float(np.average(values, weights=weights))


def _end(
    row: OutcomeRow,
    release: Release,
    comparators: Mapping[str, Comparator] | None,
    difficulty: Mapping[str, float] | None,
) -> tuple[str, tuple[Attempt, ...]]:
    """The tier that a climb ends at and all attempts; a frontier that had failed ends it without an answer."""
    try:
        answer = replayed(row, release, comparators, difficulty)
    except TierError as error:
        return release.portfolio.frontier, error.attempts
    return answer.tier, answer.trace.attempts


def cost_of_attempts(row: OutcomeRow, attempts: Sequence[Attempt], portfolio: Portfolio) -> float:
    """USD of all attempts, failed ones included where their cost was recorded."""
    return sum(cost_of(row.outcomes[a.tier], portfolio.tier(a.tier), row.source) for a in attempts)


def replayed(
    row: OutcomeRow,
    release: Release,
    comparators: Mapping[str, Comparator] | None = None,
    difficulty: Mapping[str, float] | None = None,
) -> Answer:
    """What a release would have answered, from the recorded outcomes of one query.

    Args:
        difficulty: what its router predicts, where that is known already.

    Raises:
        DataError: there is no outcome of a tier that it calls.
        TierError: the frontier had failed.
    """

    def recorded(call: Call) -> Completion:
        outcome: Outcome | None = row.outcomes.get(call.tier)
        if outcome is None:
            raise DataError(f"{row.source or row.query.id}: no outcome of tier {call.tier!r}, which the release calls")
        if outcome.error is not None:
            raise TierError(outcome.error, call.tier)
        return replace(outcome.completion, cost_usd=known_cost(outcome, release.portfolio.tier(call.tier)))

    if difficulty is None:
        (difficulty,) = release.difficulty([row.seen])
    return drive(route(release.policy, row.seen, comparators, difficulty), recorded)
