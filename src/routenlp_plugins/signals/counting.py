"""How much a store holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from . import tables
from .statements import has_trace, misplaced

__all__ = ["Counts"]

LATE_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What a store holds.

    Attributes:
        traces, calls, signals: written.
        repeated_signals: given again, the same or corrected.
        late_signals: given more than a day after their trace.
        unknown_signals: about a run that no trace is known of, so far.
        misplaced_signals: about a tier that was never asked in a trace that is known: its name may be wrong.
        dropped: traces and signals that were never written, because too much waited.
    """

    traces: int
    calls: int
    signals: int
    repeated_signals: int
    late_signals: int
    unknown_signals: int
    misplaced_signals: int
    dropped: int

    def as_dict(self) -> dict[str, int]:
        """In JSON types."""
        return asdict(self)

    @classmethod
    def of(cls, connection: Connection) -> Counts:
        """Count."""
        signals = tables.signals
        late = has_trace(signals.c.at > tables.traces.c.at + LATE_SECONDS)

        def number(of: Any) -> int:
            return int(connection.scalar(of) or 0)

        return cls(
            traces=number(select(func.count()).select_from(tables.traces)),
            calls=number(select(func.count()).select_from(tables.calls)),
            signals=number(select(func.count()).select_from(signals)),
            repeated_signals=number(select(func.sum(signals.c.given - 1))),
            late_signals=number(select(func.count()).select_from(signals).where(late)),
            misplaced_signals=number(select(func.count()).select_from(signals).where(misplaced())),
            unknown_signals=number(select(func.count()).select_from(signals).where(~has_trace())),
            dropped=number(select(func.sum(tables.drops.c.number))),
        )
