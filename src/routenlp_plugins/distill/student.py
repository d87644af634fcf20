"""What can be taught: a tier that makes another one of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from ..errors import DataError, ReleaseError
from ..types import Call, Completion
from .files import new_folder, read_json, write_json
from .lessons import Lesson
from .parts import words_of

__all__ = ["Course", "Student", "is_student", "load_student", "new_student_folder", "read_facts", "write_facts"]

KINDS = {
    "classifier": "classifier:ClassifierStudent",
    "hosted": "hosted:HostedStudent",
    "lora": "lora:LoRAStudent",
}
"""Kind of a student, as its folder names it -> where it is."""
FACTS = "student.json"


@dataclass(frozen=True, slots=True)
class Course:
    """How a student is taught.

    Attributes:
        lessons: new ones; what it heard before is its own affair, but for `rehearsal`.
        rehearsal: what it should not forget.
        seed: of whatever is random.
        progress: whether to draw a bar on standard error if that is a terminal.
    """

    lessons: tuple[Lesson, ...]
    rehearsal: tuple[Lesson, ...] = ()
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        if not self.lessons:
            raise DataError("course: no lessons; there is nothing to teach")


@runtime_checkable
class Student(Protocol):
    """A tier below the frontier that can be taught. Its answers name a `model`, another one once it has been taught.

    What is needed beside `__call__` is a folder on disk: a student is saved, loaded and promoted with its release.
    """

    def __call__(self, call: Call) -> Completion:
        """Answer."""
        ...

    @property
    def lessons(self) -> tuple[Lesson, ...]:
        """What it has been taught so far, as far as it remembers."""
        ...

    @property
    def model(self) -> str | None:
        """What its answers name as their model; None where only its server knows."""
        ...

    def taught(self, course: Course, folder: Path) -> Self:
        """Another student, which has been taught these lessons too, in a new folder.

        What was begun in `folder` with the same course and not finished goes on; this student stays as it is.
        """
        ...

    def save(self, folder: Path) -> Path:
        """Write a folder that `load_student` reads."""
        ...


def load_student(folder: str | Path) -> Student:
    """The student of a folder.

    Raises:
        ReleaseError: it is none, or of a kind that this version does not know.
    """
    where = Path(folder)
    kind = read_facts(where).get("kind")
    if kind not in KINDS:
        raise ReleaseError(f"{where / FACTS}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    module, _, name = KINDS[kind].partition(":")
    load: Callable[[Path], Student] = getattr(import_module(f".{module}", __package__), name).load
    return load(where)


def write_facts(folder: Path, kind: str, **facts: Any) -> None:
    """Write what a student's folder says of itself, last of all: it tells that the folder is whole."""
    write_json(folder / FACTS, {"format_version": 1, "kind": kind, **facts})


def read_facts(folder: Path) -> dict[str, Any]:
    """Read it.

    Raises:
        ReleaseError: the file is missing or no such file, or newer.
    """
    facts = read_json(folder / FACTS)
    if facts.get("format_version") != 1:
        raise ReleaseError(f"{folder / FACTS}: format_version: expected 1, got {facts.get('format_version')!r}")
    return facts


def new_student_folder(folder: Path) -> Path:
    """Make a folder for a student; one that is there is never touched.

    Raises:
        ReleaseError: there is a student already.
    """
    return new_folder(folder, FACTS)


def is_student(folder: Path) -> bool:
    """Whether the folder holds a whole student."""
    return (folder / FACTS).exists()


def repeated(lessons: Sequence[Lesson]) -> tuple[Lesson, ...]:
    """The last lesson of each question: a later one corrects."""
    return tuple({(lesson.task, words_of(lesson.query)): lesson for lesson in lessons}.values())
