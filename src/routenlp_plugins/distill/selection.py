"""Which failures to teach: those that would save most for what teaching them costs."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..types import Query

__all__ = ["SELECTIONS", "Budget", "Candidates", "Selection", "coverage", "covered"]

SHARPNESS = 4
"""Power of the cosine by which a lesson speaks for a query like it."""
CONVINCES = 0.8
"""Chance that the same question, taught once more, is answered right."""
NEIGHBOURS = 64
"""Lessons that may speak for a query: the nearest ones."""
ROWS = 512
"""Candidates that are compared with all lessons at once."""
TOP = 5
"""Clusters that size x gap teaches (RouteNLP, algorithm 1)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a round may teach.

    Attributes:
        lessons: of a student, at most.
        usd: for answers of the teacher that were not paid already; None is no limit.
    """

    lessons: int = 400
    usd: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lessons, bool) or not isinstance(self.lessons, int) or self.lessons < 1:
            raise DataError(f"budget: lessons must be 1, 2, ..., got {self.lessons!r}")
        if self.usd is not None and (not isinstance(self.usd, int | float) or not self.usd >= 0):
            raise DataError(f"budget: usd must be at least 0, or None for no limit, got {self.usd!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """n queries of a student's traffic that may be taught.

    Attributes:
        queries: n of them.
        vectors: (n, d), of length 1.
        answers: (n,) the teacher's answer; None where it was not asked.
        right: (n,) quality of the student's own answer against it, in [0, 1]; NaN where one of them is not known.
        confidence: (n,) of the student in its answer; NaN where it gave none.
        escalated: (n,) whether it was paid for twice, or the frontier was asked at once.
        saving: (n,) USD that the query would cost less, had the student's answer been returned.
        price: (n,) USD that the teacher's answer still costs; 0 where it was paid already.
        cluster: (n,) of failures.
        agreement: (task, answer, answer) -> how far they say the same, cheaply: it is asked of very many.
    """

    queries: Sequence[Query]
    vectors: NDArray[np.float32]
    answers: Sequence[str | None]
    right: NDArray[np.float64]
    confidence: NDArray[np.float64]
    escalated: NDArray[np.bool_]
    saving: NDArray[np.float64]
    price: NDArray[np.float64]
    cluster: NDArray[np.intp]
    agreement: Callable[[str, str, str], float]

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def failed(self) -> NDArray[np.float64]:
        """(n,) how far the student's answer fell short; 0 where that is not known."""
        return 1 - np.where(np.isnan(self.right), 1.0, self.right)


Selection = Callable[[Candidates, Budget, int], list[int]]
"""(candidates, budget, seed) -> places of what is taught, in order."""


def covered(
    of: Candidates, lessons: Sequence[int], known: tuple[NDArray[np.float32], Sequence[str]] | None = None
) -> NDArray[np.float64]:
    """(n,) in [0, 1): how far lessons speak for each escalated candidate: like questions, the same answers.

    Args:
        lessons: places of candidates that are taught.
        known: (m, d) vectors and m answers of what the student was taught before.
    """
    places = np.flatnonzero(of.escalated)
    left = np.ones(len(of)) if known is None else _doubts(of, places, *known)
    taught = [of.answers[place] for place in lessons]
    return 1 - left * _doubts(of, places, of.vectors[list(lessons)], taught)


def coverage(
    of: Candidates, budget: Budget, seed: int, known: tuple[NDArray[np.float32], Sequence[str]] | None = None
) -> list[int]:
    """Each lesson by the saving that it adds for what it costs.

    Every lesson j independently convinces the student of query i with probability ``k(i, j) = 0.8 * max(cosine, 0)**4
    * agreement of the teacher's answers``. So what lessons S save is expected to be ``sum_i saving_i * (1 - prod_{j in
    S} (1 - k(i, j)))`` over what was escalated: what no lesson can teach, since like questions have other answers,
    counts little, and a second lesson of a kind adds less than the first. This is a monotone submodular function, whose
    greedy maximum for a number of lessons is within 1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978), and
    within half of that with a budget in USD. Ties are broken by the seed.
    """
    choices = np.flatnonzero(of.escalated | (of.failed > 0))
    order = np.random.default_rng(seed).permutation(choices)
    return _greedy(of, order, budget.lessons, budget.usd, 1 - covered(of, [], known))


def random_traffic(of: Candidates, budget: Budget, seed: int) -> list[int]:
    """As many of all queries."""
    return _within(of, np.random.default_rng(seed).permutation(len(of)), budget.lessons, budget.usd)


def random_escalated(of: Candidates, budget: Budget, seed: int) -> list[int]:
    """As many of what was escalated."""
    places = np.random.default_rng(seed).permutation(np.flatnonzero(of.escalated))
    return _within(of, places, budget.lessons, budget.usd)


def random_failures(of: Candidates, budget: Budget, seed: int) -> list[int]:
    """As many of what the student got wrong."""
    places = np.random.default_rng(seed).permutation(np.flatnonzero(of.failed > 0))
    return _within(of, places, budget.lessons, budget.usd)


def uncertainty(of: Candidates, budget: Budget, seed: int) -> list[int]:
    """What the student is least sure of (Lewis and Gale 1994); answers without a confidence come first."""
    ties = np.random.default_rng(seed).random(len(of))
    order = np.lexsort((ties, np.where(np.isnan(of.confidence), -1.0, of.confidence)))
    return _within(of, order, budget.lessons, budget.usd)


def size_times_gap(of: Candidates, budget: Budget, seed: int) -> list[int]:
    """At random from the five clusters with the largest size x mean gap (RouteNLP, algorithm 1)."""
    gaps = {int(c): float(of.failed[of.cluster == c].sum()) for c in np.unique(of.cluster) if c >= 0}
    top = sorted(gaps, key=lambda c: (-gaps[c], c))[:TOP]
    places = np.flatnonzero(np.isin(of.cluster, top) & of.escalated)
    return _within(of, np.random.default_rng(seed).permutation(places), budget.lessons, budget.usd)


SELECTIONS: Mapping[str, Selection] = {
    "coverage": coverage,
    "random": random_traffic,
    "random escalated": random_escalated,
    "random failures": random_failures,
    "uncertainty": uncertainty,
    "size x gap": size_times_gap,
}


def _within(of: Candidates, places: Sequence[int] | NDArray[np.intp], most: int, usd: float | None) -> list[int]:
    """The first of these places that the budget allows."""
    chosen: list[int] = []
    left = np.inf if usd is None else usd
    for place in (int(place) for place in places):
        if len(chosen) >= most:
            break
        if of.price[place] <= left:
            left -= float(of.price[place])
            chosen.append(place)
    return chosen


def _doubts(
    of: Candidates, places: NDArray[np.intp], vectors: NDArray[np.float32], answers: Sequence[str | None]
) -> NDArray[np.float64]:
    """(n,) the chance that none of these lessons convinces the student of the candidates at these places; else 1."""
    left = np.ones(len(of))
    if len(answers) and len(places):
        rows, _, words = _words(of, places, vectors, answers)
        np.multiply.at(left, rows, 1 - words)
    return left


def _words(
    of: Candidates, places: NDArray[np.intp], vectors: NDArray[np.float32], answers: Sequence[str | None]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Candidate, lesson and k, of the lessons nearest to each of these candidates."""
    most = min(NEIGHBOURS, len(answers))
    nearest, similar = [], []
    for start in range(0, len(places), ROWS):
        cosine = np.maximum(of.vectors[places[start : start + ROWS]] @ vectors.T, 0.0)
        some = np.argpartition(-cosine, most - 1, axis=1)[:, :most]
        nearest.append(some)
        similar.append(np.take_along_axis(cosine, some, axis=1))
    columns = np.concatenate(nearest).ravel()
    rows = np.repeat(places, most)
    said: dict[tuple[str | None, str, str], float] = {}

    def agreement(row: int, column: int) -> float:
        one, other = of.answers[row], answers[column]
        if one is None or other is None:
            return 1.0
        key = of.queries[row].task, other, one
        if key not in said:
            said[key] = of.agreement(of.queries[row].task or "", other, one)
        return said[key]

    agreed = np.array([agreement(r, c) for r, c in zip(rows.tolist(), columns.tolist(), strict=True)])
    alike = np.minimum(np.concatenate(similar).ravel().astype(np.float64), 1.0)
    return rows, columns, CONVINCES * alike**SHARPNESS * agreed


def _greedy(
    of: Candidates, choices: NDArray[np.intp], most: int, usd: float | None, doubts: NDArray[np.float64]
) -> list[int]:
    """By gain; within a budget in USD by gain per USD too, and the better of both (Leskovec et al. 2007)."""
    plain, worth = _lazily(of, choices, most, usd, doubts, per_usd=False)
    if usd is None or not (of.price[choices] > 0).any():
        return plain
    by_price, other = _lazily(of, choices, most, usd, doubts, per_usd=True)
    return plain if worth >= other else by_price


def _lazily(
    of: Candidates,
    choices: NDArray[np.intp],
    most: int,
    usd: float | None,
    doubts: NDArray[np.float64],
    *,
    per_usd: bool,
) -> tuple[list[int], float]:
    """Lazy greedy maximum (Minoux 1978) of the saving, and how much that is; what saves nothing is not chosen."""
    weight = of.saving * of.escalated
    places = np.flatnonzero(weight > 0)
    if not len(choices) or not len(places) or most <= 0:
        return [], 0.0
    rows, columns, words = _words(of, places, of.vectors[choices], [of.answers[place] for place in choices])
    order = np.argsort(columns, kind="stable")
    bounds = np.searchsorted(columns[order], np.arange(len(choices) + 1))
    left = doubts.copy()
    price = of.price[choices]
    # what is paid already costs next to nothing
    least = float(price[price > 0].min()) / 100 if per_usd else 1.0
    per = np.maximum(price, least) if per_usd else np.ones(len(choices))

    def gain(choice: int) -> float:
        mine = order[bounds[choice] : bounds[choice + 1]]
        return float((weight[rows[mine]] * left[rows[mine]] * words[mine]).sum() / per[choice])

    queue = [(-gain(choice), choice) for choice in range(len(choices))]
    heapq.heapify(queue)
    chosen: list[int] = []
    purse, worth = np.inf if usd is None else usd, 0.0
    while queue and len(chosen) < most:
        _, choice = heapq.heappop(queue)
        now = -gain(choice)
        if queue and now > queue[0][0]:
            heapq.heappush(queue, (now, choice))
            continue
        if now >= 0:
            break
        if price[choice] > purse:
            continue
        purse -= float(price[choice])
        worth -= now * float(per[choice])
        chosen.append(int(choices[choice]))
        mine = order[bounds[choice] : bounds[choice + 1]]
        left[rows[mine]] *= 1 - words[mine]
    return chosen, worth
