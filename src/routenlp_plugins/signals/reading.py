"""From rows of the tables back to what was recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, and_, exists, literal, null, or_, select, union_all

from ..types import Attempt, Completion, Query, Trace
from . import tables
from .engine import among
from .rows import Recorded
from .signal import Signal

__all__ = ["between", "read_traces"]

PAGE = 1000
FACTS = ("model", "prompt", "input_tokens", "cached_tokens", "output_tokens", "cost_usd", "judges_usd", "latency_ms")


def read_traces(
    engine: Engine, since: float | None, until: float | None, *conditions: ColumnElement[bool]
) -> Iterator[tuple[Recorded, tuple[Signal, ...]]]:
    """What was recorded in [since, until), in order of time and id, and what was said of each.

    A page at a time, so that writers go on. What was said of a run that several traces belong to was said of the last
    one before it was said, or of the first if there is none.
    """
    traces = tables.traces
    chosen = select(traces).where(*between(since, until), *conditions).order_by(traces.c.at, traces.c.id).limit(PAGE)
    last: Row[Any] | None = None
    while True:
        page = chosen
        if last is not None:
            page = page.where(or_(traces.c.at > last.at, and_(traces.c.at == last.at, traces.c.id > last.id)))
        with engine.begin() as connection:
            found = connection.execute(page).all()
            mine = partial(among, connection, values=[row.id for row in found])
            calls = _grouped(connection.execute(_of(tables.calls, mine).order_by(tables.calls.c.position)).all())
            texts = {row.trace_id: row for row in connection.execute(_of(tables.contents, mine))}
            runs = _grouped(connection.execute(_of(tables.runs, mine)).all())
            said = _grouped(connection.execute(_said_of(mine)).all())
        for row in found:
            recorded = _recorded(row, calls[row.id], texts.get(row.id), runs[row.id])
            yield recorded, _signals(said[row.id], calls[row.id], row.tier)
        if len(found) < PAGE:
            return
        last = found[-1]


def between(since: float | None, until: float | None) -> list[Any]:
    """Conditions for the traces of [since, until)."""
    at = tables.traces.c.at
    return [*([at >= since] if since is not None else []), *([at < until] if until is not None else [])]


Mine = Callable[[ColumnElement[str]], ColumnElement[bool]]
"""Whether a column is one of the traces that are read."""


def _of(table: Any, mine: Mine) -> Any:
    return select(table).where(mine(table.c.trace_id))


def _said_of(mine: Mine) -> Any:
    """Signals with the trace they are about and the position of its call, where its run id tells.

    A preference is about both of its runs.
    """
    signals = tables.signals
    same = (signals.c.run_id, signals.c.kind, signals.c.source, signals.c.tier, signals.c.other, signals.c.value)
    of_the_other = (
        signals.c.other.label("run_id"),
        signals.c.kind,
        signals.c.source,
        literal("").label("tier"),
        signals.c.run_id.label("other"),
        (1 - signals.c.value).label("value"),
    )
    return union_all(*_about(mine, signals.c.run_id, same), *_about(mine, signals.c.other, of_the_other))


def _about(mine: Mine, run: ColumnElement[str], told: Sequence[ColumnElement[Any]]) -> tuple[Any, Any]:
    """What is said of these traces, where this column of a signal is their id or that of one of their runs."""
    traces, runs, signals = tables.traces, tables.runs, tables.signals
    another, other = traces.alias(), runs.alias()
    same_run = select(another.c.id).join(other, other.c.trace_id == another.c.id).where(other.c.run_id == runs.c.run_id)
    later = or_(another.c.at > traces.c.at, and_(another.c.at == traces.c.at, another.c.id > traces.c.id))
    earlier = or_(another.c.at < traces.c.at, and_(another.c.at == traces.c.at, another.c.id < traces.c.id))
    last = and_(
        ~exists(same_run.where(later, another.c.at <= signals.c.at).correlate(traces, runs, signals)),
        or_(traces.c.at <= signals.c.at, ~exists(same_run.where(earlier).correlate(traces, runs))),
    )
    itself = exists(select(another.c.id).where(another.c.id == run).correlate(signals))
    by_run = (
        select(*told, signals.c.at, traces.c.id.label("trace_id"), runs.c.position)
        .join(runs, runs.c.run_id == run)
        .join(traces, traces.c.id == runs.c.trace_id)
        .where(mine(traces.c.id), last, ~itself)
    )
    by_id = select(*told, signals.c.at, run.label("trace_id"), null().label("position")).where(mine(run))
    return by_id, by_run


def _signals(rows: Sequence[Row[Any]], calls: Sequence[Row[Any]], answered: str | None) -> tuple[Signal, ...]:
    """In order of time; of what a source said of an answer under several names the last, of failed calls nothing."""
    tiers = {call.position: call.tier for call in calls}
    failed = {call.position for call in calls if call.error is not None}
    found: dict[tuple[Any, ...], Signal] = {}
    for row in sorted(rows, key=lambda row: (row.at, row.kind, row.source)):
        if row.position in failed and not row.tier:
            continue
        tier = row.tier or (None if row.position is None else tiers.get(row.position))
        said = Signal(row.run_id, row.kind, row.value, row.source, row.at, row.other or None, tier)
        found.pop(key := (row.kind, row.source, tier or answered, row.other), None)
        found[key] = said
    return tuple(found.values())


def _grouped(rows: Sequence[Row[Any]]) -> dict[str, list[Row[Any]]]:
    found: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        found[row.trace_id].append(row)
    return found


def _recorded(row: Row[Any], calls: Sequence[Row[Any]], texts: Row[Any] | None, runs: Sequence[Row[Any]]) -> Recorded:
    messages = texts.messages if texts is not None else None
    query = Query(
        (texts.text if texts is not None else None) or "",
        task=row.task,
        id=row.query_id,
        messages=tuple(messages) if messages else None,
        requires=frozenset(row.requires.split(",")) if row.requires else frozenset(),
    )
    answers = texts.answers if texts is not None else {}
    attempts = tuple(_attempt(call, answers.get(str(call.position), {})) for call in calls if call.purpose == "answer")
    beside: dict[str, tuple[Attempt, ...]] = defaultdict(tuple)
    for call in calls:
        if call.purpose != "answer":
            beside[call.purpose] += (_attempt(call, answers.get(str(call.position), {})),)
    known = {run.run_id: run.position for run in runs if run.run_id != row.query_id}
    trace = Trace(query, row.task, attempts, row.reason or "", id=row.id)
    return Recorded(row.id, row.at, trace, row.origin, row.unit, row.propensity, known, dict(beside), row.drawn)


def _attempt(call: Row[Any], texts: dict[str, Any]) -> Attempt:
    completion = None
    if call.error is None:
        evidence = dict(call.evidence or {})
        each = evidence.pop("token_logprobs", None)
        completion = Completion(
            texts.get("text", ""),
            confidence=evidence.get("confidence"),
            mean_logprob=evidence.get("mean_logprob"),
            token_logprobs=None if each is None else tuple(each),
            scores=evidence.get("scores", {}),
            said=texts.get("said"),
            asked=texts.get("asked"),
            **{name: getattr(call, name) for name in FACTS},
        )
    return Attempt(call.tier, call.accepted, call.confidence, call.threshold, completion, call.error)
