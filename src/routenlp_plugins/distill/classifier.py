"""A student that answers with a label: it keeps its lessons, and learns them again with the new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import DataError, ReleaseError
from ..tiers.text_classifier import TextClassifierTier
from ..types import Call, Completion
from .lessons import Lesson, read_lessons, write_lessons
from .student import Course, is_student, new_student_folder, read_facts, repeated, write_facts

__all__ = ["ClassifierStudent"]

MODEL, LESSONS = "classifier.safetensors", "lessons.jsonl"


@dataclass(frozen=True, slots=True)
class ClassifierStudent:
    """A linear text classifier that can be taught.

    With its lessons it is trained anew on all of them, so that nothing is forgotten; without any, from the weights that
    it has, on the new ones and on its own answers (`TextClassifierTier.updated`).

    Attributes:
        tier: what answers.
        lessons: what it was trained on; () where that is not known.
    """

    tier: TextClassifierTier
    lessons: tuple[Lesson, ...] = field(default=(), repr=False)

    @classmethod
    def train(
        cls, lessons: Sequence[Lesson], *, analyzer: Literal["word", "char_wb"] = "char_wb", seed: int = 0
    ) -> ClassifierStudent:
        """Fit on lessons; an answer that only one of them has is not learned yet, but remembered."""
        kept = repeated(lessons)
        return cls(_fitted(kept, analyzer, seed), kept)

    def __call__(self, call: Call) -> Completion:
        """The most probable label of the query's text."""
        return self.tier(call)

    @property
    def model(self) -> str:
        """Fingerprint of the classifier, as its answers name it."""
        return self.tier.model

    def taught(self, course: Course, folder: Path) -> ClassifierStudent:
        """Another student, which has learned these lessons too, saved in a new folder."""
        if is_student(folder):
            return self.load(folder)
        if self.lessons:
            kept = repeated((*self.lessons, *course.rehearsal, *course.lessons))
            student = replace(self, tier=_fitted(kept, self.tier.analyzer, course.seed), lessons=kept)
        else:
            heard = repeated((*course.rehearsal, *course.lessons))
            texts, answers = [one.text for one in heard], [one.answer for one in heard]
            student = replace(self, tier=self.tier.updated(texts, answers, seed=course.seed))
        student.save(folder)
        return student

    def save(self, folder: str | Path) -> Path:
        """Write a folder; an existing student is never touched.

        Raises:
            ReleaseError: there is a student already.
        """
        folder = new_student_folder(folder)
        # what an interruption left
        (folder / MODEL).unlink(missing_ok=True)
        self.tier.save(folder / MODEL)
        write_lessons(folder / LESSONS, self.lessons)
        write_facts(folder, "classifier", model=self.tier.model)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ClassifierStudent:
        """Read what `save` wrote.

        Raises:
            ReleaseError: the folder holds another student, or none.
        """
        folder, facts = Path(folder), read_facts(folder)
        tier = TextClassifierTier.load(folder / MODEL)
        if facts.get("model") != tier.model:
            raise ReleaseError(f"{folder / MODEL}: is {tier.model!r}, the student was {facts.get('model')!r}")
        return cls(tier, read_lessons(folder / LESSONS))


def _fitted(lessons: Sequence[Lesson], analyzer: Literal["word", "char_wb"], seed: int) -> TextClassifierTier:
    counts = Counter(lesson.answer for lesson in lessons)
    learned = [lesson for lesson in lessons if counts[lesson.answer] > 1]
    if not learned:
        raise DataError("classifier: no answer occurs twice among the lessons: this task has no labels; teach another")
    texts, answers = [lesson.text for lesson in learned], [lesson.answer for lesson in learned]
    return TextClassifierTier.train(texts, answers, analyzer=analyzer, seed=seed)
