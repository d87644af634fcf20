"""Queries with the answers they are scored against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError
from ..types import Query
from .outcomes import Paths, check_spelling, first_problem, read_lines

__all__ = ["Reference", "read_references"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A query with the answer it is scored against.

    Attributes:
        metric: name of the metric; None takes the one of the task in the portfolio.
        group: rows that belong together, kept in the outcomes.
    """

    query: Query
    reference: str
    metric: str | None = None
    group: str | None = None


def read_references(paths: Paths) -> list[Reference]:
    """Read JSON lines ``{"query_id", "task", "text", "reference", "metric"?, "group"?}``.

    Raises:
        DataError: names file, line and field.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    return [_reference(line, f"{path}:{number}") for path in files for number, line in read_lines(path)]


class _Reference(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    query_id: Annotated[str, Field(min_length=1)]
    task: Annotated[str, Field(min_length=1)]
    text: str
    reference: str
    metric: str | None = None
    group: str | None = None


def _reference(line: str, source: str) -> Reference:
    try:
        row = _Reference.model_validate_json(line)
    except ValidationError as error:
        raise DataError(f"{source}: {first_problem(error)}") from None
    check_spelling(row, source)
    return Reference(Query(row.text, task=row.task, id=row.query_id), row.reference, row.metric, row.group)
