"""What a student is taught: queries with the answers they should have been given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError
from ..evaluate.outcomes import first_problem, read_lines
from ..types import Message, Query
from .files import write_whole

__all__ = ["Kind", "Lesson", "read_lessons", "write_lessons"]

Kind = Literal["given", "taught", "rehearsal"]
"""Of a lesson: the student came with it, the teacher's answer to a failure, the student's own accepted answer."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A query and the answer it should be given.

    Attributes:
        id: of the query.
        messages: the conversation where there is more than `text`.
    """

    id: str
    task: str
    text: str
    answer: str
    kind: Kind = "taught"
    messages: tuple[Message, ...] | None = None

    @classmethod
    def of(cls, query: Query, answer: str, kind: Kind = "taught") -> Lesson:
        """The lesson of a query."""
        return cls(query.id or "", query.task or "", query.text, answer, kind, query.messages)

    @property
    def query(self) -> Query:
        """The query as a tier is asked it."""
        return Query(self.text, self.task, self.id, self.messages)

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        facts = {"query_id": self.id, "task": self.task, "text": self.text, "answer": self.answer, "kind": self.kind}
        return facts if self.messages is None else {**facts, "messages": [dict(m) for m in self.messages]}


class _Lesson(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    query_id: Annotated[str, Field(min_length=1)]
    task: str
    text: str
    answer: str
    kind: Kind = "taught"
    messages: list[Mapping[str, str]] | None = None


def read_lessons(path: str | Path) -> tuple[Lesson, ...]:
    """Read JSON lines ``{"query_id", "task", "text", "answer", "kind"?, "messages"?}``.

    Raises:
        DataError: names file, line and field.
    """
    found = []
    for number, line in read_lines(Path(path)):
        try:
            row = _Lesson.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}:{number}: {first_problem(error)}") from None
        messages = None if row.messages is None else tuple(row.messages)
        found.append(Lesson(row.query_id, row.task, row.text, row.answer, row.kind, messages))
    return tuple(found)


def write_lessons(path: str | Path, lessons: Iterable[Lesson]) -> Path:
    """Write what `read_lessons` reads."""
    lines = [json.dumps(lesson.as_dict(), ensure_ascii=False) + "\n" for lesson in lessons]
    return write_whole(Path(path), "".join(lines))
