"""From the teacher's answers to lessons: what is empty, refused, doubted or said twice is left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..comparing import same_text
from ..errors import DataError
from ..tiers.scored import Judgement, Verifier
from ..types import Completion, Query
from .lessons import Lesson
from .parts import near_duplicates, words_of

__all__ = ["Dataset", "Filters", "Taught", "lessons_of", "rehearsal"]

REFUSAL = re.compile(
    r"^\W*(i'?m sorry|sorry,|i apologi[sz]e|i('m| am) (unable|not able)|i (cannot|can'?t|won'?t) |"
    r"as an? (ai|language model))",
    re.IGNORECASE,
)
"""How models begin where they do not answer."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which answers of the teacher are taught.

    Attributes:
        validators: name -> (query, answer) -> score in [0, 1] or bool; below `floor` the answer is not taught.
        floor: of validators.
        confidence: of the teacher, by its own confidence or ``exp(mean_logprob)``, below which it is not taught; it
            passes where neither is known.
        tau: quality below which audits say that the teacher was wrong.
        refusals: whether answers that begin like a refusal are left out; they are no labels either.
    """

    validators: Mapping[str, Verifier] = field(default_factory=dict)
    floor: float = 0.5
    confidence: float = 0.0
    tau: float = 1.0
    refusals: bool = True

    def __post_init__(self) -> None:
        for name in ("floor", "confidence", "tau"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise DataError(f"filters: {name} must be in [0, 1], got {value!r}")

    def no_answer(self, text: str) -> str | None:
        """Why a text is no answer at all; None if it is one."""
        if not text.strip():
            return "empty"
        return "refusal" if self.refusals and REFUSAL.match(text) else None

    def objection(self, query: Query, answer: Completion, audit: float | None) -> str | None:
        """Why an answer is not taught; None if it is."""
        if (why := self.no_answer(answer.text)) is not None:
            return why
        if audit is not None and audit < self.tau:
            return "audits disagree"
        sure = answer.confidence
        if sure is None and answer.mean_logprob is not None:
            sure = float(np.exp(answer.mean_logprob))
        if sure is not None and sure < self.confidence:
            return "teacher unsure"
        for name, validator in self.validators.items():
            found = validator(query, answer.text)
            score = found.score if isinstance(found, Judgement) else found
            if score is not None and float(score) < self.floor:
                return f"validator {name}"
        return None


@dataclass(frozen=True, slots=True)
class Taught:
    """A query with the teacher's answer, and what audits say of that."""

    query: Query
    answer: Completion
    audit: float | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a student is taught.

    Attributes:
        dropped: why answers are not taught -> how many.
        kept: places, among what was given, of those that are.
    """

    lessons: tuple[Lesson, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[int, ...] = ()


def lessons_of(taught: Sequence[Taught], filters: Filters | None = None, known: Sequence[Lesson] = ()) -> Dataset:
    """Lessons of the answers that pass, each question once.

    Of near duplicates the first is kept; if their answers contradict each other, none is.

    Args:
        known: what the student was taught before; what is nearly the same, with the same answer, is left out.
    """
    filters = filters or Filters()
    dropped: Counter[str] = Counter()
    passed: list[int] = []
    for place, one in enumerate(taught):
        why = filters.objection(one.query, one.answer, one.audit)
        if why is None:
            passed.append(place)
        else:
            dropped[why] += 1
    texts = [words_of(taught[place].query) for place in passed] + [words_of(lesson.query) for lesson in known]
    answers = [taught[place].answer.text for place in passed] + [lesson.answer for lesson in known]
    out: dict[int, str] = {}
    for first, second in sorted(near_duplicates(texts)):
        if first >= len(passed):
            continue
        agree = same_text(answers[first], answers[second]) == 1
        if second >= len(passed):
            # a new answer to an old question corrects it
            if agree:
                out.setdefault(first, "taught before")
        elif agree:
            if first not in out:
                out.setdefault(second, "duplicate")
        else:
            out[first] = out[second] = "contradiction"
    dropped.update(out.values())
    kept = tuple(place for number, place in enumerate(passed) if number not in out)
    return Dataset(tuple(Lesson.of(taught[i].query, taught[i].answer.text) for i in kept), dict(dropped), kept)


def rehearsal(known: Sequence[Lesson], most: int, seed: int) -> tuple[Lesson, ...]:
    """What a student hears again, so that it does not forget: as many of what it knows, drawn by chance."""
    drawn = np.random.default_rng(seed).permutation(len(known))[:most]
    return tuple(known[i] for i in sorted(drawn.tolist()))
