"""From rows of the tables back to what was recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from math import isnan, nan
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, and_, exists, func, literal, null, or_, select, union_all

from ..types import Attempt, Completion, Query, Trace
from . import tables
from .rows import Recorded
from .signal import Signal

__all__ = ["between", "read_traces", "repeated_units", "unaudited_chances"]

PAGE = 1000
FACTS = ("model", "prompt", "input_tokens", "cached_tokens", "output_tokens", "cost_usd", "judges_usd", "latency_ms")


def read_traces(
    engine: Engine, since: float | None, until: float | None
) -> Iterator[tuple[Recorded, tuple[Signal, ...]]]:
    """What was recorded in [since, until), in order of time and id, and what was said of each.

    A page at a time, so that writers go on. What was said of a run that several traces belong to was said of the last.
    """
    traces = tables.traces
    chosen = select(traces).where(*between(since, until)).order_by(traces.c.at, traces.c.id).limit(PAGE)
    last: Row[Any] | None = None
    while True:
        page = chosen
        if last is not None:
            page = page.where(or_(traces.c.at > last.at, and_(traces.c.at == last.at, traces.c.id > last.id)))
        with engine.begin() as connection:
            found = connection.execute(page).all()
            ids = [row.id for row in found]
            calls = _grouped(connection.execute(_of(tables.calls, ids).order_by(tables.calls.c.position)).all())
            texts = {row.trace_id: row for row in connection.execute(_of(tables.contents, ids))}
            runs = _grouped(connection.execute(_of(tables.runs, ids)).all())
            said = _grouped(connection.execute(_said_of(ids)).all())
        for row in found:
            yield _recorded(row, calls[row.id], texts.get(row.id), runs[row.id]), _signals(said[row.id], calls[row.id])
        if len(found) < PAGE:
            return
        last = found[-1]


def unaudited_chances(
    engine: Engine, units: Collection[str], since: float | None, until: float | None
) -> dict[str, float]:
    """Of these units the probability that none of their traces in [since, until) is audited, where it is known."""
    traces = tables.traces
    rows = select(traces.c.unit, traces.c.propensity).where(traces.c.unit.is_not(None), *between(since, until))
    found: dict[str, float] = {}
    with engine.begin() as connection:
        for unit, propensity in connection.execute(rows):
            if unit in units:
                found[unit] = found.get(unit, 1.0) * (nan if propensity is None else 1 - propensity)
    return {unit: chance for unit, chance in found.items() if not isnan(chance)}


def repeated_units(engine: Engine, since: float | None, until: float | None) -> set[str]:
    """The units that several traces in [since, until) belong to."""
    units = tables.traces.c.unit
    several = select(units).where(units.is_not(None), *between(since, until)).group_by(units).having(func.count() > 1)
    with engine.begin() as connection:
        return set(connection.scalars(several))


def between(since: float | None, until: float | None) -> list[Any]:
    """Conditions for the traces of [since, until)."""
    at = tables.traces.c.at
    return [*([at >= since] if since is not None else []), *([at < until] if until is not None else [])]


def _of(table: Any, ids: Sequence[str]) -> Any:
    return select(table).where(table.c.trace_id.in_(ids))


def _said_of(ids: Sequence[str]) -> Any:
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
    return union_all(*_about(ids, signals.c.run_id, same), *_about(ids, signals.c.other, of_the_other))


def _about(ids: Sequence[str], run: ColumnElement[str], told: Sequence[ColumnElement[Any]]) -> tuple[Any, Any]:
    """What is said of these traces, where this column of a signal is their id or that of one of their runs."""
    traces, runs, signals = tables.traces, tables.runs, tables.signals
    later, other = traces.alias(), runs.alias()
    of_a_later_one = exists(
        select(later.c.id)
        .join(other, other.c.trace_id == later.c.id)
        .where(other.c.run_id == runs.c.run_id)
        .where(or_(later.c.at > traces.c.at, and_(later.c.at == traces.c.at, later.c.id > traces.c.id)))
        .correlate(traces, runs)
    )
    itself = exists(select(later.c.id).where(later.c.id == run).correlate(signals))
    by_run = (
        select(*told, signals.c.at, traces.c.id.label("trace_id"), runs.c.position)
        .join(runs, runs.c.run_id == run)
        .join(traces, traces.c.id == runs.c.trace_id)
        .where(traces.c.id.in_(ids), ~of_a_later_one, ~itself)
    )
    by_id = select(*told, signals.c.at, run.label("trace_id"), null().label("position")).where(run.in_(ids))
    return by_id, by_run


def _signals(rows: Sequence[Row[Any]], calls: Sequence[Row[Any]]) -> tuple[Signal, ...]:
    tiers = {call.position: call.tier for call in calls}
    ordered = sorted(rows, key=lambda row: (row.at, row.kind, row.source))
    return tuple(
        Signal(
            row.run_id,
            row.kind,
            row.value,
            row.source,
            row.at,
            row.other or None,
            row.tier or (None if row.position is None else tiers.get(row.position)),
        )
        for row in ordered
    )


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
    )
    answers = texts.answers if texts is not None else {}
    attempts = tuple(_attempt(call, answers.get(str(call.position), {})) for call in calls if call.purpose == "answer")
    beside: dict[str, tuple[Attempt, ...]] = defaultdict(tuple)
    for call in calls:
        if call.purpose != "answer":
            beside[call.purpose] += (_attempt(call, answers.get(str(call.position), {})),)
    known = {run.run_id: run.position for run in runs if run.run_id != row.query_id}
    trace = Trace(query, row.task, attempts, row.reason or "", id=row.id)
    return Recorded(row.id, row.at, trace, row.origin, row.unit, row.propensity, known, dict(beside))


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
