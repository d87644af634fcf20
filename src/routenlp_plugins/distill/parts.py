"""What is taught, what judges and what certifies: samples of the traffic, cut by units, without copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from ..evaluate.units import unit_interval
from ..types import Query
from .harvest import Served
from .lessons import Lesson

__all__ = ["Shares", "asked_by_many", "check_leaks", "leaks", "near_duplicates", "parts_of", "words_of"]

ALIKE = 95.0
"""Normalised indel similarity, in percent, from which two queries are near duplicates."""
ENDS = 200
"""Characters of the beginning and of the end of a text that are compared."""
BLOCK = 256
MANY = 5
"""Units that ask a question, from which on it is a part of the traffic that may be taught and judged."""


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
    """Each query into ``teaching``, ``gate`` or ``certification``, whole units together: so all three are samples of
    the traffic."""
    found: dict[str, list[Served]] = {"teaching": [], "gate": [], "certification": []}
    draws = unit_interval([one.unit for one in served], seed, "distillation part") if served else np.array([])
    for one, draw in zip(served, draws.tolist(), strict=True):
        beyond = "gate" if draw < shares.teaching + shares.gate else "certification"
        found["teaching" if draw < shares.teaching else beyond].append(one)
    return found


def asked_by_many(served: Sequence[Served]) -> frozenset[str]:
    """Questions, normalised, that so many units ask that they are traffic, and no copies of one another."""
    units: dict[str, set[str]] = defaultdict(set)
    for one in served:
        units[_normal(words_of(one.row.query))].add(one.unit)
    return frozenset(text for text, by in units.items() if len(by) >= MANY)


def leaks(lessons: Sequence[Query], held_out: Sequence[Query], common: frozenset[str]) -> list[tuple[int, int]]:
    """Places of a lesson and of a query that judges or certifies, which are the same or nearly; one pair a lesson."""
    known = {query.id: place for place, query in enumerate(held_out)}
    found = {place: known[query.id] for place, query in enumerate(lessons) if query.id in known}
    rare = [place for place, query in enumerate(lessons) if _normal(words_of(query)) not in common]
    texts = [words_of(lessons[place]) for place in rare], [words_of(query) for query in held_out]
    for one, other in _pairs(*texts):
        found.setdefault(rare[one], other)
    return sorted(found.items())


def check_leaks(lessons: Sequence[Lesson], held_out: Mapping[str, Sequence[Served]], common: frozenset[str]) -> None:
    """Refuse lessons that judge or certify too.

    Args:
        common: questions that many ask; see `asked_by_many`.

    Raises:
        DataError: names the first query that is, or is nearly, on both sides.
    """
    for part, served in held_out.items():
        queries = [one.row.query for one in served]
        for place, other in leaks([lesson.query for lesson in lessons], queries, common):
            lesson, query = lessons[place], queries[other]
            if lesson.id == query.id:
                raise DataError(f"leak: query {lesson.id!r} is both taught and in the {part} part; leave it out of one")
            raise DataError(
                f"leak: query {lesson.id!r}, which is taught, is nearly the same as {query.id!r} of the {part} part; "
                "leave one of them out"
            )


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of places of texts that are the same up to case, punctuation and a few characters; the first with each."""
    return sorted((one, other) for one, other in _pairs(texts, texts) if one < other)


def words_of(query: Query) -> str:
    """All that is said in a query: its conversation, where there is one."""
    if query.messages is None:
        return query.text
    return "\n".join(str(message.get("content")) for message in query.messages)


def _pairs(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of alike texts, those of the same text by its first place; only texts of like length are compared."""
    from rapidfuzz.fuzz import ratio
    from rapidfuzz.process import cdist

    mine, theirs = _places(first), _places(second)
    left, right = sorted(mine, key=len), sorted(theirs, key=len)
    lengths = np.array([len(text) for text in right])
    slack = 2 / (ALIKE / 100) - 1
    for start in range(0, len(left), BLOCK):
        block = left[start : start + BLOCK]
        low, high = np.searchsorted(lengths, [len(block[0]) / slack - 1, len(block[-1]) * slack + 1])
        some = right[low:high]
        if not some:
            continue
        alike = cdist(block, some, scorer=ratio, score_cutoff=ALIKE, dtype=np.float32) > 0
        for row, column in np.argwhere(alike).tolist():
            one, other = mine[block[row]], theirs[some[column]]
            # a chain of pairs joins them all
            yield from ((place, other[0]) for place in one)
            yield from ((one[0], place) for place in other[1:])


def _places(texts: Sequence[str]) -> dict[str, list[int]]:
    """Normalised text -> where it stands."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        found[_normal(text)].append(place)
    return found


def _normal(text: str) -> str:
    from rapidfuzz.utils import default_process

    words = " ".join(default_process(text).split()) or text
    return words if len(words) <= 2 * ENDS else words[:ENDS] + words[-ENDS:]
