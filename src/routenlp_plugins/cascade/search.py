"""From the ordering split to a short path of joint policies, safest first.

Everything here is cross-fitted: a row is judged by confidences that have not seen it. What is kept is the Pareto
front of cost and risk over all families; its confidences are then fitted on all rows of the split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..evaluate.table import TaskTable, unit_interval
from ..types import Rung
from .calibration import FOLDS, Calibrated, calibrate
from .ladders import joint_levels, judged, optimal_stopping, stopping_step
from .risks import Answered, Risk

__all__ = ["Candidate", "Path", "Point", "pooled_paths", "task_paths"]

MAX_RUNGS = 4
PATH_LENGTH = 50
BEAM = 12
LADDERS = 3
"""Ladders on a path: the more there are, the more of its steps are luck and not thresholds."""
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
"""Policies by rising risk and falling cost."""


def task_paths(table: TaskTable, risk: Risk, seed: int = 0) -> tuple[Path, Path]:
    """The task table (one tier answers everything) and all cascades, each as a path of at most `PATH_LENGTH` policies.

    A candidate must save a larger share of the cost than it loses of the quality: giving no answer at all to as many
    queries would save as much, and no risk budget is a licence for that.

    Args:
        table: ordering split of one task.
        seed: of the folds.
    """
    front = _front(table, risk, seed)
    points = [Point({table.task: c}, c.excess, c.second_moment, c.cost) for c in front]
    return (
        _path([point for point, c in zip(points, front, strict=True) if c.family == TASK_TABLE]),
        _path([point for point, c in zip(points, front, strict=True) if c.family != TASK_TABLE]),
    )


def pooled_paths(tables: Mapping[str, TaskTable], risk: Risk, seed: int = 0) -> tuple[Path, Path]:
    """The same for all tasks as one stream: at each price of risk every task takes what is best for it there."""
    n = sum(map(len, tables.values()))
    options: dict[str, list[Candidate]] = {}
    for task, table in tables.items():
        at_frontier = np.full(len(table), len(table.tiers) - 1, dtype=np.intp)
        stay = _measured(Answered.of(table, at_frontier, table.cost[:, -1]), risk, (), "")
        options[task] = [stay, *_front(table, risk, seed)]
    paths = []
    for families in ((TASK_TABLE,), tuple({c.family for found in options.values() for c in found} - {TASK_TABLE})):
        points: dict[tuple[int, ...], Point] = {}
        mine = {task: [c for c in found if c.family in ("", *families)] for task, found in options.items()}
        unit = max(found[0].cost for found in mine.values()) or 1.0
        for price in unit * np.geomspace(0.01, 1e4, 4 * PATH_LENGTH):
            best = {task: min(found, key=lambda c: c.cost + price * c.excess) for task, found in mine.items()}
            key = tuple(mine[task].index(c) for task, c in best.items())
            if any(key) and key not in points:
                share = {task: len(tables[task]) / n for task in best}
                sums = [
                    sum(share[task] * getattr(c, name) for task, c in best.items())
                    for name in ("excess", "second_moment", "cost")
                ]
                points[key] = Point({task: c for task, c in best.items() if c.rungs}, *sums)
        paths.append(_path([p for p in points.values() if p.excess <= _margin(risk)]))
    return paths[0], paths[1]


def _signal(policy: Candidate | Point) -> float:
    return policy.excess / sqrt(max(policy.second_moment, 1e-12))


def _path(points: Iterable[Point]) -> Path:
    """The Pareto front, thinned out evenly along the signal."""
    front = _unbeaten(sorted(points, key=lambda p: (p.signal, p.cost)))
    if len(front) > PATH_LENGTH:
        at = [point.signal for point in front]
        keep = np.unique(np.searchsorted(at, np.linspace(at[0], at[-1], PATH_LENGTH)).clip(0, len(front) - 1))
        front = [front[i] for i in keep]
    return tuple(front)


def _front(table: TaskTable, risk: Risk, seed: int) -> list[Candidate]:
    """Of the task table and the most promising ladders, what no other beats in both cost and signal."""
    if not len(table) or len(table.tiers) < 2:
        return []
    ladders: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for candidate in _Search(table, risk, seed).candidates():
        ladders[candidate.family, *(rung.tier for rung in candidate.rungs)].append(candidate)
    provable = -PROVABLE / sqrt(len(table))

    def promise(ladder: tuple[str, ...]) -> tuple[float, float]:
        """The least cost that can probably be certified; where none can, the least signal."""
        signals = [_signal(c) for c in ladders[ladder]]
        costs = [c.cost for c, signal in zip(ladders[ladder], signals, strict=True) if signal <= provable]
        return min(costs, default=inf), min(signals)

    cascades = sorted((ladder for ladder in ladders if ladder[0] != TASK_TABLE), key=promise)[:LADDERS]
    tables = [ladder for ladder in ladders if ladder[0] == TASK_TABLE]
    kept = [candidate for ladder in (*tables, *cascades) for candidate in ladders[ladder]]
    return _unbeaten(sorted(kept, key=lambda c: (_signal(c), c.cost, len(c.rungs))))


def _unbeaten(by_signal: Iterable[Policy]) -> list[Policy]:
    """Of policies in order of their signal, those that are cheaper than all before them."""
    front: list[Policy] = []
    for policy in by_signal:
        if not front or policy.cost < front[-1].cost:
            front.append(policy)
    return front


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
