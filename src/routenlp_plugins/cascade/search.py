"""From the ordering split to a short path of joint policies, safest first.

Everything here is cross-fitted: a row is judged by confidences that have not seen it. What is kept is the Pareto
front of cost and risk over all families; its confidences are then fitted on all rows of the split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, sqrt
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable
from ..evaluate.units import unit_interval
from ..types import Rung
from .calibration import FOLDS, Calibrated, calibrate
from .ladders import joint_levels, judged, optimal_stopping, stopping_step
from .risks import Answered, Risk

__all__ = ["Candidate", "Path", "Point", "pooled_paths", "task_paths"]

MAX_RUNGS = 4
PATH_LENGTH = 50
BEAM = 12
PROVABLE = 1.3
"""Standard errors below 0 at which a candidate can probably be certified with as many rows as order it."""
TASK_TABLE = "task table"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ladder with thresholds for one task, and what it did on the ordering split.

    Attributes:
        excess, second_moment: mean of the excess over the risk's bound and of its square, cross-fitted.
        cost: mean USD of a query.
        family: which family of policies it comes from.
    """

    rungs: tuple[Rung, ...]
    excess: float
    second_moment: float
    cost: float
    family: str


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on a path: a candidate for each task that leaves the frontier; means are over all tasks of the path."""

    candidates: Mapping[str, Candidate]
    excess: float
    second_moment: float
    cost: float

    @property
    def signal(self) -> float:
        """Mean excess in standard deviations: the lower it is, the fewer rows prove that the mean is below 0."""
        return _signal(self)


Policy = TypeVar("Policy", Candidate, Point)
Path = tuple[Point, ...]
"""Policies by falling cost and, as far as the ordering rows can tell, rising risk."""


def task_paths(table: TaskTable, risk: Risk, seed: int = 0) -> tuple[Path, Path]:
    """The task table (one tier answers everything) and all cascades, each as a path of at most `PATH_LENGTH` policies.

    A candidate must save a larger share of the cost than it loses of the quality: giving no answer at all to as many
    queries would save as much, and no risk budget is a licence for that.

    Args:
        table: ordering split of one task.
        seed: of the folds.
    """
    kept = _kept(table, risk, seed)
    front = _unbeaten(kept)

    def points(candidates: Iterable[Candidate], *, of_table: bool) -> list[Point]:
        mine = (candidate for candidate in candidates if (candidate.family == TASK_TABLE) == of_table)
        return [Point({table.task: c}, c.excess, c.second_moment, c.cost) for c in mine]

    of_table, cascades = (
        _filled(_path(points(front, of_table=first)), points(kept, of_table=first)) for first in (True, False)
    )
    return of_table, cascades


def pooled_paths(tables: Mapping[str, TaskTable], risk: Risk, seed: int = 0) -> tuple[Path, Path]:
    """The same for all tasks as one stream: at each price of risk every task takes what is best for it there."""
    n = sum(map(len, tables.values()))
    if not n:
        return (), ()
    options: dict[str, list[Candidate]] = {}
    for task, table in tables.items():
        at_frontier = np.full(len(table), len(table.tiers) - 1, dtype=np.intp)
        stay = _measured(Answered.of(table, at_frontier, table.cost[:, -1]), risk, (), "")
        options[task] = [stay, *_unbeaten(_kept(table, risk, seed))]
    paths = []
    for families in ((TASK_TABLE,), tuple({c.family for found in options.values() for c in found} - {TASK_TABLE})):
        mine = {task: [c for c in found if c.family in ("", *families)] for task, found in options.items()}
        steps = _in_steps(mine, [dict.fromkeys(mine, 0), *_at_all_prices(mine)])
        points = [_together(mine, places, {task: len(tables[task]) / n for task in mine}) for places in steps]
        paths.append(_path([p for p in points if p.candidates and p.excess <= _margin(risk)]))
    return paths[0], paths[1]


Places = Mapping[str, int]
"""Task -> which of its candidates it takes; 0 is the frontier."""


def _at_all_prices(options: Mapping[str, Sequence[Candidate]]) -> list[Places]:
    """What is best for every task at a price of risk, from dear to cheap."""
    unit = max(found[0].cost for found in options.values()) or 1.0
    prices = unit * np.geomspace(1e4, 0.01, 4 * PATH_LENGTH)
    at = [
        {task: min(range(len(of)), key=lambda i: of[i].cost + price * of[i].excess) for task, of in options.items()}
        for price in prices
    ]
    return list({tuple(places.values()): places for places in at}.values())


def _in_steps(options: Mapping[str, Sequence[Candidate]], corners: Sequence[Places]) -> Iterator[Places]:
    """From corner to corner, one task after the other, through its candidates in between."""
    for before, after in pairwise(corners):
        now = dict(before)
        for task, last in after.items():
            dear, cheap = options[task][now[task]].cost, options[task][last].cost
            between = [i for i, c in enumerate(options[task]) if cheap < c.cost < dear]
            for place in (*sorted(between, key=lambda i: -options[task][i].cost), last):
                now[task] = place
                yield dict(now)


def _together(options: Mapping[str, Sequence[Candidate]], places: Places, share: Mapping[str, float]) -> Point:
    taken = {task: options[task][place] for task, place in places.items()}
    sums = [
        sum(share[task] * getattr(c, name) for task, c in taken.items()) for name in ("excess", "second_moment", "cost")
    ]
    return Point({task: c for task, c in taken.items() if c.rungs}, *sums)


def _signal(policy: Candidate | Point) -> float:
    return policy.excess / sqrt(max(policy.second_moment, 1e-12))


def _path(points: Iterable[Point]) -> Path:
    """The Pareto front, thinned out evenly along the signal."""
    front = _unbeaten(points)
    if len(front) > PATH_LENGTH:
        at = [point.signal for point in front]
        keep = np.unique(np.searchsorted(at, np.linspace(at[0], at[-1], PATH_LENGTH)).clip(0, len(front) - 1))
        front = [front[i] for i in keep]
    return tuple(front)


def _kept(table: TaskTable, risk: Risk, seed: int) -> list[Candidate]:
    """The task table and the most promising ladder at all its thresholds.

    A single ladder: steps from one to another are mostly luck on the rows that order them, and a path is walked only as
    far as its unluckiest step.
    """
    if not len(table) or len(table.tiers) < 2:
        return []
    ladders: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for candidate in _Search(table, risk, seed).candidates():
        ladders[candidate.family, *(rung.tier for rung in candidate.rungs)].append(candidate)
    provable = -PROVABLE / sqrt(len(table))

    def promise(candidates: Sequence[Candidate]) -> tuple[float, float]:
        """The least cost that can probably be certified; where none can, the least signal."""
        signals = [_signal(c) for c in candidates]
        costs = [c.cost for c, signal in zip(candidates, signals, strict=True) if signal <= provable]
        return min(costs, default=inf), min(signals)

    tables = [c for ladder, of in ladders.items() if ladder[0] == TASK_TABLE for c in of]
    cascades = [of for ladder, of in sorted(ladders.items()) if ladder[0] != TASK_TABLE]
    return [*tables, *min(cascades, key=promise, default=[])]


def _unbeaten(policies: Iterable[Policy]) -> list[Policy]:
    """By rising signal, those that are cheaper than all of a lower one."""
    front: list[Policy] = []
    for policy in sorted(policies, key=lambda p: (_signal(p), p.cost)):
        if not front or policy.cost < front[-1].cost:
            front.append(policy)
    return front


def _filled(path: Path, points: Sequence[Point]) -> Path:
    """The path with the thresholds between its steps, and with stricter ones than its first that are no less certain.

    With few rows a front has as many steps as it counts violations. A test that stops between two of them should not
    lose the whole step, and one that fails at the first should not lose everything.
    """
    room = PATH_LENGTH - len(path)
    gaps: list[list[Point]] = []
    for strict, lenient in zip((None, *path), path, strict=False):
        ladder, low = _thresholds(lenient)
        above, high = (ladder, np.full(len(low), inf)) if strict is None else _thresholds(strict)
        dearest = inf if strict is None else strict.cost
        # of accepted answers alone, few are less certain than many
        surest = lenient.signal + 1e-9 if strict is None else inf
        between = [
            point
            for point in points
            if lenient.cost < point.cost < dearest
            and point.signal <= surest
            and (found := _thresholds(point))[0] == ladder == above
            and (low <= found[1]).all()
            and (found[1] <= high).all()
        ]
        gaps.append(sorted(between, key=lambda p: -p.cost))
    every = ceil(sum(map(len, gaps)) / room) if room else 0
    filled: list[Point] = []
    for gap, point in zip(gaps, path, strict=True):
        filled += [*(gap[every - 1 :: every] if every else ()), point]
    return tuple(filled)


def _thresholds(point: Point) -> tuple[tuple[Rung, ...], NDArray[np.float64]]:
    """The ladders of a point without their thresholds, and these."""
    rungs = [rung for candidate in point.candidates.values() for rung in candidate.rungs]
    thresholds = np.array([inf if rung.threshold is None else rung.threshold for rung in rungs])
    return tuple(replace(rung, threshold=None) for rung in rungs), thresholds


def _measured(rows: Answered, risk: Risk, rungs: tuple[Rung, ...], family: str) -> Candidate:
    excess = risk.excess(rows)
    return Candidate(rungs, rows.mean(excess), rows.mean(excess**2), rows.mean(rows.cost), family)


def _margin(risk: Risk) -> float:
    """Estimated excess above which a candidate would hardly ever pass."""
    return 0.25 * min(1 - risk.level, risk.level)


class _Search:
    def __init__(self, table: TaskTable, risk: Risk, seed: int) -> None:
        self.table = table
        self.risk = risk
        self.rows = np.arange(len(table))
        self.folds = (unit_interval(table.units, seed, "fold") * FOLDS).astype(np.intp)
        self.targets = [risk.target(table, column) for column in range(len(table.tiers))]
        self.known: dict[tuple[str, frozenset[str]], Calibrated | None] = {}

    def candidates(self) -> Iterator[Candidate]:
        below = self.table.tiers[:-1]
        for tier in below:
            yield from self._at_all_levels([tier], None, TASK_TABLE)
        ladders: list[tuple[str, ...]] = [(tier,) for tier in below]
        for size in range(1, min(MAX_RUNGS, len(below)) + 1):
            found: dict[tuple[str, ...], float] = {}
            for tiers in ladders:
                mine = self._ladder(tiers, agreement=False)
                if size > 1:
                    mine += self._ladder(tiers, agreement=True)
                found[tiers] = min((candidate.cost for candidate in mine), default=inf)
                yield from mine
            best = sorted(found, key=lambda tiers: found[tiers])[:BEAM]
            longer = {
                tuple(sorted((*tiers, tier), key=below.index)) for tiers in best for tier in below if tier not in tiers
            }
            ladders = sorted(longer)

    def _ladder(self, tiers: tuple[str, ...], *, agreement: bool) -> list[Candidate]:
        steps: list[list[Calibrated]] = []
        for j, tier in enumerate(tiers):
            called = tiers[: j + 1]
            asked = called if agreement else (tier,)
            models = [self._calibrated(name, called if agreement else (name,)) for name in asked]
            steps.append([model for model in models if model is not None])
        if not steps[-1]:
            return []
        # a step without evidence only calls, for what its answer will tell about later ones
        name = "best of all answers, agreement" if agreement else "last answer, own evidence"
        return list(self._at_all_levels(list(tiers), steps, name))

    def _calibrated(self, tier: str, called: tuple[str, ...]) -> Calibrated | None:
        key = (tier, frozenset(called))
        if key not in self.known:
            column = self.table.tiers.index(tier)
            self.known[key] = calibrate(self.table, tier, called, self.targets[column], self.folds)
        return self.known[key]

    def _at_all_levels(
        self, tiers: list[str], steps: Sequence[Sequence[Calibrated]] | None, family: str
    ) -> Iterator[Candidate]:
        if steps is None:
            ladder = judged(self.table, tiers, [[(tiers[0], np.ones(len(self.table)))]])
            thresholds = [np.array([1.0])]
        else:
            # thresholds belong to the confidences that will serve, what they achieve is seen by the cross-fitted ones
            served = judged(self.table, tiers, [[(c.confidence.tier, c.fitted) for c in step] for step in steps])
            ladder = judged(self.table, tiers, [[(c.confidence.tier, c.held_out) for c in step] for step in steps])
            thresholds = [*joint_levels(served)]
            if len(tiers) > 1:
                thresholds += optimal_stopping(self.table, served, self.risk)
        always, margin = self.table.cost[:, -1], _margin(self.risk)
        for levels in thresholds:
            step = stopping_step(ladder.confidence, levels)
            rows = Answered.of(self.table, ladder.column[self.rows, step], ladder.cost[self.rows, step])
            found = _measured(rows, self.risk, (), family)
            if found.excess <= margin and found.cost < (1 - self.risk.lost(rows)) * rows.mean(always):
                yield replace(found, rungs=_rungs(tiers, levels, steps))


def _rungs(
    tiers: Sequence[str], thresholds: NDArray[np.float64], steps: Sequence[Sequence[Calibrated]] | None
) -> tuple[Rung, ...]:
    if steps is None:
        return (Rung(tiers[0]),)
    return tuple(
        Rung(tier, float(min(threshold, 1.0)) if step else 1.0, tuple(c.confidence for c in step))
        for tier, threshold, step in zip(tiers, thresholds, steps, strict=True)
    )
