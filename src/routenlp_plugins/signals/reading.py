"""From rows of the tables back to what was recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Engine, Row, and_, or_, select

from ..types import Attempt, Completion, Query, Trace
from . import tables
from .rows import Recorded

__all__ = ["read_traces"]

PAGE = 1000
FACTS = ("model", "prompt", "input_tokens", "cached_tokens", "output_tokens", "cost_usd", "latency_ms")


def read_traces(engine: Engine, since: float | None, until: float | None) -> Iterator[Recorded]:
    """What was recorded in [since, until), in order of time and id; a page at a time, so that writers go on."""
    traces = tables.traces
    chosen = select(traces).order_by(traces.c.at, traces.c.id).limit(PAGE)
    if since is not None:
        chosen = chosen.where(traces.c.at >= since)
    if until is not None:
        chosen = chosen.where(traces.c.at < until)
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
        for row in found:
            yield _recorded(row, calls[row.id], texts.get(row.id), runs[row.id])
        if len(found) < PAGE:
            return
        last = found[-1]


def _of(table: Any, ids: Sequence[str]) -> Any:
    return select(table).where(table.c.trace_id.in_(ids))


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
    known = {run.run_id: run.position for run in runs if run.run_id != row.query_id}
    trace = Trace(query, row.task, attempts, row.reason or "")
    return Recorded(row.id, row.at, trace, row.origin, row.unit, row.propensity, known)


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
