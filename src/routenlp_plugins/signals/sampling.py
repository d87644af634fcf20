"""What belongs together in a store, and with what probability it was to be audited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, func, or_, select

from ..errors import DataError
from ..evaluate.units import unit_interval
from . import tables
from .reading import between
from .rows import Recorded

__all__ = ["Groups", "audited_units", "certain_audits", "designed", "drawn", "spared", "was_audited"]


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
        if unit in self.units:
            return unit
        return f"query {query_id}" if query_id in self.queries else None

    def unit(self, recorded: Recorded) -> str:
        """What is drawn from the population: the group, or the trace itself."""
        return self.group(recorded.unit, recorded.trace.query.id) or recorded.unit or recorded.id

    def name(self, recorded: Recorded) -> str:
        """The id of its query, unless others have the same."""
        named = recorded.trace.query.id
        return recorded.id if named is None or named in self.queries else named


def was_audited() -> ColumnElement[bool]:
    """Of a trace: whether an audit may be about it."""
    traces, runs, signals = tables.traces, tables.runs, tables.signals
    audits = select(signals.c.run_id).where(signals.c.kind == "audit")
    by_run = audits.join(runs, runs.c.run_id == signals.c.run_id).where(runs.c.trace_id == traces.c.id)
    itself = exists(audits.where(signals.c.run_id == traces.c.id).correlate(traces))
    return or_(itself, exists(by_run.correlate(traces)))


def audited_units(connection: Connection, groups: Groups) -> set[str]:
    """Units of which an answer was audited."""
    traces = tables.traces
    found = connection.execute(select(traces.c.id, traces.c.unit, traces.c.query_id).where(was_audited()))
    return {groups.group(row.unit, row.query_id) or row.unit or row.id for row in found}


def spared(connection: Connection, groups: Groups, since: float | None, until: float | None) -> dict[str, float]:
    """Group -> the probability that none of its traces in [since, until) is audited, where that is known."""
    traces = tables.traces
    found: dict[str, float | None] = {}
    for row in connection.execute(
        select(traces.c.unit, traces.c.query_id, traces.c.propensity).where(*between(since, until))
    ):
        group = groups.group(row.unit, row.query_id)
        if group is not None:
            before = found.get(group, 1.0)
            found[group] = None if before is None or row.propensity is None else before * (1 - row.propensity)
    return {group: chance for group, chance in found.items() if chance is not None}


def certain_audits(connection: Connection, since: float | None, until: float | None) -> int:
    """How many traces were certain to be audited."""
    traces = tables.traces
    certain = select(func.count()).select_from(traces).where(traces.c.propensity >= 1, *between(since, until))
    return int(connection.scalar(certain) or 0)


def designed(connection: Connection, propensity: float, since: float | None, until: float | None) -> int:
    """Give the traces that have no propensity this one; how many there were."""
    traces = tables.traces
    if isinstance(propensity, bool) or not isinstance(propensity, int | float) or not 0 < propensity <= 1:
        raise DataError(f"propensity must be in (0, 1], got {propensity!r}")
    alike = traces.update().where(traces.c.propensity.is_(None), *between(since, until))
    return int(connection.execute(alike.values(propensity=float(propensity))).rowcount)


def drawn(ids: Sequence[str], share: float, seed: int) -> set[str]:
    """Those of these traces that are audited: by a hash, so that nothing about them plays a part."""
    if not ids:
        return set()
    values = unit_interval(ids, seed, "draw")
    return {one for one, value in zip(ids, values.tolist(), strict=True) if value < share}
