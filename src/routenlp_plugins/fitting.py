"""From outcomes to a release."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from .cascade.candidate import Candidate
from .cascade.certificate import Certificate, Proof
from .cascade.certification import Stream, certify, method
from .cascade.families import Space
from .cascade.noise import Noise
from .cascade.risks import Retention, Risk, SelectiveViolation, Violation
from .cascade.search import Path as Candidates
from .cascade.search import pooled_paths, task_paths
from .comparing import Comparator
from .errors import DataError, RiskNotControlledError
from .evaluate.outcomes import OutcomeRow, Outcomes, outcome_rows
from .evaluate.table import TaskTable, check, cost_of, data_hash, quality_floors, task_tables
from .evaluate.units import Split, check_design, one_row_per_unit, split
from .policy import Policy, Support
from .portfolio import Portfolio
from .relabelled import check_labels, noisy, others_than, with_floors
from .release import Release, fingerprint
from .routing.difficulty import DifficultyRouter, TrainingOptions
from .routing.foresight import foreseen, learned
from .support import support_of

__all__ = ["FitOptions", "fit"]


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What most fits leave as it is.

    Attributes:
        split: shares of the rows that order candidates, certify and report cost.
        selective: alpha bounds P(quality < tau | accepted) instead of P(accepted and quality < tau).
        pooled: the promise is made for the stream of all tasks together instead of for each task.
        comparators: the user's own, by the names that tasks of the portfolio give them; a dispatcher needs them too.
        unlike: share of the queries, of those drawn like the outcomes, that may be called unlike them and go to the
            frontier, so that what really is unlike them does; 0 turns the check off. It needs the texts of all rows.
        prompts: whether another system prompt than those of the outcomes voids the certificate. Turn it off if the
            prompt holds something that changes, such as a date, and say so to whoever reads the certificate.
        smallest_propensity: that your design gives to any query, selected for labelling or not, where it does not give
            all the same. It tells how much a row that was not seen could have weighed.
        router: how the difficulty router is trained on the ordering rows, whose predictions policies may look at; None
            searches without one.
        space: what policies may do.
        hints: outcomes whose quality is not the truth, such as labels made of thumbs: policies are found and ordered on
            these, and all of the outcomes themselves certify and report. Those of the same units are left out.
        noise: what is known of labels that are not the truth (see `routenlp_plugins.LabelModel`). Of the hints where
            there are any; else the `quality` of all rows is such a label, and the promise is about the truth all the
            same.
        passed_over: whether calls of cheap tiers that failed when outcomes were collected will fail when serving too,
            as those with too long a context do: such an answer is then passed over. If not, it might come next time
            and be anything, and a policy that would have asked for it is charged a bad one.
    """

    split: Split = field(default_factory=Split)
    selective: bool = False
    pooled: bool = False
    comparators: Mapping[str, Comparator] = field(default_factory=dict)
    unlike: float = 0.01
    prompts: bool = True
    smallest_propensity: float | None = None
    hints: Outcomes | None = None
    noise: Noise | None = None
    passed_over: bool = False
    router: TrainingOptions | None = field(default_factory=TrainingOptions)
    space: Space = field(default_factory=Space)

    def __post_init__(self) -> None:
        if not (self.router is None or isinstance(self.router, TrainingOptions)):
            raise DataError(f"router: expected TrainingOptions, or None to do without a router, got {self.router!r}")
        if not (self.noise is None or isinstance(self.noise, Noise)):
            raise DataError(f"noise: expected a Noise, got {self.noise!r}")
        if not isinstance(self.space, Space):
            raise DataError(f"space: expected a Space, got {self.space!r}")
        if isinstance(self.unlike, bool) or not isinstance(self.unlike, int | float) or not 0 <= self.unlike < 1:
            raise DataError(f"unlike must be a share in [0, 1), got {self.unlike!r}")


def fit(
    outcomes: Outcomes,
    portfolio: Portfolio | str | Path,
    *,
    alpha: float | None = None,
    retention: float | None = None,
    delta: float = 0.1,
    seed: int = 0,
    options: FitOptions | None = None,
) -> Release:
    """Find the cheapest policy that is shown to keep a promise about quality.

    The population is what the outcomes were drawn from: queries, or groups where rows carry one. A part of the units
    finds policies and orders them from safe to cheap, another tests them end to end in that order, and a third, on
    which nothing is decided, tells what the policy costs (`routenlp_plugins.cascade`). Tasks for which none passes stay
    on the frontier.

    Args:
        outcomes: paths of outcome files, or rows.
        portfolio: a portfolio, or the path of its YAML file.
        alpha: for every task, P(answer accepted below the frontier and its quality < tau) <= alpha; or
        retention: for every task, E[quality of the routed answers] >= retention * E[quality of the frontier's answers];
        delta: for all tasks simultaneously, with probability at least 1 - delta.
        seed: of the split.

    Raises:
        DataError, PortfolioError: bad input.
        RiskNotControlledError: no task can leave the frontier; holds the release that keeps all on it.
    """
    options = options or FitOptions()
    risk = _risk(alpha, retention, options)
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
        raise DataError(f"delta must be strictly between 0 and 1, got {delta!r}")
    spent = 0.0 if options.noise is None or options.hints is not None else options.noise.delta
    if not spent < delta:
        raise DataError(f"delta={delta:g}: the noise of the labels takes {spent:g} of it; give more")
    if not isinstance(portfolio, Portfolio):
        portfolio = Portfolio.from_yaml(portfolio)
    rows = outcome_rows(outcomes)
    check_design(rows, options.smallest_propensity)
    _check_complete(rows, portfolio, risk)
    if options.noise is not None:
        check_labels(rows, portfolio, options.noise, hints=options.hints is not None)
    ordering, parts = _parts(rows, options, seed)
    seen = Policy(portfolio.frontier, {}, support=_support(parts["ordering"], options))
    unwritten = {row.query.task or "" for row in rows if not row.seen.text}
    tabulated = partial(task_tables, comparators=options.comparators, policy=seen, passed_over=options.passed_over)
    tables = tabulated(parts["ordering"], portfolio)
    tables = _without_texts(tables, unwritten)
    if options.hints is not None:
        tables = with_floors(tables, quality_floors(rows, portfolio))
    sought = _sought(risk, options)
    router, tables = _learned(tables, sought, options, seed)
    held_out = {}
    for name in ("certification", "reporting"):
        members = one_row_per_unit(parts[name], seed, pooled=options.pooled)
        found = _without_texts(tabulated(members, portfolio, tables), unwritten)
        held_out[name] = _with_all_tasks(tables, found if router is None else foreseen(router, found))
    streams = _streams(sought, tables, held_out["certification"], options, seed)
    chosen, proofs = certify(risk, streams, delta - spent)
    proofs = tuple(_with_cost(proof, chosen, held_out["reporting"]) for proof in proofs)
    names = dict.fromkeys([*(task.name for task in portfolio.tasks), *sorted({row.query.task or "" for row in rows})])
    staying = Policy(
        portfolio.frontier,
        dict.fromkeys(names, ()),
        comparators={task: portfolio.task(task).agreement for task in names},
        models=_models(rows, [*_called(chosen), *([portfolio.frontier] if retention is not None else [])]),
        prompts=_prompts(rows, chosen) if options.prompts else {},
        support={task: support for task, support in seen.support.items() if task in chosen},
        router=router.digest if router is not None and any(c.predicted for c in chosen.values()) else None,
        requires={task: needed for task in chosen if (needed := portfolio.task(task).requires)},
    )
    policy = Candidate.policy(staying, chosen)
    certificate = Certificate(
        risk=risk.kind,
        level=float(risk.level),
        delta=float(delta),
        proofs=proofs,
        data_hash=data_hash(rows),
        seed=seed,
        ordering=ordering,
        reporting=options.split.reporting,
        portfolio=portfolio.fingerprint,
        policy=fingerprint(policy),
        date=datetime.now(UTC).date().isoformat(),
        method=_method(risk, options),
        scope="all tasks pooled" if options.pooled else "each task",
        groups=any(row.group is not None for row in rows),
    )
    evidence = {"+".join(stream.tables): _evidence(paths) for stream, paths in streams if any(paths)}
    release = Release(portfolio, policy, certificate, evidence, None if policy.router is None else router)
    if not chosen:
        raise RiskNotControlledError(_refusal(certificate), release)
    return release


def _risk(alpha: float | None, retention: float | None, options: FitOptions) -> Risk:
    if (alpha is None) == (retention is None):
        raise DataError("give alpha or retention, one of them: what the policy has to keep")
    if options.noise is not None and options.selective:
        raise DataError("selective: not with labels that are not the truth; bound P(accepted and quality < tau)")
    if options.noise is not None and options.hints is None:
        return noisy(Retention(retention) if retention is not None else Violation(cast("float", alpha)), options.noise)
    if retention is not None:
        return Retention(retention)
    return SelectiveViolation(cast("float", alpha)) if options.selective else Violation(cast("float", alpha))


def _sought(risk: Risk, options: FitOptions) -> Risk:
    """The promise as the ordering rows can tell it."""
    return risk if options.hints is None or options.noise is None else noisy(risk, options.noise)


def _parts(rows: Sequence[OutcomeRow], options: FitOptions, seed: int) -> tuple[float, dict[str, list[OutcomeRow]]]:
    """Which share of the rows orders, and what orders, certifies and reports."""
    if options.hints is None:
        return options.split.ordering, split(rows, options.split, seed, pooled=options.pooled)
    hints = others_than(rows, options.hints)
    # too small a share for any of the rows
    others = split(rows, replace(options.split, ordering=1e-12), seed, pooled=options.pooled)
    return 0.0, {**others, "ordering": hints}


def _method(risk: Risk, options: FitOptions) -> str:
    how = method(risk, weighted=options.smallest_propensity is not None)
    if options.hints is not None:
        return f"{how}, which was of other labels"
    if options.noise is None:
        return how
    on_good, on_bad = options.noise.on_good, options.noise.on_bad
    return f"{how}, of labels that are at most {on_good:.4g} where answers are good and {on_bad:.4g} where they are bad"


def _check_complete(rows: Sequence[OutcomeRow], portfolio: Portfolio, risk: Risk) -> None:
    """Before any of it is used: what is missing is told by its first place, and not by a part of the split."""
    check(rows, portfolio)
    judged: dict[str, bool] = {}
    for row in rows:
        task, reference = row.query.task or "", row.outcomes[portfolio.frontier]
        for tier in (*portfolio.below_frontier(task), portfolio.frontier):
            if tier in row.outcomes:
                cost_of(row.outcomes[tier], portfolio.tier(tier), row.source)
        judged[task] = judged.get(task, False) or reference.quality is not None
    silent = sorted(task for task, known in judged.items() if not known)
    if silent and isinstance(risk, Retention):
        raise DataError(
            f"task {silent[0]!r}: no answer of the frontier has a quality, so that there is nothing to retain; score "
            "its answers too, or give alpha"
        )


def _support(rows: Sequence[OutcomeRow], options: FitOptions) -> dict[str, Support]:
    """What the queries of each task look like, where all have a text."""
    if not options.unlike:
        return {}
    of: dict[str, list[OutcomeRow]] = defaultdict(list)
    for row in rows:
        of[row.query.task or ""].append(row)
    found = {
        task: support_of([row.seen.text for row in of[task]], options.unlike, [row.unit for row in of[task]])
        for task in sorted(of)
    }
    return {task: support for task, support in found.items() if support is not None}


def _learned(
    tables: Mapping[str, TaskTable], risk: Risk, options: FitOptions, seed: int
) -> tuple[DifficultyRouter | None, dict[str, TaskTable]]:
    """A router, and the tables with what it says of their rows; none where it tells queries of a promise not apart."""
    if options.router is None:
        return None, dict(tables)
    graded = isinstance(risk, Retention) or options.noise is not None
    found = learned(tables, replace(options.router, seed=seed), graded=graded, stream=options.pooled)
    return found or (None, dict(tables))


def _without_texts(tables: Mapping[str, TaskTable], tasks: set[str]) -> dict[str, TaskTable]:
    """The tables with all texts unknown of these tasks, of which some are: nothing may be read from the others."""
    return {
        task: replace(table, texts=np.full(len(table), "", dtype=np.object_)) if task in tasks else table
        for task, table in tables.items()
    }


def _with_all_tasks(tables: Mapping[str, TaskTable], found: Mapping[str, TaskTable]) -> dict[str, TaskTable]:
    """The tables of a part, without any row for a task that it has none of."""
    empty = {task: table.take(np.array([], dtype=np.intp)) for task, table in tables.items()}
    return dict(sorted((empty | dict(found)).items()))


def _streams(
    risk: Risk,
    tables: Mapping[str, TaskTable],
    certification: Mapping[str, TaskTable],
    options: FitOptions,
    seed: int,
) -> list[tuple[Stream, tuple[Candidates, ...]]]:
    if options.pooled:
        return [(Stream(certification, options.smallest_propensity), pooled_paths(tables, risk, seed, options.space))]
    return [
        (
            Stream({task: table}, options.smallest_propensity),
            task_paths(tables[task], risk, seed, options.space) if task in tables else (),
        )
        for task, table in certification.items()
    ]


def _with_cost(proof: Proof, chosen: Mapping[str, Candidate], reporting: Mapping[str, TaskTable]) -> Proof:
    """The proof with the cost of what it certifies on rows that nothing was decided on."""
    stream = Stream({task: reporting[task] for task in proof.tasks if task in reporting})
    if not len(stream):
        return proof
    rows = stream.under({task: chosen[task] for task in proof.tasks if task in chosen})
    return replace(proof, cost_ratio=rows.cost_ratio, cost_interval=rows.cost_interval)


def _called(chosen: Mapping[str, Candidate]) -> list[str]:
    """The tiers below the frontier that a policy calls."""
    return sorted({rung.tier for candidate in chosen.values() for rung in candidate.rungs})


def _models(rows: Sequence[OutcomeRow], tiers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The models that each of these tiers answered as; none for a tier that did not say so every time."""
    found: dict[str, set[str | None]] = defaultdict(set)
    for row in rows:
        for tier, outcome in row.outcomes.items():
            if outcome.error is None:
                found[tier].add(outcome.completion.model)
    told = {tier: found[tier] for tier in tiers if found[tier] and None not in found[tier]}
    return {tier: tuple(sorted(cast("set[str]", names))) for tier, names in told.items()}


MANY_PROMPTS = 10
"""More fingerprints than this within one task: the fixed part of the prompt is not fixed, and cannot be checked."""


def _prompts(rows: Sequence[OutcomeRow], chosen: Mapping[str, Candidate]) -> dict[str, tuple[str, ...]]:
    """The prompts that the answers of each certified task came from, where every answer tells."""
    found: dict[str, set[str | None]] = defaultdict(set)
    for row in rows:
        task = row.query.task or ""
        if task in chosen:
            tiers = {rung.tier for rung in chosen[task].rungs}
            found[task] |= {o.completion.prompt for t, o in row.outcomes.items() if t in tiers and o.error is None}
    return {
        task: tuple(sorted(cast("set[str]", prompts)))
        for task, prompts in sorted(found.items())
        if None not in prompts and len(prompts) <= MANY_PROMPTS
    }


def _evidence(paths: Sequence[Candidates]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    points = [point for path in paths for point in path]
    names = {"excess": "excess", "second_moment": "second_moment", "cost_usd": "cost"}
    return {name: np.array([getattr(point, of) for point in points]) for name, of in names.items()}


def _refusal(certificate: Certificate) -> str:
    asked = f"{certificate.risk} {certificate.level:g}, delta {certificate.delta:g}"
    lines = [f"no task can leave the frontier at {asked}:"]
    lines += [f"  {', '.join(names)}: {sentence}" for sentence, names in certificate.obstacles.items()]
    return "\n".join(lines)
