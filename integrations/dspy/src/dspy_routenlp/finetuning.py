"""Students of the distillation loop as language models that DSPy's optimisers can fine-tune."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.provider import Provider, TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat

from routenlp_plugins import Course, DataError, Lesson, Student, load_student, user_words

from .serving import AsyncTierEngine, TierEngine

__all__ = ["StudentEngine", "StudentProvider", "student_lm"]


def student_lm(student: Student, folder: str | Path, name: str = "student", **options: Any) -> dspy.LM:
    """A student as a language model, which ``dspy.BootstrapFinetune`` can teach.

    What it is taught becomes a student in a folder of its own below `folder`, as the distillation loop keeps them, and
    the optimiser's program has a language model that is served by it. Interrupted teaching goes on when the same
    lessons come again. `routenlp_plugins.load_student` reads those folders, for a `DistillationLoop` for example.

    Args:
        student: that answers before it is taught anything.
        folder: of the students to come.
        name: of the model.
        options: of `dspy.LM`.
    """
    engine = StudentEngine(student, folder)
    own = {"cache": False, "num_retries": 0, **options}
    return dspy.LM(
        f"routenlp/{name}",
        engine=engine,
        async_engine=AsyncTierEngine(engine),
        provider=StudentProvider(engine),
        **own,
    )


class StudentEngine(TierEngine):
    """Answers as the student that the name of the model says."""

    def __init__(self, student: Student, folder: str | Path) -> None:
        super().__init__(student)
        self.folder = Path(folder)
        self._taught: dict[str, Student] = {}

    def tier(self, model: str) -> Student:
        """The student of a model's name.

        Raises:
            ReleaseError: there is no such student.
        """
        _, colon, name = model.partition(":")
        if not colon:
            first: Student = super().tier(model)
            return first
        if name not in self._taught:
            self._taught[name] = load_student(self.folder / name)
        return self._taught[name]


class _Job(TrainingJob):  # type: ignore[misc]
    """A teaching under way."""

    def status(self) -> str:
        """``running``, ``succeeded`` or ``failed``."""
        if not self.done():
            return "running"
        return "failed" if isinstance(self.result(), Exception) else "succeeded"


class StudentProvider(Provider):  # type: ignore[misc]
    """Teaches the students of an engine, for ``dspy.LM(..., engine=engine, provider=StudentProvider(engine))``."""

    def __init__(self, engine: StudentEngine) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = _Job
        self.engine = engine

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: Sequence[Mapping[str, Any]],
        train_data_format: TrainDataFormat | str | None,
        train_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Teach the student of a model, and name the model that it became.

        Args:
            train_data: conversations that end with the answer to learn, as ``{"messages": [...]}``.
            train_kwargs: ``seed`` and ``progress`` of the `routenlp_plugins.Course`, and ``task`` of its lessons.

        Raises:
            DataError: the data has another form, or an option is unknown.
        """
        options = dict(train_kwargs or {})
        task = options.pop("task", "default")
        unknown = sorted(options.keys() - {"seed", "progress"})
        if unknown:
            raise DataError(f"train_kwargs: {', '.join(unknown)} is unknown; a student takes seed, progress and task")
        if train_data_format not in (TrainDataFormat.CHAT, "chat", None):
            raise DataError(f"a student is taught conversations, got data of the format {train_data_format!r}")
        lessons = tuple(_lesson(place, one, task) for place, one in enumerate(train_data))
        told = json.dumps([model, options, [lesson.as_dict() for lesson in lessons]], sort_keys=True, default=str)
        name = sha256(told.encode("utf-8", "replace")).hexdigest()[:12]
        self.engine.tier(model).taught(Course(lessons, **options), self.engine.folder / name)
        return f"{model.partition(':')[0]}:{name}"


def _lesson(place: int, one: Mapping[str, Any], task: str) -> Lesson:
    messages = one.get("messages") if isinstance(one, Mapping) else None
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError(f'train_data[{place}]: expected {{"messages": [..., {{"role": "assistant", ...}}]}}')
    *asked, answer = messages
    chat = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in asked)
    return Lesson(f"finetuning-{place}", task, user_words(chat), str(answer["content"]), messages=chat)
