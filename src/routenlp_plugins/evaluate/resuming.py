"""A file of outcomes that a collection goes on writing: what is in it, and nothing of it lost."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import DataError
from .outcomes import OutcomeRow, outcome_line, parse_outcome_line, read_lines
from .references import Reference

__all__ = ["append_row", "finished_rows", "locked", "replace_rows", "whole_rows"]

_BEGINNING = b'{"query_id": '


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep a second collection off the same file while this one runs."""
    if target.suffix == ".gz":
        raise DataError(f"{target}: outcomes are appended line by line; write to a .jsonl file and compress it later")
    if target.is_dir():
        raise DataError(f"{target}: is a folder; give a .jsonl file in it")
    place = target.with_name(f".{target.name}.lock")
    lock = FileLock(place, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(
            f"{target}: another collection or auditor is writing to it; wait for it, or write to another file"
        ) from None
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        lock.release()


def finished_rows(
    target: Path, functions: Mapping[str, object], references: Sequence[Reference]
) -> dict[str | None, OutcomeRow]:
    """The rows in the file already, which must be of this collection; see `whole_rows`."""
    known = {reference.query.id: reference for reference in references}

    def check(row: OutcomeRow) -> None:
        if (other := _foreign(row, functions, known.get(row.query.id))) is not None:
            raise DataError(f"{row.source}: belongs to another collection ({other}); write to a new file")

    return whole_rows(target, check)


def whole_rows(target: Path, check: Callable[[OutcomeRow], None] = lambda row: None) -> dict[str | None, OutcomeRow]:
    """The rows in the file by query; a last line that was half written is cut off, anything else is left alone.

    Args:
        check: raises if a row does not belong there; the file is not touched then.

    Raises:
        DataError: a line is malformed or a query occurs twice.
    """
    if not target.exists():
        return {}
    content = target.read_bytes()
    whole = content.rfind(b"\n") + 1
    last = content[whole:]
    try:
        lines = content[:whole].decode().split("\n")[:-1]
    except UnicodeDecodeError:
        raise DataError(f"{target}: not UTF-8 text") from None
    rows = [parse_outcome_line(line, f"{target}:{number}") for number, line in enumerate(lines, start=1)]
    complete = _complete_row(last, f"{target}:{len(lines) + 1}")
    if complete is not None:
        rows.append(complete)
    repeated = next((name for name, count in Counter(row.query.id for row in rows).items() if count > 1), None)
    if repeated is not None:
        raise DataError(f"{target}: query_id: {repeated!r} occurs more than once")
    for row in rows:
        check(row)
    if complete is not None:
        with target.open("ab") as file:
            file.write(b"\n")
    elif last:
        with target.open("r+b") as file:
            file.truncate(whole)
    return {row.query.id: row for row in rows}


def append_row(target: Path, row: OutcomeRow) -> None:
    """Write a row at the end; a row that does not fit on the disk leaves nothing of itself."""
    size = target.stat().st_size if target.exists() else 0
    try:
        with target.open("a", encoding="utf-8") as file:
            file.write(outcome_line(row) + "\n")
    except OSError:
        if target.exists():
            os.truncate(target, size)
        raise


def _complete_row(last: bytes, source: str) -> OutcomeRow | None:
    """The row of a line without a newline; None if it is only the beginning of one.

    Raises:
        DataError: it is neither.
    """
    if last[: len(_BEGINNING)] != _BEGINNING[: len(last)]:
        raise DataError(f"{source}: is no outcome; write to a new file")
    try:
        return parse_outcome_line(last.decode(), source)
    except (DataError, UnicodeDecodeError):
        return None


def _foreign(row: OutcomeRow, functions: Mapping[str, object], reference: Reference | None) -> str | None:
    """What shows that a row is of another collection, if anything does."""
    other = [tier for tier in row.outcomes if tier not in functions]
    if other:
        return f"tier {other[0]}"
    if reference is None:
        return f"query {row.query.id}"
    mine = (reference.query.task, reference.query.text, reference.reference, reference.group)
    # as they are once written: see `outcome_line`
    written = tuple(None if part is None else part.encode("utf-8", "replace").decode() for part in mine)
    if written != (row.query.task, row.query.text, row.reference, row.group):
        return f"query {row.query.id} has another task, text, reference or group there"
    return None


def replace_rows(target: Path, rows: Iterator[OutcomeRow]) -> None:
    """Replace rows of the file, in one step at the end; what an interruption leaves is replaced too."""
    replaced: dict[str | None, OutcomeRow] = {}
    try:
        for row in rows:
            replaced[row.query.id] = row
    finally:
        old = [parse_outcome_line(line, f"{target}:{number}") for number, line in read_lines(target)]
        scratch = target.with_name(f".{target.name}.new")
        lines = [outcome_line(replaced.get(row.query.id, row)) + "\n" for row in old]
        scratch.write_text("".join(lines), encoding="utf-8")
        scratch.replace(target)
