"""Outcomes of one task as arrays: rows are queries, columns are tiers by mean cost, the frontier last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from hashlib import sha256
from itertools import combinations, groupby

import numpy as np
from numpy.typing import NDArray

from ..comparing import Comparator, comparator
from ..errors import DataError, PortfolioError
from ..evidence import evidence, kinds
from ..policy import DIFFICULTY, Policy, RelativeCost
from ..portfolio import Portfolio, Tier
from ..support import supported
from ..types import Completion
from .outcomes import Outcome, OutcomeRow
from .units import propensity

__all__ = ["TaskTable", "check", "cost_of", "data_hash", "known_cost", "quality_floors", "task_tables", "tiers_of"]
WIDESPREAD = 0.9
"""A kind of evidence is used if it comes with at least this share of the answers of the commonest kind."""


@dataclass(frozen=True, slots=True)
class TaskTable:
    """What every tier did on every query of one task.

    Attributes:
        tiers: K names, the tiers below the frontier by rising mean cost, the frontier last.
        texts: (n,) of the queries, as a policy sees them.
        tau: (n,) quality floor; NaN where quality is graded and none was declared.
        units: (n,) what was drawn from the population: query or group.
        weights: (n,) one over the probability with which the row was selected for labelling.
        quality: (n, K) in [0, 1]; NaN is unknown.
        cost: (n, K) USD of one call.
        answered: (n, K - 1) whether the tier gave an answer that may be returned.
        tried: (n, K - 1) whether it was called at all: a rule that would have is charged the worst case.
        evidence: (tier, kind) -> (n,) in [0, 1]; NaN where the answer came without.
        agreement: (tier, dearer tier) -> (n,) in [0, 1]; NaN where one of the answers is missing.
        supported: (n,) whether the query is like those a policy speaks of: others are answered by the frontier.
        difficulty: tier -> (n,) P(good enough) that a router predicts; empty without one.
    """

    task: str
    tiers: tuple[str, ...]
    texts: NDArray[np.object_]
    tau: NDArray[np.float64]
    units: NDArray[np.str_]
    weights: NDArray[np.float64]
    quality: NDArray[np.float64]
    cost: NDArray[np.float64]
    answered: NDArray[np.bool_]
    tried: NDArray[np.bool_]
    evidence: Mapping[tuple[str, str], NDArray[np.float64]]
    agreement: Mapping[tuple[str, str], NDArray[np.float64]]
    supported: NDArray[np.bool_]
    difficulty: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.units)

    @property
    def good(self) -> NDArray[np.float64]:
        """(n, K) 1 where quality reaches tau, 0 where it does not, NaN where it is unknown.

        Raises:
            DataError: quality is graded and no floor was declared.
        """
        if np.isnan(self.tau).any():
            graded = self.quality[np.isfinite(self.quality) & (self.quality != 0) & (self.quality != 1)]
            raise DataError(
                f"task {self.task!r}: quality is graded (for example {graded[0]:g}), so alpha needs a quality floor: "
                "give tau for this task in the portfolio"
            )
        return np.where(np.isnan(self.quality), np.nan, self.quality >= self.tau[:, None])

    def kinds(self, tier: str) -> tuple[str, ...]:
        """The kinds of evidence that the answers of a tier come with, the commonest first."""
        return tuple(kind for name, kind in self.evidence if name == tier)

    @property
    def written(self) -> bool:
        """Whether the texts of all queries are known."""
        return all(self.texts)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """(n,) characters of the texts."""
        return np.fromiter(map(len, self.texts), dtype=np.float64, count=len(self))

    def relative_cost(self, expected: RelativeCost | None) -> NDArray[np.float64]:
        """(n,) what the frontier's answers are expected to cost; 1 without such an expectation."""
        if expected is None:
            return np.ones(len(self))
        cost = np.maximum(expected.intercept + expected.per_character * self.lengths, expected.least)
        return cost if expected.most is None else np.minimum(cost, expected.most)

    def take(self, rows: NDArray[np.intp]) -> TaskTable:
        """The rows of these positions, repeated where a position is."""
        return replace(
            self,
            texts=self.texts[rows],
            tau=self.tau[rows],
            units=self.units[rows],
            weights=self.weights[rows],
            quality=self.quality[rows],
            cost=self.cost[rows],
            answered=self.answered[rows],
            tried=self.tried[rows],
            evidence={key: values[rows] for key, values in self.evidence.items()},
            agreement={key: values[rows] for key, values in self.agreement.items()},
            supported=self.supported[rows],
            difficulty={tier: values[rows] for tier, values in self.difficulty.items()},
        )


def task_tables(
    rows: Sequence[OutcomeRow],
    portfolio: Portfolio,
    like: Mapping[str, TaskTable] | None = None,
    comparators: Mapping[str, Comparator] | None = None,
    policy: Policy | None = None,
    *,
    passed_over: bool = True,
) -> dict[str, TaskTable]:
    """One table a task, in order of the task's name; rows in order of their query's id.

    Args:
        like: task -> table whose tiers, in their order, and kinds of evidence are taken over: what is decided on one
            split must not depend on the other.
        comparators: the user's own, by name.
        policy: what it looks at is in the tables in any case, unknown where no answer came with it.
        passed_over: whether calls that failed will fail again; else they are as calls never made.

    Raises:
        DataError: an outcome names an unknown tier, the frontier's outcome is missing, a comparator is unknown.
        PortfolioError: a cost is needed and neither the outcome nor the portfolio knows it.
    """
    check(rows, portfolio)
    # by id, so that no result depends on the order of the rows
    in_order = sorted(rows, key=lambda row: (_task_of(row), row.query.id or ""))
    tables = {}
    for task, of_task in groupby(in_order, key=_task_of):
        compare, members = comparator(portfolio.task(task).agreement, comparators), list(of_task)
        table = _table(members, portfolio, compare, (like or {}).get(task), passed_over=passed_over)
        tables[task] = table if policy is None else _as_seen_by(policy, table, members)
    return tables


def tiers_of(tables: Iterable[TaskTable]) -> tuple[str, ...]:
    """All tiers of several tables, the cheaper first by the mean of their tasks, the frontier last."""
    costs: dict[str, list[float]] = defaultdict(list)
    for table in tables:
        for tier, cost in zip(table.tiers, table.cost.mean(axis=0), strict=True):
            costs[tier].append(float(cost))
        frontier = table.tiers[-1]
    return tuple(sorted(costs, key=lambda tier: (tier == frontier, float(np.mean(costs[tier])), tier)))


def check(rows: Sequence[OutcomeRow], portfolio: Portfolio) -> None:
    """Refuse outcomes that the portfolio has no place for.

    Raises:
        DataError: an outcome names an unknown tier, the frontier's outcome is missing, or a task is none of the
            portfolio's but looks like one.
    """
    tasks = [task.name for task in portfolio.tasks]
    for name in sorted({_task_of(row) for row in rows} - set(tasks)):
        like = get_close_matches(name, tasks, n=1, cutoff=0.75)
        if like:
            source = next(row.source for row in rows if _task_of(row) == name)
            raise DataError(
                f"{source}: task {name!r} is not in the portfolio, which has {like[0]!r}; give both one name"
            )
    for row in rows:
        unknown = [tier for tier in row.outcomes if tier not in portfolio.names]
        if unknown:
            raise DataError(
                f"{row.source}: outcomes: unknown tier {', '.join(unknown)}; portfolio: {', '.join(portfolio.names)}"
            )
        if portfolio.frontier not in row.outcomes:
            raise DataError(f"{row.source}: outcomes: the frontier {portfolio.frontier!r} is missing")


def quality_floors(rows: Sequence[OutcomeRow], portfolio: Portfolio) -> dict[str, float | None]:
    """Task -> tau: as declared, 1 where every quality is 0 or 1, None where it is graded."""
    qualities: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        qualities[_task_of(row)] += [q for o in row.outcomes.values() if (q := o.quality) is not None]
    return {task: _tau(task, np.array(of), portfolio) for task, of in qualities.items()}


def _as_seen_by(policy: Policy, table: TaskTable, rows: Sequence[OutcomeRow]) -> TaskTable:
    """The table with unknown values for evidence that a policy looks at and that it has not."""
    rungs, support = policy.ladders.get(table.task, ()), policy.support.get(table.task)
    looks = [confidence for rung in rungs for confidence in (*rung.confidences, rung.belief) if confidence is not None]
    terms = [term for confidence in looks for term in confidence.terms]
    unknown = np.full(len(table), np.nan)
    evidence = {(term.tier, term.kind): unknown for term in terms if term.kind not in (None, DIFFICULTY)}
    agreement = {}
    for term in terms:
        if term.other is not None:
            first, second = sorted((term.tier, term.other), key=table.tiers.index)
            agreement[first, second] = unknown
    return replace(
        table,
        evidence=evidence | dict(table.evidence),
        agreement=agreement | dict(table.agreement),
        supported=np.array([support is None or supported(support, row.seen.text) for row in rows], dtype=np.bool_),
    )


def data_hash(rows: Sequence[OutcomeRow]) -> str:
    """SHA-256 of what a certificate depends on: queries, qualities, answers, evidence, costs, origin."""
    digest = sha256()
    for row in sorted(rows, key=lambda row: row.query.id or ""):
        digest.update(
            repr((row.query.id, row.query.task, row.seen.text, row.group, row.propensity)).encode("utf-8", "replace")
        )
        for tier, outcome in sorted(row.outcomes.items()):
            done = outcome.completion
            seen = (
                done.text,
                done.words,
                done.confidence,
                done.mean_logprob,
                done.token_logprobs,
                sorted(done.scores.items()),
            )
            spent = (done.cost_usd, done.input_tokens, done.output_tokens, done.latency_ms)
            origin = (done.model, done.prompt)
            facts = (tier, outcome.quality, outcome.error is None, seen, spent, origin)
            digest.update(repr(facts).encode("utf-8", "replace"))
    return digest.hexdigest()


def known_cost(outcome: Outcome, tier: Tier) -> float | None:
    """USD of one recorded call: as recorded, else priced by the portfolio."""
    done = outcome.completion
    if done.cost_usd is not None:
        return done.cost_usd
    return tier.cost(done.input_tokens, done.output_tokens, done.latency_ms, done.cached_tokens or 0)


def cost_of(outcome: Outcome, tier: Tier, source: str) -> float:
    """USD of one recorded call; a failed one of unknown cost is free.

    Raises:
        PortfolioError: neither the outcome nor the portfolio knows it.
    """
    cost = known_cost(outcome, tier)
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


def _table(
    rows: list[OutcomeRow], portfolio: Portfolio, compare: Comparator, like: TaskTable | None, *, passed_over: bool
) -> TaskTable:
    task = _task_of(rows[0])
    if like is None:
        names, cost = _by_mean_cost(task, rows, portfolio)
        found = [(name, kind) for name in names[:-1] for kind in _widespread(rows, name)]
        mean_cost = np.nanmean(cost, axis=0)
    else:
        names, cost, found = like.tiers, _costs(rows, like.tiers, portfolio), list(like.evidence)
        mean_cost = np.nanmean(np.vstack([cost, like.cost]), axis=0)
    quality = np.array([[_quality(row, name) for name in names] for row in rows], dtype=np.float64)
    below = names[:-1]
    answers = {name: [_answer(row, name) for row in rows] for name in below}
    pairs = combinations(below, 2) if like is None else like.agreement
    agreement = {pair: _agreement(answers[pair[0]], answers[pair[1]], compare) for pair in pairs}
    shape = (len(rows), len(below))
    return TaskTable(
        task=task,
        tiers=names,
        texts=np.array([row.seen.text for row in rows], dtype=np.object_),
        tau=np.full(len(rows), _tau_or_nan(task, quality, portfolio) if like is None else like.tau[0]),
        units=np.array([row.unit for row in rows]),
        weights=np.array([1 / propensity(row) for row in rows]),
        quality=quality,
        cost=np.where(np.isnan(cost), mean_cost, cost),
        answered=np.array(
            [[answers[name][i] is not None for name in below] for i in range(len(rows))], dtype=np.bool_
        ).reshape(shape),
        tried=np.array(
            [
                [(o := row.outcomes.get(n)) is not None and (passed_over or o.error is None) for n in below]
                for row in rows
            ],
            dtype=np.bool_,
        ).reshape(shape),
        evidence={(name, kind): _evidence(answers[name], kind) for name, kind in found},
        agreement={pair: values for pair, values in agreement.items() if like is not None or np.isfinite(values).any()},
        supported=np.ones(len(rows), dtype=np.bool_),
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


def _answer(row: OutcomeRow, tier: str) -> Completion | None:
    outcome = row.outcomes.get(tier)
    if outcome is None or outcome.error is not None or not outcome.completion.valid:
        return None
    return outcome.completion


def _evidence(answers: Sequence[Completion | None], kind: str) -> NDArray[np.float64]:
    """(n,) of one kind."""
    known = [None if answer is None else evidence(answer, kind) for answer in answers]
    return np.array([np.nan if value is None else value for value in known], dtype=np.float64)


def _agreement(
    first: Sequence[Completion | None], second: Sequence[Completion | None], compare: Comparator
) -> NDArray[np.float64]:
    """(n,) between the answers of two tiers; an outcome without a text has none."""
    texts = [
        (None if one is None else one.words, None if other is None else other.words)
        for one, other in zip(first, second, strict=True)
    ]
    return np.array([compare(a, b) if a and b else np.nan for a, b in texts], dtype=np.float64)


def _widespread(rows: list[OutcomeRow], tier: str) -> list[str]:
    """The kinds of evidence that most answers of the tier come with and that tell answers apart."""
    answers = [answer for row in rows if (answer := _answer(row, tier)) is not None]
    found = {kind: _evidence(answers, kind) for kind in kinds(answers)}
    counts = {kind: int(np.isfinite(values).sum()) for kind, values in found.items()}
    most = max(counts.values(), default=0)
    varied = [kind for kind, values in found.items() if counts[kind] and np.nanmin(values) < np.nanmax(values)]
    return sorted((k for k in varied if counts[k] >= WIDESPREAD * most), key=lambda kind: -counts[kind])


def _tau_or_nan(task: str, quality: NDArray[np.float64], portfolio: Portfolio) -> float:
    tau = _tau(task, quality, portfolio)
    return np.nan if tau is None else tau


def _tau(task: str, quality: NDArray[np.float64], portfolio: Portfolio) -> float | None:
    declared = portfolio.task(task).tau
    if declared is not None:
        return declared
    known = quality[np.isfinite(quality)]
    return 1.0 if np.isin(known, (0, 1)).all() else None
