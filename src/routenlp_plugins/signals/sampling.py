"""What belongs together in a store, and what of it is audited, with what probability.

A unit is drawn whole: all traces of one dialogue, or of one query that was asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select

from ..errors import DataError
from ..evaluate.units import unit_interval
from . import tables
from .engine import among
from .reading import between
from .rows import Recorded

__all__ = [
    "Groups",
    "audited_units",
    "certain_audits",
    "chance_of",
    "designed",
    "drawn",
    "in_sample",
    "unit_of",
    "was_audited",
]

CHUNK = 1000
"""Traces that one statement marks."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Of the whole store, so that a trace belongs to the same in every window of time.

    Attributes:
        units, queries: units, and ids of queries, of several traces.
    """

    units: frozenset[str]
    queries: frozenset[str]

    @classmethod
    def of(cls, connection: Connection) -> Groups:
        """Those of a store."""
        traces = tables.traces

        def several(column: Any) -> frozenset[str]:
            found = select(column).where(column.is_not(None)).group_by(column).having(func.count() > 1)
            return frozenset(connection.scalars(found))

        return cls(several(traces.c.unit), several(traces.c.query_id))

    def group(self, unit: str | None, query_id: str | None) -> str | None:
        """What a trace belongs to, if others do too; None if it stands alone."""
        if unit is not None:
            return unit if unit in self.units else None
        return f"query {query_id}" if query_id in self.queries else None

    def name(self, recorded: Recorded) -> str:
        """The id of its query, unless others have the same."""
        named = recorded.trace.query.id
        return recorded.id if named is None or named in self.queries else named


def unit_of(unit: str | None, query_id: str | None, trace_id: str) -> str:
    """What is drawn with a trace, whatever else is recorded later: its unit, its query, or the trace alone."""
    if unit is not None:
        return unit
    return trace_id if query_id is None else f"query {query_id}"


def was_audited() -> ColumnElement[bool]:
    """Of a trace: whether an audit may be about it."""
    traces, runs, signals = tables.traces, tables.runs, tables.signals
    audits = select(signals.c.run_id).where(signals.c.kind == "audit")
    by_run = audits.join(runs, runs.c.run_id == signals.c.run_id).where(runs.c.trace_id == traces.c.id)
    itself = exists(audits.where(signals.c.run_id == traces.c.id).correlate(traces))
    return or_(itself, exists(by_run.correlate(traces)))


def in_sample() -> ColumnElement[bool]:
    """Of a trace: whether it is audited by design; where that does not say which ones are, those that were."""
    traces = tables.traces
    return or_(traces.c.drawn, and_(traces.c.drawn.is_(None), was_audited()))


def audited_units(connection: Connection) -> set[str]:
    """Units of which a trace is audited, or is to be."""
    traces = tables.traces
    found = connection.execute(select(traces.c.id, traces.c.unit, traces.c.query_id).where(in_sample()))
    return {unit_of(row.unit, row.query_id, row.id) for row in found}


def certain_audits(connection: Connection, since: float | None, until: float | None) -> int:
    """How many traces were certain to be audited."""
    traces = tables.traces
    certain = select(func.count()).select_from(traces).where(traces.c.propensity >= 1, *between(since, until))
    return int(connection.scalar(certain) or 0)


def chance_of(*, labelled: bool, unaudited: bool) -> Callable[[Recorded, bool], float | None]:
    """(trace, whether it was audited) -> the probability with which a row of such a sample was drawn."""

    def chance(recorded: Recorded, audited: bool) -> float | None:
        known = recorded.propensity
        if known is None and audited and (labelled or unaudited):
            raise DataError(
                f"trace {recorded.id}: it was audited, and nobody told with what probability, so that audits are no "
                "sample of all; let store.draw choose what is audited, or tell store.design how it was chosen by chance"
            )
        if labelled:
            return known
        # what no design speaks of is not audited
        return (1.0 if known is None else 1 - known) if unaudited else None

    return chance


def designed(connection: Connection, propensity: float, since: float | None, until: float | None) -> int:
    """Give the traces that have no propensity this one; how many there were."""
    traces = tables.traces
    _check_share("propensity", propensity)
    alike = traces.update().where(traces.c.propensity.is_(None), *between(since, until))
    return int(connection.execute(alike.values(propensity=float(propensity), design="told")).rowcount)


def drawn(
    connection: Connection, share: float, seed: int, since: float | None, until: float | None
) -> ColumnElement[bool]:
    """Choose by a hash of the unit, among what nobody has drawn from and what this seed has with a smaller share.

    Returns:
        A condition for the traces that this seed has chosen.
    """
    _check_share("share", share)
    traces, mine = tables.traces, f"draw {seed}"
    open_to_it = or_(traces.c.propensity.is_(None), and_(traces.c.design == mine, traces.c.propensity < share))
    window = between(since, until)
    rows = connection.execute(select(traces.c.id, traces.c.unit, traces.c.query_id).where(open_to_it, *window)).all()
    if rows:
        values = unit_interval([unit_of(row.unit, row.query_id, row.id) for row in rows], seed, "draw")
        chosen = [row.id for row, value in zip(rows, values.tolist(), strict=True) if value < share]
        designed = traces.update().where(open_to_it, *window)
        connection.execute(designed.values(propensity=float(share), design=mine, drawn=False))
        for start in range(0, len(chosen), CHUNK):
            ids = among(connection, traces.c.id, chosen[start : start + CHUNK])
            connection.execute(traces.update().where(ids).values(drawn=True))
    return and_(traces.c.design == mine, traces.c.drawn)


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise DataError(f"{name} must be in (0, 1], got {value!r}")
