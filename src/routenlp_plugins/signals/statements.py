"""The statements that write: rows of several traces at once, signals, calls that come later, and what is deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import sleep
from typing import Any, TypeVar

from sqlalchemy import Connection, and_, case, delete, exists, func, insert, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from ..errors import DataError
from . import tables
from .engine import among
from .redaction import Redaction
from .rows import Extra, rows_of_extra

__all__ = ["Rows", "add_calls", "gently", "has_trace", "known_ids", "misplaced", "new_names", "pruned", "upsert"]

Made = TypeVar("Made")


class Rows:
    """Rows of several traces, table by table in the order in which they may be inserted."""

    def __init__(self) -> None:
        self.of: dict[str, list[dict[str, Any]]] = {"traces": [], "calls": [], "contents": [], "runs": []}

    def add(self, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        """Take over the rows of a trace."""
        for name, some in rows.items():
            self.of[name] += some

    def insert(self, connection: Connection) -> None:
        """Write them."""
        for name, rows in self.of.items():
            if rows:
                connection.execute(insert(tables.metadata.tables[name]), rows)


def gently(make: Callable[..., Made], *given: Any) -> Made:
    """Let a thread that answers a request go first: the interpreter would make it wait for 5 ms."""
    sleep(0)
    return make(*given)


def known_ids(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Those of these traces that are written."""
    if not ids:
        return set()
    return set(connection.scalars(select(tables.traces.c.id).where(among(connection, tables.traces.c.id, ids))))


def add_calls(connection: Connection, extra: Extra, redaction: Redaction) -> None:
    """Add calls to a trace.

    Raises:
        DataError: it is not written.
    """
    calls, contents = tables.calls, tables.contents
    if not known_ids(connection, [extra.trace_id]):
        raise DataError(f"no trace {extra.trace_id!r} is known; record it before its {extra.purpose} calls")
    same = calls.c.trace_id == extra.trace_id, calls.c.batch == extra.id
    if connection.scalar(select(exists().where(*same))):
        # written, and its acknowledgement was lost; or imported before
        return
    last = connection.scalar(select(func.max(calls.c.position)).where(calls.c.trace_id == extra.trace_id))
    rows, answers = rows_of_extra(extra, 0 if last is None else last + 1, redaction)
    if rows:
        connection.execute(insert(calls), rows)
    if answers:
        mine = contents.c.trace_id == extra.trace_id
        kept = connection.scalar(select(contents.c.answers).where(mine))
        if kept is None:
            connection.execute(insert(contents), {"trace_id": extra.trace_id, "answers": answers})
        else:
            connection.execute(contents.update().where(mine).values(answers={**kept, **answers}))


def new_names(connection: Connection) -> Any:
    """Insert names of traces; one that is there already stays as it is."""
    return _dialect(connection).insert(tables.runs).on_conflict_do_nothing()


def upsert(connection: Connection) -> Any:
    """Insert signals; of one that is there already the later value holds."""
    signals = tables.signals
    new = _dialect(connection).insert(signals)
    later = new.excluded.at >= signals.c.at
    return new.on_conflict_do_update(
        index_elements=list(signals.primary_key),
        set_={
            "value": case((later, new.excluded.value), else_=signals.c.value),
            "at": case((later, new.excluded.at), else_=signals.c.at),
            "given": signals.c.given + 1,
        },
    )


def _dialect(connection: Connection) -> Any:
    return postgresql if connection.dialect.name == "postgresql" else sqlite


def has_trace(*conditions: Any) -> Any:
    """Of a signal: whether there is a trace of these conditions that it may be about."""
    traces, runs, signals = tables.traces, tables.runs, tables.signals
    itself = select(traces.c.id).where(traces.c.id == signals.c.run_id, *conditions).correlate(signals)
    other = select(traces.c.id).join(runs, runs.c.trace_id == traces.c.id)
    return or_(exists(itself), exists(other.where(runs.c.run_id == signals.c.run_id, *conditions).correlate(signals)))


def misplaced() -> Any:
    """Of a signal: whether it is about a tier that no trace it may be about has called."""
    calls, runs, signals = tables.calls, tables.runs, tables.signals
    called = select(calls.c.trace_id).where(calls.c.tier == signals.c.tier)
    itself = exists(called.where(calls.c.trace_id == signals.c.run_id).correlate(signals))
    by_run = called.join(runs, runs.c.trace_id == calls.c.trace_id).where(runs.c.run_id == signals.c.run_id)
    return and_(signals.c.tier != "", has_trace(), ~itself, ~exists(by_run.correlate(signals)))


def pruned(connection: Connection, before: float) -> int:
    """Delete the traces before a time and what was said of them; how many there were."""
    traces, signals = tables.traces, tables.signals
    kept = has_trace(traces.c.at >= before)
    connection.execute(delete(signals).where(~kept, or_(signals.c.at < before, has_trace(traces.c.at < before))))
    return int(connection.execute(delete(traces).where(traces.c.at < before)).rowcount)
