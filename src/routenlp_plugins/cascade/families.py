"""Families of policies, and what each of them does on the ordering rows.

Everything here is cross-fitted: levels belong to the confidences that will serve, fitted on all rows; what they
achieve is seen by confidences that have not seen the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..evaluate.units import unit_interval
from ..evidence import log_odds
from ..policy import Confidence, Offer, Rung
from .calibration import FOLDS, Calibrated, believe, calibrate
from .candidate import TASK_TABLE, Candidate, Found, Make, margin, measured, promise
from .ladders import best_answer
from .ordering import Ordering
from .risks import Answered, Risk
from .states import BETWEEN, PRICES, Known, Levels, Steps, joint_levels, optimal_levels, walk

__all__ = ["Space", "search"]
MAX_RUNGS = 4
BEAM = 12
SKIPPING = 4
"""Sets of tiers, the most promising, for which ladders that skip are searched too."""
COARSE = 32
"""So many levels are tried of each ladder, all of them of the `REFINED` most promising ones."""
REFINED = 8


@dataclass(frozen=True, slots=True)
class Space:
    """What policies may do, beside climbing a ladder from its first rung.

    Attributes:
        together: look at all answers so far, and return the best of them; if not, each answer is judged alone.
        sized: tolerate a loss in proportion to what the frontier's answer is expected to cost.
        starting: begin at any tier, by what a router predicted.
        skipping: pass over tiers on the way, by that and by the answers so far.
        updating: let answers tell about tiers that are not called yet; if not, only what was predicted does.
    """

    together: bool = True
    sized: bool = True
    starting: bool = True
    skipping: bool = True
    updating: bool = True


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family of ladders looks at.

    Attributes:
        agreement: at all answers so far, and returns the best of them; if not, at the last alone.
        predicted: at what a router predicted.
        sized: tolerates a loss in proportion to what the frontier's answer is expected to cost.
        gated: can skip tiers.
    """

    name: str
    agreement: bool = True
    predicted: bool = False
    sized: bool = False
    gated: bool = False


OWN = _Family("last answer, own evidence", agreement=False)
TOGETHER = _Family("best answer so far")
TOGETHER_SIZED = _Family("best answer so far, by cost", sized=True)
PREDICTED = _Family("best answer so far, predicted", predicted=True)
PREDICTED_SIZED = _Family("best answer so far, predicted, by cost", predicted=True, sized=True)
JOINT = _Family("skipping", predicted=True, gated=True)
JOINT_SIZED = _Family("skipping, by cost", predicted=True, sized=True, gated=True)
ROUTER, ROUTER_SIZED = "router with a price", "router with a price, by cost"


def search(ordering: Ordering, risk: Risk, seed: int, space: Space) -> Iterator[Found]:
    """All policies that are tried on these rows, and save a larger share of the cost than they lose of the quality.

    Of many tasks as one stream only those that know the task by what a router predicted.
    """
    return _Search(ordering, risk, seed, space).policies()


class _Search:
    def __init__(self, ordering: Ordering, risk: Risk, seed: int, space: Space) -> None:
        self.ordering = ordering
        self.space = space
        self.table = ordering.table
        self.risk = risk
        self.folds = (unit_interval(self.table.units, seed, "fold") * FOLDS).astype(np.intp)
        self.targets = [risk.target(self.table, column) for column in range(len(self.table.tiers))]
        self.known: dict[tuple[str, frozenset[str], bool], Calibrated | None] = {}
        self.beliefs: dict[tuple[str, frozenset[str]], Calibrated | None] = {}

    def policies(self) -> Iterator[Found]:
        one_task = len(self.ordering.expected) == 1
        predicted, sized = bool(self.table.difficulty), self.ordering.sized and self.space.sized
        families = []
        if one_task:
            yield from self._task_table()
            families = [OWN, TOGETHER, *([TOGETHER_SIZED] if sized else [])] if self.space.together else [OWN]
        if predicted:
            families += [PREDICTED, *([PREDICTED_SIZED] if sized else [])]
        if predicted and self.space.starting:
            yield from self._router(ROUTER, sized=False)
            if sized:
                yield from self._router(ROUTER_SIZED, sized=True)
        if predicted and not self._judged:
            # calls tell nothing, so that all is decided before them
            families = []
        coarse, promising = self._climbing(families)
        if predicted and self.space.skipping:
            skipping = (JOINT, *([JOINT_SIZED] if sized else []))
            coarse |= {(f, t): self._ladder(f, t, coarse=True) for t in promising[:SKIPPING] for f in skipping}
        ranked = [key for key, policies in coarse.items() if policies]
        for family, tiers in sorted(ranked, key=lambda key: promise(coarse[key], len(self.table)))[:REFINED]:
            yield from self._ladder(family, tiers, coarse=False)

    def _climbing(
        self, families: Sequence[_Family]
    ) -> tuple[dict[tuple[_Family, tuple[str, ...]], list[Found]], list[tuple[str, ...]]]:
        """A coarse look at ladders that are climbed step by step, and sets of tiers, the most promising first.

        Those of one tier more are made of the best `BEAM`.
        """
        below = self.table.tiers[:-1]
        coarse: dict[tuple[_Family, tuple[str, ...]], list[Found]] = {}
        promising: dict[tuple[str, ...], float] = {}
        ladders: list[tuple[str, ...]] = [(tier,) for tier in below]
        for size in range(1, min(MAX_RUNGS if families else 1, len(below)) + 1):
            found: dict[tuple[str, ...], float] = {}
            for tiers in ladders:
                for family in families:
                    # with one tier there is nothing to agree with
                    if size > 1 or family != TOGETHER:
                        coarse[family, tiers] = self._ladder(family, tiers, coarse=True)
                mine = [policy for family in families for policy in coarse.get((family, tiers), [])]
                found[tiers] = min((policy.cost for policy in mine), default=inf)
            promising |= found
            best = sorted(found, key=lambda tiers: found[tiers])[:BEAM]
            longer = ((*tiers, tier) for tiers in best for tier in below if tier not in tiers)
            ladders = sorted({tuple(sorted(tiers, key=below.index)) for tiers in longer})
        return coarse, sorted(promising, key=lambda tiers: (promising[tiers], len(tiers)))

    @property
    def _judged(self) -> bool:
        """Whether there is any evidence of answers."""
        return bool(self.table.evidence or self.table.agreement)

    def _task_table(self) -> Iterator[Found]:
        for tier in self.table.tiers[:-1]:
            candidate = Candidate((Rung(tier),), TASK_TABLE)
            answered, cost = candidate.climb(self.table)
            make = partial(_one_tier, candidate)
            yield from self._worth_it(answered, cost, (TASK_TABLE, tier), np.zeros(0), make)

    def _router(self, name: str, *, sized: bool) -> Iterator[Found]:
        """To each query the tier with the most belief less a price times its expected cost; its answer is accepted."""
        table = self.table
        beliefs = {tier: self._belief(tier, ()) for tier in table.tiers[:-1]}
        known = {tier: belief for tier, belief in beliefs.items() if belief is not None}
        tiers = list(known)
        if not tiers:
            return
        stay = Confidence(table.tiers[-1], (), log_odds(self.risk.lossless))
        cost = np.column_stack([self._expected_cost(tier, sized=sized) for tier in (*tiers, table.tiers[-1])])
        held_out = np.column_stack([b.held_out for b in known.values()] + [np.full(len(table), self.risk.lossless)])
        confidences = [*(belief.confidence for belief in known.values()), stay]
        columns = np.array([table.tiers.index(confidence.tier) for confidence in confidences], dtype=np.intp)
        for price in np.geomspace(1e-3, 10, PRICES * BETWEEN):
            worth = np.where(np.isnan(held_out), -inf, held_out - price * cost)
            answered, spent = self._started(columns[worth.argmax(axis=1)], tiers)
            make = partial(self._offered, name, tiers, confidences, float(price), sized=sized)
            yield from self._worth_it(answered, spent, (name, *tiers), np.array([price]), make)

    def _expected_cost(self, tier: str, *, sized: bool) -> NDArray[np.float64]:
        """(n,) of a call, in units of the frontier's mean; infinite where the tier may not be called."""
        price = {task: self._price(task, tier, sized=sized) for task in self.ordering.mean_cost}
        names = sorted(price)
        cost = np.array([price[task] for task in names])[np.searchsorted(names, self.ordering.tasks)]
        return cost * self.ordering.relative_cost if sized else cost

    def _price(self, task: str, tier: str, *, sized: bool) -> float:
        """Of a call, in units of the frontier's mean: for a relative cost of 1 if sized, else for the task's mean."""
        of_task = self.ordering.mean_cost[task]
        frontier = of_task[self.table.tiers[-1]] / self.ordering.unit if sized else 1.0
        return of_task.get(tier, inf) / self.ordering.unit / (frontier or 1.0)

    def _started(self, column: NDArray[np.intp], tiers: Sequence[str]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """What it comes to if these tiers are called; after one that failed the next dearer one is."""
        table, last = self.table, len(self.table.tiers) - 1
        column, cost = np.where(table.supported, column, last), np.zeros(len(table))
        below = [table.tiers.index(tier) for tier in tiers]
        for place, k in enumerate(below):
            at = column == k
            cost[at] += table.cost[at, k]
            for other in reversed([*below[place + 1 :], last]):
                may = other == last or self.ordering.allowed[:, other]
                column = np.where(at & table.tried[:, k] & ~table.answered[:, k] & may, other, column)
        escalated = column == last
        cost[escalated] += table.cost[escalated, -1]
        return column, cost

    def _offered(
        self,
        name: str,
        tiers: Sequence[str],
        confidences: Sequence[Confidence],
        price: float,
        task: str,
        *,
        sized: bool,
    ) -> Candidate:
        mine = [c for c in confidences if c.tier in self.ordering.mean_cost[task]]
        offers = tuple(Offer(c.tier, c, price * self._price(task, c.tier, sized=sized)) for c in mine)
        rungs = tuple(Rung(tier) for tier in tiers if tier in self.ordering.mean_cost[task])
        return Candidate(rungs, name, offers, self.ordering.expected[task] if sized else None)

    def _ladder(self, family: _Family, tiers: tuple[str, ...], *, coarse: bool) -> list[Found]:
        steps = Steps.of(self.table, tiers, self.ordering.allowed, gated=family.gated)
        if not family.gated and not steps.allowed.all():
            return []
        models = {
            state | 1 << place: self._models(family, tiers, state | 1 << place)
            for place in range(len(tiers))
            for state in steps.before(place)
        }
        if not models[(1 << len(tiers)) - 1]:
            # a step without evidence only calls, for what its answer will tell about later ones
            return []
        beliefs: dict[tuple[int, int], Calibrated] = {}
        if family.gated:
            for place, tier in enumerate(tiers):
                for state in steps.before(place):
                    belief = self._belief(tier, _members(tiers, state) if self.space.updating else ())
                    if belief is not None:
                        beliefs[place, state] = belief
        served, held_out = (self._known(family, models, beliefs, kind) for kind in ("fitted", "held_out"))
        levels = [] if family.gated else list(joint_levels(served))
        if coarse and levels:
            levels = [levels[i] for i in np.unique(np.linspace(0, len(levels) - 1, COARSE).astype(np.intp))]
        if len(tiers) > 1 or family.gated or family.sized:
            levels += optimal_levels(steps, served, coarse=coarse)
        found: list[Found] = []
        for some in levels:
            answered, cost = walk(steps, held_out, some)
            make = partial(self._climbed, family, tiers, models, beliefs, served, some)
            found += self._worth_it(answered, cost, (family.name, *tiers), some.values, make)
        return found

    def _models(self, family: _Family, tiers: tuple[str, ...], state: int) -> list[Calibrated]:
        called = _members(tiers, state)
        asked = called if family.agreement else called[-1:]
        models = [self._calibrated(tier, called if family.agreement else (tier,), family.predicted) for tier in asked]
        return [model for model in models if model is not None]

    def _calibrated(self, tier: str, called: tuple[str, ...], predicted: bool) -> Calibrated | None:
        key = (tier, frozenset(called), predicted)
        if key not in self.known:
            target = self.targets[self.table.tiers.index(tier)]
            self.known[key] = calibrate(self.table, tier, called, target, self.folds, predicted=predicted)
        return self.known[key]

    def _belief(self, tier: str, called: tuple[str, ...]) -> Calibrated | None:
        key = (tier, frozenset(called))
        if key not in self.beliefs:
            target = self.targets[self.table.tiers.index(tier)]
            self.beliefs[key] = believe(self.table, tier, called, target, self.folds)
        return self.beliefs[key]

    def _known(
        self,
        family: _Family,
        models: Mapping[int, Sequence[Calibrated]],
        beliefs: Mapping[tuple[int, int], Calibrated],
        kind: Literal["fitted", "held_out"],
    ) -> Known:
        worth, excess, column = {}, {}, {}
        for state, asked in models.items():
            if asked:
                judged = [(model.confidence.tier, getattr(model, kind)) for model in asked]
                column[state], confidence = best_answer(self.table, judged)
            else:
                column[state] = np.zeros(len(self.table), dtype=np.intp)
                confidence = np.full(len(self.table), -inf)
            worth[state] = self._worth(family, confidence)
            excess[state] = self.risk.expected_excess(np.clip(confidence, 0.0, 1.0))
        believed = {gate: self._worth(family, getattr(belief, kind)) for gate, belief in beliefs.items()}
        return Known(worth, excess, column, believed)

    def _worth(self, family: _Family, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        if not family.sized:
            return confidence
        lossless = self.risk.lossless
        return np.asarray(lossless - (lossless - confidence) / self.ordering.relative_cost)

    def _climbed(
        self,
        family: _Family,
        tiers: tuple[str, ...],
        models: Mapping[int, Sequence[Calibrated]],
        beliefs: Mapping[tuple[int, int], Calibrated],
        served: Known,
        levels: Levels,
        task: str,
    ) -> Candidate:
        """The rungs of a ladder for one task: those of its tiers, in the states that can be reached."""
        rungs: list[Rung] = []
        reached = {0}
        for place, tier in enumerate(tiers):
            if tier not in self.ordering.mean_cost[task]:
                continue
            onward = set(reached) if family.gated else set()
            for state in sorted(reached):
                gate, after = (place, state), state | 1 << place
                rung = Rung(tier, 1.0, after=_members(tiers, state) if family.gated else None)
                if gate in levels.gates:
                    belief, level = served.belief[gate], levels.gates[gate]
                    if level > np.nanmax(belief):
                        continue
                    if level > np.nanmin(belief) or np.isnan(belief).any():
                        rung = replace(
                            rung,
                            belief=beliefs[gate].confidence,
                            level=self._bounded(family, level),
                            lossless=self._lossless(family),
                        )
                if models[after] and levels.thresholds[after] <= served.worth[after].max():
                    rung = replace(
                        rung,
                        threshold=self._bounded(family, levels.thresholds[after]),
                        confidences=tuple(model.confidence for model in models[after]),
                        lossless=self._lossless(family),
                    )
                rungs.append(rung)
                onward.add(after)
            reached = onward
        return Candidate(tuple(rungs), family.name, (), self.ordering.expected[task] if family.sized else None)

    def _lossless(self, family: _Family) -> float | None:
        return self.risk.lossless if family.sized else None

    def _bounded(self, family: _Family, level: float) -> float:
        return level if family.sized else float(np.clip(level, 0.0, 1.0))

    def _worth_it(
        self,
        answered: NDArray[np.intp],
        cost: NDArray[np.float64],
        ladder: tuple[str, ...],
        levels: NDArray[np.float64],
        make: Make,
    ) -> Iterator[Found]:
        rows = Answered.of(self.table, answered, cost)
        found = measured(rows, self.risk, ladder, levels, make)
        always = rows.mean(self.table.cost[:, -1])
        if found.excess <= margin(self.risk) and found.cost < (1 - self.risk.lost(rows)) * always:
            yield found


def _one_tier(candidate: Candidate, task: str) -> Candidate:
    return candidate


def _members(tiers: Sequence[str], state: int) -> tuple[str, ...]:
    return tuple(tier for place, tier in enumerate(tiers) if state >> place & 1)
