"""From the ordering split to short paths of policies, safest first.

What is kept is the Pareto front of cost and risk over all families (`families.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf
from typing import TypeVar

import numpy as np

from ..evaluate.table import TaskTable
from .candidate import TASK_TABLE, Candidate, Found, Measured, margin, measured, promise, signal
from .families import Space, search
from .ordering import Ordering
from .risks import Answered, Risk

__all__ = ["Path", "Point", "pooled_paths", "task_paths"]

PATH_LENGTH = 50
WORTHWHILE = 0.01
"""Share of the cost that a path has to save at its end; to prove one that saves less would only cost delta."""


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
        return signal(self)


Policy = TypeVar("Policy", bound=Measured)
Path = tuple[Point, ...]
"""Policies by falling cost and, as far as the ordering rows can tell, rising risk."""


def task_paths(table: TaskTable, risk: Risk, seed: int = 0, space: Space | None = None) -> tuple[Path, Path]:
    """The task table (one tier answers everything) and all else, each as a path of at most `PATH_LENGTH` policies.

    A candidate must save a larger share of the cost than it loses of the quality: giving no answer at all to as many
    queries would save as much, and no risk budget is a licence for that.

    Args:
        table: ordering split of one task.
        seed: of the folds.
        space: what policies may do; None is everything.
    """
    kept = _kept(Ordering.of({table.task: table}), risk, seed, space) if len(table) and len(table.tiers) > 1 else []
    front = _unbeaten(kept)
    of_table, others = (
        _filled(_thinned(_of_table(front, wanted)), _of_table(kept, wanted)) for wanted in (True, False)
    )
    tables = {table.task: table}
    return _path(of_table, tables), _path(others, tables)


def pooled_paths(
    tables: Mapping[str, TaskTable], risk: Risk, seed: int = 0, space: Space | None = None
) -> tuple[Path, Path]:
    """The same for all tasks as one stream.

    At each price of risk every task takes what is best for it there; or all tasks climb one ladder, which knows the
    task by what a router predicted, whichever is the more promising.
    """
    tables = {task: table for task, table in tables.items() if len(table)}
    n = sum(map(len, tables.values()))
    weight = {task: float(table.weights.sum()) for task, table in tables.items()}
    share = {task: of / sum(weight.values()) for task, of in weight.items()}
    if len(tables) < 2:
        return task_paths(next(iter(tables.values())), risk, seed, space) if tables else ((), ())
    options: dict[str, list[Found]] = {}
    for task, table in tables.items():
        at_frontier = np.full(len(table), len(table.tiers) - 1, dtype=np.intp)
        rows = Answered.of(table, at_frontier, table.cost[:, -1])
        stay = measured(rows, risk, ("", task), np.zeros(0), lambda task: Candidate((), ""))
        alone = Ordering.of({task: replace(table, difficulty={})})
        kept = _kept(alone, risk, seed, space) if len(table.tiers) > 1 else []
        options[task] = [stay, *_unbeaten(kept)]
    paths = []
    for wanted in (True, False):
        mine = {task: [found[0], *_of_table(found[1:], wanted)] for task, found in options.items()}
        steps = _in_steps(mine, [dict.fromkeys(mine, 0), *_at_all_prices(mine)])
        points = [_together(mine, places, share) for places in steps]
        good = (p for p in points if p.candidates and p.excess <= margin(risk))
        paths.append(_worthwhile(_thinned(_unbeaten(good)), tables))
    of_table, by_task = paths
    if all(table.difficulty for table in tables.values()):
        stream = _kept(Ordering.of(tables), risk, seed, space)
        as_one = _path(_filled(_thinned(_unbeaten(stream)), stream), tables)
        by_task = min([path for path in (by_task, as_one) if path], key=lambda p: promise(p, n), default=())
    return of_table, by_task


def _of_table(policies: Sequence[Found], wanted: bool) -> list[Found]:
    return [policy for policy in policies if (policy.family == TASK_TABLE) == wanted]


def _path(policies: Sequence[Found], tables: Mapping[str, TaskTable]) -> Path:
    points = []
    for policy in policies:
        made = {task: policy.make(task) for task in tables}
        routed = {task: candidate for task, candidate in made.items() if candidate.rungs}
        points.append(Point(routed, policy.excess, policy.second_moment, policy.cost))
    return _worthwhile([point for point in points if point.candidates], tables)


def _worthwhile(path: Sequence[Point], tables: Mapping[str, TaskTable]) -> Path:
    """The path, if what it ends with saves anything worth a proof."""
    cost, weights = (
        np.concatenate(of) for of in zip(*((t.cost[:, -1], t.weights) for t in tables.values()), strict=True)
    )
    least = min((point.cost for point in path), default=inf)
    return tuple(path) if least <= (1 - WORTHWHILE) * np.average(cost, weights=weights) else ()


Places = Mapping[str, int]
"""Task -> which of its candidates it takes; 0 is the frontier."""


def _at_all_prices(options: Mapping[str, Sequence[Found]]) -> list[Places]:
    """What is best for every task at a price of risk, from dear to cheap."""
    unit = max(found[0].cost for found in options.values()) or 1.0
    prices = unit * np.geomspace(1e4, 0.01, 4 * PATH_LENGTH)
    at = [
        {task: min(range(len(of)), key=lambda i: of[i].cost + price * of[i].excess) for task, of in options.items()}
        for price in prices
    ]
    return list({tuple(places.values()): places for places in at}.values())


def _in_steps(options: Mapping[str, Sequence[Found]], corners: Sequence[Places]) -> Iterator[Places]:
    """From corner to corner, one task after the other, through its candidates in between."""
    for before, after in pairwise(corners):
        now = dict(before)
        for task, last in after.items():
            dear, cheap = options[task][now[task]].cost, options[task][last].cost
            between = [i for i, c in enumerate(options[task]) if cheap < c.cost < dear]
            for place in (*sorted(between, key=lambda i: -options[task][i].cost), last):
                now[task] = place
                yield dict(now)


def _together(options: Mapping[str, Sequence[Found]], places: Places, share: Mapping[str, float]) -> Point:
    taken = {task: options[task][place] for task, place in places.items()}
    sums = [
        sum(share[task] * getattr(c, name) for task, c in taken.items()) for name in ("excess", "second_moment", "cost")
    ]
    made = {task: policy.make(task) for task, policy in taken.items()}
    return Point({task: candidate for task, candidate in made.items() if candidate.rungs}, *sums)


def _thinned(front: Sequence[Policy]) -> Sequence[Policy]:
    """Of a Pareto front, at most `PATH_LENGTH` policies, evenly along the signal."""
    if len(front) <= PATH_LENGTH:
        return front
    at = [signal(policy) for policy in front]
    keep = np.unique(np.searchsorted(at, np.linspace(at[0], at[-1], PATH_LENGTH)).clip(0, len(front) - 1))
    return [front[i] for i in keep]


def _kept(ordering: Ordering, risk: Risk, seed: int, space: Space | None) -> list[Found]:
    """The task table and the most promising ladder at all its levels.

    A single ladder: steps from one to another are mostly luck on the rows that order them, and a path is walked only as
    far as its unluckiest step.
    """
    ladders: dict[tuple[str, ...], list[Found]] = defaultdict(list)
    for policy in search(ordering, risk, seed, space or Space()):
        ladders[policy.ladder].append(policy)
    tables = [policy for of in ladders.values() for policy in _of_table(of, wanted=True)]
    others = [of for ladder, of in sorted(ladders.items()) if ladder[0] != TASK_TABLE]
    return [*tables, *min(others, key=lambda of: promise(of, len(ordering.table)), default=[])]


def _unbeaten(policies: Iterable[Policy]) -> list[Policy]:
    """By rising signal, those that are cheaper than all of a lower one."""
    front: list[Policy] = []
    for policy in sorted(policies, key=lambda p: (signal(p), p.cost)):
        if not front or policy.cost < front[-1].cost:
            front.append(policy)
    return front


def _filled(path: Sequence[Found], policies: Sequence[Found]) -> list[Found]:
    """The path with the levels between its steps, and with stricter ones than its first that are no less certain.

    With few rows a front has as many steps as it counts violations. A test that stops between two of them should not
    lose the whole step, and one that fails at the first should not lose everything.
    """
    room = PATH_LENGTH - len(path)
    gaps: list[list[Found]] = []
    for strict, lenient in zip((None, *path), path, strict=False):
        low = lenient.levels
        high, above = (np.full(len(low), inf), lenient.ladder) if strict is None else (strict.levels, strict.ladder)
        dearest = inf if strict is None else strict.cost
        # of accepted answers alone, few are less certain than many
        surest = signal(lenient) + 1e-9 if strict is None else inf
        between = [
            policy
            for policy in policies
            if lenient.cost < policy.cost < dearest
            and signal(policy) <= surest
            and policy.ladder == lenient.ladder == above
            and (low <= policy.levels).all()
            and (policy.levels <= high).all()
        ]
        gaps.append(sorted(between, key=lambda policy: -policy.cost))
    every = ceil(sum(map(len, gaps)) / room) if room else 0
    filled: list[Found] = []
    for gap, policy in zip(gaps, path, strict=True):
        filled += [*(gap[every - 1 :: every] if every else ()), policy]
    return filled
