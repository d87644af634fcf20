"""A student that is a causal language model with a LoRA adapter, served through transformers and PEFT, or as GGUF."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError, ReleaseError
from ..types import Call, Completion, Query
from .causal import CausalLM, weights_digest
from .lessons import Lesson, read_lessons, write_lessons
from .student import Course, is_student, new_student_folder, read_facts, repeated, write_facts
from .training import ADAPTER, LoRATraining, begin, train

__all__ = ["LoRAStudent"]

LESSONS = "lessons.jsonl"


@dataclass(frozen=True, eq=False)
class LoRAStudent:
    """A model of transformers and what it was taught beside.

    Its weights are loaded when it first answers. Answers are greedy, and come with the log-probabilities of their
    tokens.

    Attributes:
        base: folder of the model; `base_from_gguf` makes one of a GGUF file.
        adapter: folder of a LoRA adapter; None is the model as it is.
        training: how it is taught.
        teacher: folder of a model of the same tokenizer, from whose distributions it learns beside the words.
        most: tokens of an answer.
        lessons: what it was taught.
    """

    base: Path
    adapter: Path | None = None
    training: LoRATraining = field(default_factory=LoRATraining)
    teacher: Path | None = None
    most: int = 64
    lessons: tuple[Lesson, ...] = field(default=(), repr=False)

    @cached_property
    def model(self) -> str:
        """Fingerprint of the weights, as its answers name it."""
        adapter = "" if self.adapter is None else f" with {weights_digest(self.adapter)}"
        return f"{self.base.name} {weights_digest(self.base)}{adapter}, {self.most} tokens"

    def __call__(self, call: Call) -> Completion:
        """The model's answer."""
        return self.answers([call.query])[0]

    def answers(self, queries: list[Query], batch: int = 1) -> list[Completion]:
        """The answers to several queries, as many at a time as `batch`."""
        said = self._loaded.answers([query.chat for query in queries], self.most, batch)
        return [replace(completion, model=self.model) for completion in said]

    def taught(self, course: Course, folder: Path) -> LoRAStudent:
        """Another student, whose adapter was trained on from this one's."""
        if is_student(folder):
            return self.load(folder)
        job = folder / "job"
        begin(
            job,
            self.base.resolve(),
            course.lessons,
            course.rehearsal,
            self.training,
            seed=course.seed,
            adapter=None if self.adapter is None else self.adapter.resolve(),
            teacher=None if self.teacher is None else self.teacher.resolve(),
        )
        train(job, progress=course.progress)
        known = repeated((*self.lessons, *course.lessons))
        made = LoRAStudent(self.base, job / ADAPTER, self.training, self.teacher, self.most, known)
        made.save(folder)
        shutil.rmtree(job)
        return self.load(folder)

    def save(self, folder: str | Path) -> Path:
        """Write adapter, lessons and settings; the base stays where it is, and is known again by its weights.

        Raises:
            ReleaseError: there is a student already.
        """
        folder = new_student_folder(folder)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        if self.adapter is not None:
            shutil.copytree(self.adapter, folder / ADAPTER)
        write_lessons(folder / LESSONS, self.lessons)
        write_facts(
            folder,
            "lora",
            base=str(self.base.resolve()),
            base_digest=weights_digest(self.base),
            adapter=self.adapter is not None,
            training=asdict(self.training),
            teacher=None if self.teacher is None else str(self.teacher.resolve()),
            most=self.most,
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path, base: str | Path | None = None) -> LoRAStudent:
        """Read what `save` wrote.

        Args:
            base: where the base model is now, if it has moved.

        Raises:
            ReleaseError: the folder holds another student, or none, or the base is not there or another one.
        """
        folder, facts = Path(folder), read_facts(folder)
        where = Path(facts["base"] if base is None else base)
        try:
            found = weights_digest(where)
        except DataError:
            raise ReleaseError(
                f"{where}: the base model of {folder} is not there; say where: LoRAStudent.load(folder, base=...)"
            ) from None
        if found != facts["base_digest"]:
            raise ReleaseError(f"{where}: its weights are not those that {folder} was taught on")
        return cls(
            base=where,
            adapter=folder / ADAPTER if facts["adapter"] else None,
            training=LoRATraining(**facts["training"]),
            teacher=None if facts["teacher"] is None else Path(facts["teacher"]),
            most=facts["most"],
            lessons=read_lessons(folder / LESSONS),
        )

    def export_gguf(self, like: str | Path, out: str | Path, kind: str = "F16") -> Path:
        """Merge the adapter into the model and write it as GGUF, for `LlamaCppTier`; see `gguf_export.write_gguf`."""
        from .gguf_export import write_gguf

        model: Any = self._loaded.model
        merged = model if self.adapter is None else CausalLM.load(self.base, self.adapter).model.merge_and_unload()
        return write_gguf(merged, Path(like), Path(out), kind)

    @cached_property
    def _loaded(self) -> CausalLM:
        return CausalLM.load(self.base, self.adapter, self.training.longest)
