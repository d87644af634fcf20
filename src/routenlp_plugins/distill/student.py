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

__all__ = [
    "Course",
    "Student",
    "is_student",
    "known_kind",
    "load_student",
    "new_student_folder",
    "read_facts",
    "student_kind",
    "write_facts",
]

KINDS = {
    "classifier": "classifier:ClassifierStudent",
    "hosted": "hosted:HostedStudent",
    "lora": "lora:LoRAStudent",
}
"""Kind of a student, as its folder names it -> where it is."""
_OWN: dict[str, Callable[[Path], Any]] = {}
"""Kinds that users have made known."""
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
    kind = known_kind(where)
    if kind in _OWN:
        own: Student = _OWN[kind](where)
        return own
    module, _, name = KINDS[kind].partition(":")
    load: Callable[[Path], Student] = getattr(import_module(f".{module}", __package__), name).load
    return load(where)


def student_kind(kind: str, load: Callable[[Path], Student]) -> None:
    """Make a kind of student of your own known, in every process that reads it.

    Its `save` writes what `load` reads, and last of all ``student.json`` with ``{"format_version": 1, "kind": kind}``.

    Raises:
        DataError: there is a kind of that name.
    """
    if kind in KINDS:
        raise DataError(f"student kind {kind!r} is one of this package's; choose another name")
    _OWN[kind] = load


def known_kind(folder: Path) -> str:
    """The kind of a student's folder.

    Raises:
        ReleaseError: the folder holds no student, or one that nobody can read.
    """
    kind = read_facts(folder).get("kind")
    if kind not in (*KINDS, *_OWN):
        raise ReleaseError(
            f"{folder / FACTS}: kind must be one of {', '.join((*KINDS, *_OWN))}, got {kind!r}; make one of your own "
            "known by student_kind(kind, load)"
        )
    return str(kind)


def write_facts(folder: Path, kind: str, **facts: Any) -> None:
    """Write what a student's folder says of itself, last of all: it tells that the folder is whole."""
    write_json(folder / FACTS, {"format_version": 1, "kind": kind, **facts})


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Read it.

    Raises:
        ReleaseError: the file is missing or no such file, or newer.
    """
    file = Path(folder) / FACTS
    facts = read_json(file)
    if facts.get("format_version") != 1:
        raise ReleaseError(f"{file}: format_version: expected 1, got {facts.get('format_version')!r}")
    return facts


def new_student_folder(folder: str | Path) -> Path:
    """Make a folder for a student; one that is there is never touched.

    Raises:
        ReleaseError: there is a student already.
    """
    return new_folder(Path(folder), FACTS)


def is_student(folder: Path) -> bool:
    """Whether the folder holds a whole student."""
    return (folder / FACTS).exists()


def repeated(lessons: Sequence[Lesson]) -> tuple[Lesson, ...]:
    """The last lesson of each question: a later one corrects."""
    return tuple({(lesson.task, words_of(lesson.query)): lesson for lesson in lessons}.values())
