"""From outcomes to a release, and back: what a release would have done on outcomes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from .cascade.certificate import RISK, RISK_OF_GROUPS, Certificate, certify
from .cascade.search import Candidate, candidate_path
from .errors import DataError, RiskNotControlledError, TierError
from .evaluate.outcomes import Outcome, OutcomeRow, Paths, read_outcomes
from .evaluate.table import TaskTable, cost_of, data_hash, split, task_tables
from .flow import drive, route
from .portfolio import Portfolio
from .release import Release
from .types import Answer, Call, Completion, Policy

__all__ = ["Outcomes", "Replay", "fit", "replay"]

Outcomes = Paths | Sequence[OutcomeRow]
"""Paths of outcome files, or rows already read."""


def fit(
    outcomes: Outcomes,
    portfolio: Portfolio | str | Path,
    *,
    alpha: float,
    delta: float = 0.1,
    seed: int = 0,
    ordering_share: float = 0.4,
) -> Release:
    """Find, for every task, the cheapest policy whose risk is shown to be at most alpha.

    The population is what the outcomes were drawn from: queries, or groups where rows carry one. A share of the
    units orders candidate policies from safe to cheap; the rest tests them end to end in that order
    (`routenlp_plugins.cascade`). Tasks for which none passes stay on the frontier.

    Args:
        outcomes: paths of outcome files, or rows.
        portfolio: a portfolio, or the path of its YAML file.
        alpha: for every task, P(answer accepted below the frontier and its quality < tau) <= alpha ...
        delta: ... for all tasks simultaneously, with probability at least 1 - delta.
        seed: of the split.
        ordering_share: share of the units that order candidates.

    Raises:
        DataError, PortfolioError: bad input.
        RiskNotControlledError: no task can leave the frontier; holds the release that keeps all on it.
    """
    for name, value in (("alpha", alpha), ("delta", delta), ("ordering_share", ordering_share)):
        if not 0 < value < 1:
            raise DataError(f"{name} must be strictly between 0 and 1, got {value!r}")
    if not isinstance(portfolio, Portfolio):
        portfolio = Portfolio.from_yaml(portfolio)
    rows = _rows(outcomes)
    weighted = next((row for row in rows if row.propensity not in (None, 1.0)), None)
    if weighted is not None:
        raise DataError(
            f"{weighted.source or weighted.query.id}: propensity {weighted.propensity}: rows selected with unequal "
            "probability cannot be certified yet; fit on rows that were all labelled"
        )
    for_ordering, for_certification = split(rows, ordering_share, seed)
    tables = task_tables(for_ordering, portfolio)
    paths = {task: candidate_path(table, alpha) for task, table in tables.items()}
    empty = {task: table.take(np.array([], dtype=np.intp)) for task, table in tables.items()}
    held_out = empty | task_tables(for_certification, portfolio, like=tables)
    certifiable = {task: held_out[task].one_per_unit(seed) for task in sorted(held_out)}
    chosen, task_certificates = certify(paths, certifiable, alpha, delta)
    certificate = Certificate(
        alpha=alpha,
        delta=delta,
        tasks=task_certificates,
        data_hash=data_hash(rows),
        seed=seed,
        ordering_share=ordering_share,
        date=datetime.now(UTC).date().isoformat(),
        risk=RISK_OF_GROUPS if any(row.group is not None for row in rows) else RISK,
    )
    names = dict.fromkeys([*(task.name for task in portfolio.tasks), *tables, *held_out])
    ladders = {task: chosen[task].rungs if task in chosen else () for task in names}
    evidence = {task: _evidence(tables[task], path) for task, path in paths.items() if path}
    release = Release(portfolio, Policy(portfolio.frontier, ladders), certificate, evidence)
    if not chosen:
        raise RiskNotControlledError(_refusal(certificate), release)
    return release


def _rows(outcomes: Outcomes) -> list[OutcomeRow]:
    if isinstance(outcomes, str | Path):
        return read_outcomes(outcomes)
    items = list(cast("Iterable[str | Path | OutcomeRow]", outcomes))
    rows = [item for item in items if isinstance(item, OutcomeRow)]
    if not items:
        raise DataError("outcomes: empty; there is nothing to calibrate on")
    if not rows:
        return read_outcomes([item for item in items if not isinstance(item, OutcomeRow)])
    if len(rows) < len(items):
        raise DataError("outcomes: give paths or rows, not both")
    repeated = [name for name, count in Counter(row.query.id for row in rows).items() if count > 1]
    if repeated:
        raise DataError(f"query_id: {repeated[0]!r} occurs more than once")
    return rows


def _evidence(table: TaskTable, path: Sequence[Candidate]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    thresholds = np.full((len(path), len(table.tiers) - 1), np.nan)
    for i, candidate in enumerate(path):
        for rung in candidate.rungs:
            value = -np.inf if rung.threshold is None else rung.threshold
            thresholds[i, table.tiers.index(rung.tier)] = value
    return {
        "thresholds": thresholds,
        "risk": np.array([candidate.risk for candidate in path]),
        "cost_usd": np.array([candidate.cost for candidate in path]),
    }


def _refusal(certificate: Certificate) -> str:
    lines = [f"no task can leave the frontier at alpha={certificate.alpha:g}, delta={certificate.delta:g}:"]
    lines += [f"  {', '.join(names)}: {sentence}" for sentence, names in certificate.obstacles.items()]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Replay:
    """What a release would have cost and kept on recorded outcomes; ratios are against always-frontier.

    Attributes:
        quality: mean over the queries whose routed answer has a known quality; an accepted cheaper answer of
            unknown quality counts as 0.
        quality_ratio: against the frontier on the same queries, whose unknown quality then counts as 1; None if
            the frontier's mean is 0.
        cost_usd: mean USD of a query, all attempts included.
        cost_ratio: None if always-frontier costs nothing.
        violation_rate: share of all queries answered below the frontier with quality not known to reach tau.
    """

    queries: int
    quality: float | None
    quality_ratio: float | None
    cost_usd: float
    cost_ratio: float | None
    tier_share: dict[str, float]
    escalation_rate: float
    violation_rate: float
    violation_rate_by_task: dict[str, float]
    certificate: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


def replay(outcomes: Outcomes, release: Release) -> Replay:
    """Run the release's own flow over recorded outcomes.

    Raises:
        DataError: outcomes are malformed, or a query has no outcome of a tier the release would call.
        PortfolioError: the cost of a call is not known.
    """
    rows = _rows(outcomes)
    tables = task_tables(rows, release.portfolio)
    answers = [_replayed(row, release) for row in rows]
    tasks = defaultdict(list)
    frontier = release.portfolio.frontier
    pairs: list[tuple[float, float]] = []
    for row, answer in zip(rows, answers, strict=True):
        quality, reference = row.outcomes[answer.tier].quality, row.outcomes[frontier].quality
        task = row.query.task or ""
        below = answer.tier != frontier
        tasks[task].append(below and not (quality is not None and quality >= tables[task].tau))
        if below:
            pairs.append((quality or 0.0, 1.0 if reference is None else reference))
        elif quality is not None:
            pairs.append((quality, quality))
    spent = float(np.mean([_spent(row, answer, release.portfolio) for row, answer in zip(rows, answers, strict=True)]))
    always = float(
        np.mean([cost_of(row.outcomes[frontier], release.portfolio.tier(frontier), row.source) for row in rows])
    )
    shares = Counter(answer.tier for answer in answers)
    routed, kept = (float(np.mean(side)) for side in zip(*pairs, strict=True)) if pairs else (None, None)
    return Replay(
        queries=len(rows),
        quality=routed,
        quality_ratio=routed / kept if routed is not None and kept else None,
        cost_usd=spent,
        cost_ratio=spent / always if always else None,
        tier_share={name: shares[name] / len(rows) for name in release.portfolio.names},
        escalation_rate=float(np.mean([answer.trace.escalated for answer in answers])),
        violation_rate=float(np.mean([bad for of in tasks.values() for bad in of])),
        violation_rate_by_task={task: float(np.mean(of)) for task, of in sorted(tasks.items())},
        certificate=None if release.certificate is None else release.certificate.as_dict(),
    )


def _spent(row: OutcomeRow, answer: Answer, portfolio: Portfolio) -> float:
    """USD of all attempts, failed ones included where their cost was recorded."""
    return sum(cost_of(row.outcomes[a.tier], portfolio.tier(a.tier), row.source) for a in answer.trace.attempts)


def _replayed(row: OutcomeRow, release: Release) -> Answer:
    def recorded(call: Call) -> Completion:
        outcome: Outcome | None = row.outcomes.get(call.tier)
        if outcome is None:
            raise DataError(f"{row.source or row.query.id}: no outcome of tier {call.tier!r}, which the release calls")
        if outcome.error is not None:
            raise TierError(outcome.error, call.tier)
        cost = cost_of(outcome, release.portfolio.tier(call.tier), row.source)
        completion = outcome.completion
        return Completion(
            text=completion.text,
            confidence=completion.confidence,
            mean_logprob=completion.mean_logprob,
            token_logprobs=completion.token_logprobs,
            cost_usd=cost,
        )

    return drive(route(release.policy, row.query), recorded)
