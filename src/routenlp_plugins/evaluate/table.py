"""Outcomes of one task as arrays: rows are queries, columns are tiers by mean cost, the frontier last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import groupby
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, PortfolioError
from ..flow import score
from ..portfolio import Portfolio, Tier
from ..types import ScoreKind
from .outcomes import Outcome, OutcomeRow

__all__ = ["TaskTable", "cost_of", "data_hash", "split", "task_tables", "unit_interval"]


@dataclass(frozen=True, slots=True)
class TaskTable:
    """What every tier did on every query of one task.

    Attributes:
        tiers: K names, the tiers below the frontier by rising mean cost, the frontier last.
        kinds: K - 1 kinds of score, None for a tier that supplied none and so cannot be gated.
        tau: quality floor.
        units: (n,) what was drawn from the population: query or group.
        quality: (n, K) in [0, 1]; NaN is unknown.
        cost: (n, K) USD of one call.
        score: (n, K - 1) in [0, 1]; NaN where an answer came without evidence, inf where the tier was never
            tried: a rule that would have called it is charged the worst case.
        failed: (n, K - 1) whether the tier gave no answer at all.
    """

    task: str
    tiers: tuple[str, ...]
    kinds: tuple[ScoreKind | None, ...]
    tau: float
    units: NDArray[np.str_]
    quality: NDArray[np.float64]
    cost: NDArray[np.float64]
    score: NDArray[np.float64]
    failed: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.units)

    def take(self, rows: NDArray[np.intp]) -> TaskTable:
        """The rows of these positions, repeated where a position is."""
        return replace(
            self,
            units=self.units[rows],
            quality=self.quality[rows],
            cost=self.cost[rows],
            score=self.score[rows],
            failed=self.failed[rows],
        )

    def one_per_unit(self, seed: int) -> TaskTable:
        """One row of each unit, drawn by hash: rows of a group are not independent, groups are."""
        draw = unit_interval([f"{unit}#{i}" for i, unit in enumerate(self.units)], seed)
        order = np.lexsort((draw, self.units))
        _, first = np.unique(self.units[order], return_index=True)
        return self.take(np.sort(order[first]))


def task_tables(
    rows: Sequence[OutcomeRow], portfolio: Portfolio, like: Mapping[str, TaskTable] | None = None
) -> dict[str, TaskTable]:
    """One table a task, in order of the task's name; rows in order of their query's id.

    Args:
        like: task -> table whose tiers, in their order, and kinds of score are taken over: what is decided on one
            split must not depend on the other.

    Raises:
        DataError: an outcome names an unknown tier, a graded task has no tau, the frontier's outcome is missing.
        PortfolioError: a cost is needed and neither the outcome nor the portfolio knows it.
    """
    for row in rows:
        unknown = [tier for tier in row.outcomes if tier not in portfolio.names]
        if unknown:
            raise DataError(
                f"{row.source}: outcomes: unknown tier {', '.join(unknown)}; portfolio: {', '.join(portfolio.names)}"
            )
        if portfolio.frontier not in row.outcomes:
            raise DataError(f"{row.source}: outcomes: the frontier {portfolio.frontier!r} is missing")
    # by id, so that no result depends on the order of the rows
    in_order = sorted(rows, key=lambda row: (_task_of(row), row.query.id or ""))
    known = like or {}
    return {
        task: _table(task, list(members), portfolio, known.get(task))
        for task, members in groupby(in_order, key=_task_of)
    }


def split(rows: Sequence[OutcomeRow], share: float, seed: int) -> tuple[list[OutcomeRow], list[OutcomeRow]]:
    """Two parts by a hash of the unit: about `share` of the units, and the rest."""
    draws = unit_interval([row.unit for row in rows], seed)
    first = [row for row, draw in zip(rows, draws, strict=True) if draw < share]
    return first, [row for row, draw in zip(rows, draws, strict=True) if draw >= share]


def unit_interval(names: Sequence[str] | NDArray[np.str_], seed: int) -> NDArray[np.float64]:
    """(n,) values in [0, 1), the same for the same name and seed on every machine."""
    digests = [sha256(f"{seed}:{name}".encode()).digest()[:8] for name in names]
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.float64) / 2.0**64


def data_hash(rows: Sequence[OutcomeRow]) -> str:
    """SHA-256 of what a certificate depends on: ids, tasks, qualities and evidence, in order of id."""
    digest = sha256()
    for row in sorted(rows, key=lambda row: row.query.id or ""):
        digest.update(repr((row.query.id, row.query.task, row.group)).encode())
        for tier, outcome in sorted(row.outcomes.items()):
            values = [score(outcome.completion, kind) for kind in get_args(ScoreKind)]
            digest.update(repr((tier, outcome.quality, outcome.error is None, values)).encode())
    return digest.hexdigest()


def cost_of(outcome: Outcome, tier: Tier, source: str) -> float:
    """USD of one recorded call: as recorded, else priced by the portfolio; a failed call without record is free.

    Raises:
        PortfolioError: neither knows it.
    """
    done = outcome.completion
    if done.cost_usd is not None:
        return done.cost_usd
    cost = tier.cost(done.input_tokens, done.output_tokens, done.latency_ms)
    if cost is None and outcome.error is not None:
        return 0.0
    if cost is None:
        raise PortfolioError(
            f"{source}: tier {tier.name!r} has no known cost, so no saving can be stated: give cost_usd in the "
            "outcome, or a price in the portfolio together with the tokens (usd_per_hour: latency_ms) it applies to"
        )
    return cost


def _task_of(row: OutcomeRow) -> str:
    return row.query.task or ""


def _table(task: str, rows: list[OutcomeRow], portfolio: Portfolio, like: TaskTable | None) -> TaskTable:
    if like is None:
        names, cost = _by_mean_cost(task, rows, portfolio)
        kinds = tuple(_kind(rows, name) for name in names[:-1])
        mean_cost = np.nanmean(cost, axis=0)
    else:
        names, cost, kinds = like.tiers, _costs(rows, like.tiers, portfolio), like.kinds
        mean_cost = np.nanmean(np.vstack([cost, like.cost]), axis=0)
    quality = np.array([[_quality(row, name) for name in names] for row in rows])
    scores = [[_score(row, name, kind) for name, kind in zip(names, kinds, strict=False)] for row in rows]
    failed = [[_failed(row, name) for name in names[:-1]] for row in rows]
    shape = (len(rows), len(names) - 1)
    return TaskTable(
        task=task,
        tiers=names,
        kinds=kinds,
        tau=_tau(task, quality, portfolio),
        units=np.array([row.unit for row in rows]),
        quality=quality,
        cost=np.where(np.isnan(cost), mean_cost, cost),
        score=np.array(scores, dtype=np.float64).reshape(shape),
        failed=np.array(failed, dtype=np.bool_).reshape(shape),
    )


def _by_mean_cost(
    task: str, rows: list[OutcomeRow], portfolio: Portfolio
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The tiers that were tried, the frontier last, and the (n, K) USD of their calls in that order."""
    tried = {tier for row in rows for tier in row.outcomes}
    names = [*(tier for tier in portfolio.below_frontier(task) if tier in tried), portfolio.frontier]
    cost = _costs(rows, names, portfolio)
    order = [*np.argsort(np.nanmean(cost[:, :-1], axis=0), kind="stable"), len(names) - 1]
    return tuple(names[i] for i in order), cost[:, order]


def _costs(rows: list[OutcomeRow], names: Sequence[str], portfolio: Portfolio) -> NDArray[np.float64]:
    cost = [[_cost_or_nan(row, portfolio.tier(name)) for name in names] for row in rows]
    return np.array(cost, dtype=np.float64).reshape(len(rows), len(names))


def _cost_or_nan(row: OutcomeRow, tier: Tier) -> float:
    outcome = row.outcomes.get(tier.name)
    return np.nan if outcome is None else cost_of(outcome, tier, row.source)


def _quality(row: OutcomeRow, tier: str) -> float:
    outcome = row.outcomes.get(tier)
    return np.nan if outcome is None or outcome.quality is None else outcome.quality


def _score(row: OutcomeRow, tier: str, kind: ScoreKind | None) -> float:
    outcome = row.outcomes.get(tier)
    if outcome is None:
        return np.inf
    value = None if kind is None else score(outcome.completion, kind)
    return np.nan if value is None else value


def _failed(row: OutcomeRow, tier: str) -> bool:
    outcome = row.outcomes.get(tier)
    return outcome is not None and outcome.error is not None


def _kind(rows: list[OutcomeRow], tier: str) -> ScoreKind | None:
    """The kind of evidence that most answers of the tier came with; the tier's own confidence on a tie."""
    answers = [row.outcomes[tier].completion for row in rows if tier in row.outcomes]
    kinds: tuple[ScoreKind, ...] = get_args(ScoreKind)
    counts = {kind: sum(score(answer, kind) is not None for answer in answers) for kind in kinds}
    best = max(kinds, key=lambda kind: counts[kind])
    return best if counts[best] else None


def _tau(task: str, quality: NDArray[np.float64], portfolio: Portfolio) -> float:
    declared = portfolio.task(task).tau
    if declared is not None:
        return declared
    graded = quality[~np.isnan(quality) & (quality != 0) & (quality != 1)]
    if graded.size:
        raise DataError(
            f"task {task!r}: quality is graded (for example {graded[0]:g}), so alpha needs a quality floor: "
            "give tau for this task in the portfolio"
        )
    return 1.0
