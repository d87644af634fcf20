"""What is taught, what judges and what certifies are different queries: near duplicates are on one side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluate.units import unit_interval
from .harvest import Served
from .lessons import Lesson

__all__ = ["Shares", "check_leaks", "near_duplicates", "parts_of"]

ALIKE = 95.0
"""Normalised indel similarity, in percent, from which two queries are near duplicates."""
ENDS = 200
"""Characters of the beginning and of the end of a text that are compared."""
BLOCK = 256


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the units of a round: those that are taught from, and those that judge the student; the others certify."""

    teaching: float = 0.5
    gate: float = 0.2

    def __post_init__(self) -> None:
        for name in ("teaching", "gate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise DataError(f"shares: {name} must be strictly between 0 and 1, got {value!r}")
        if self.teaching + self.gate >= 1:
            raise DataError(
                f"shares: {self.teaching:g} to teach and {self.gate:g} to judge leave nothing to certify on"
            )


def parts_of(served: Sequence[Served], shares: Shares, seed: int) -> dict[str, list[Served]]:
    """Each query into ``teaching``, ``gate`` or ``certification``: whole units, and what is alike, together."""
    roots = _together([one.unit for one in served], [one.row.query.text for one in served])
    draws = unit_interval([roots[i] for i in range(len(served))], seed, "distillation part")
    found: dict[str, list[Served]] = {"teaching": [], "gate": [], "certification": []}
    for one, draw in zip(served, draws.tolist(), strict=True):
        beyond = "gate" if draw < shares.teaching + shares.gate else "certification"
        found["teaching" if draw < shares.teaching else beyond].append(one)
    return found


def check_leaks(lessons: Sequence[Lesson], held_out: Mapping[str, Sequence[Served]]) -> None:
    """Refuse lessons that judge or certify too.

    Raises:
        DataError: names the first query that is, or is nearly, on both sides.
    """
    for part, served in held_out.items():
        known = {one.trace_id for one in served}
        same = next((lesson for lesson in lessons if lesson.id in known), None)
        if same is not None:
            raise DataError(
                f"leak: query {same.id!r} is both taught and in the {part} part; give each a part of its own"
            )
        taught, judged = [lesson.text for lesson in lessons], [one.row.query.text for one in served]
        pair = next(_pairs(taught, judged), None)
        if pair is not None:
            lesson, other = lessons[pair[0]], served[pair[1]]
            raise DataError(
                f"leak: query {lesson.id!r}, which is taught, is nearly the same as {other.trace_id!r} of the {part} "
                "part; leave one of them out"
            )


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of places of texts that are the same up to case, punctuation and a few characters."""
    return sorted((one, other) for one, other in _pairs(texts, texts) if one < other)


def _together(units: Sequence[str], texts: Sequence[str]) -> list[str]:
    """(n,) the first unit of each set of queries that belong together or are alike."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    links = [(i, first.setdefault(unit, i)) for i, unit in enumerate(units)] + near_duplicates(texts)
    rows, columns = np.array(links, dtype=np.intp).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(units), len(units)))
    _, component = connected_components(graph, directed=False)
    name: dict[int, str] = {}
    for i in np.argsort(np.asarray(units), kind="stable").tolist():
        name.setdefault(int(component[i]), units[i])
    return [name[int(c)] for c in component]


def _pairs(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of alike texts; only texts of like length can be, so that most pairs are never compared."""
    from rapidfuzz.fuzz import ratio
    from rapidfuzz.process import cdist

    mine, theirs = [_normal(text) for text in first], [_normal(text) for text in second]
    order, in_turn = _by_length(theirs), _by_length(mine)
    lengths = np.array([len(theirs[i]) for i in order])
    slack = 2 / (ALIKE / 100) - 1
    for start in range(0, len(mine), BLOCK):
        block = in_turn[start : start + BLOCK]
        shortest, longest = len(mine[block[0]]), len(mine[block[-1]])
        low, high = np.searchsorted(lengths, [shortest / slack - 1, longest * slack + 1])
        some = [theirs[i] for i in order[low:high]]
        if not some:
            continue
        alike = cdist([mine[i] for i in block], some, scorer=ratio, score_cutoff=ALIKE, dtype=np.float32) > 0
        for row, column in np.argwhere(alike).tolist():
            yield int(block[row]), int(order[low + column])


def _by_length(texts: Sequence[str]) -> NDArray[np.intp]:
    return np.argsort([len(text) for text in texts], kind="stable")


def _normal(text: str) -> str:
    from rapidfuzz.utils import default_process

    words = " ".join(default_process(text).split()) or text
    return words if len(words) <= 2 * ENDS else words[:ENDS] + words[-ENDS:]
