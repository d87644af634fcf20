"""The trace store: what chains did and what people thought of it, in SQLite or PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, func, insert, select

from ..comparing import Comparator, same_text
from ..errors import DataError
from ..evaluate.outcomes import OutcomeRow
from ..types import Attempt, Trace
from . import tables
from .engine import open_engine, writing
from .exporting import Label, outcomes_of
from .opinions import Judged, audited, judged
from .reading import read_traces, repeated_units, unaudited_chances
from .redaction import Redact, Redaction
from .rows import Extra, Recorded, row_of_signal, rows_of_runs, rows_of_trace
from .signal import Signal
from .statements import Rows, add_calls, gently, has_trace, known_ids, new_names, pruned, upsert
from .writer import Writer

__all__ = ["Counts", "StoreOptions", "TraceStore"]

LATE_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a store keeps what it is given.

    Attributes:
        capacity: of what waits to be written, traces and signals by themselves; beyond it the oldest is dropped.
        batch: the most that one transaction writes of each.
        interval: seconds until what was given is written at the latest.
        keep_days: older traces, and what was said of them, are deleted when the store is opened and once an hour;
            None keeps all.
    """

    capacity: int = 50_000
    batch: int = 500
    interval: float = 0.05
    keep_days: float | None = None

    def __post_init__(self) -> None:
        for name in ("capacity", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{name} must be 1, 2, ..., got {value!r}")
        for name in ("interval", "keep_days"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise DataError(f"{name} must be above 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class Counts:
    """What a store holds.

    Attributes:
        traces, calls, signals: written.
        repeated_signals: given again, the same or corrected.
        late_signals: given more than a day after their trace.
        unknown_signals: about a run that no trace is known of, so far.
        dropped: traces and signals that were never written, because too much waited.
    """

    traces: int
    calls: int
    signals: int
    repeated_signals: int
    late_signals: int
    unknown_signals: int
    dropped: int

    def as_dict(self) -> dict[str, int]:
        """In JSON types."""
        return asdict(self)


class TraceStore:
    """Keeps traces and signals; a context manager. Threads, event loops and processes may share one database.

    `record` and `signal` return at once, with a future that resolves when the thing is committed (in an event loop:
    `asyncio.wrap_future`). Nobody has to wait for it.

    Args:
        url: ``sqlite:///FILE`` or the file itself, or ``postgresql://USER@HOST/DATABASE``.
        redact: ``"drop"`` keeps no text of users or models, ``"hash"`` the SHA-256 of each, a function what it
            returns; None keeps all.
        options: sizes and times.
        create: whether a store that is not there is made.

    Raises:
        DataError: the database cannot be opened, is no trace store, or was written by a newer version.
        MissingExtraError: PostgreSQL without its driver.
    """

    def __init__(
        self,
        url: str | Path,
        redact: Redact = None,
        options: StoreOptions | None = None,
        *,
        create: bool = True,
    ) -> None:
        self.options = options or StoreOptions()
        self._redaction = Redaction(redact)
        self.engine = open_engine(url, create=create)
        self._process = os.getpid()
        self._pruned = 0.0
        self._prune_if_due()
        self._writer = Writer(
            self._write,
            ("traces", "calls", "signals"),
            self.options.capacity,
            self.options.batch,
            self.options.interval,
            after={"calls": "traces"},
        )

    def __enter__(self) -> TraceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def record(
        self,
        trace: Trace,
        run_id: str | None = None,
        *,
        runs: Mapping[str, int | None] | None = None,
        unit: str | None = None,
        origin: str = "served",
        propensity: float | None = None,
        at: float | None = None,
    ) -> Future[None]:
        """Keep a trace.

        Args:
            run_id: its identity, by which signals find it; None is the trace's own. Signals find it by the id of its
                query too. A trace that is there already is not written again, but is known by new `runs`.
            runs: other ids by which it may be known; with a position, those of its calls.
            unit: what it belongs to (dialogue, user): traces of the same unit are not independent.
            origin: ``served`` by a policy, ``collected`` from a chain without one, or ``imported``.
            propensity: probability with which its quality was to be found out; None where that is not known.
            at: seconds since 1970, UTC; None is now.

        Raises:
            DataError: the store is closed, or an identity is none.
        """
        identity = trace.id if run_id is None and isinstance(trace, Trace) else run_id
        recorded = Recorded(
            identity, time() if at is None else at, trace, origin, unit, propensity, {} if runs is None else dict(runs)
        )
        return self._writer.put("traces", recorded)

    def record_calls(self, trace_id: str, purpose: str, attempts: Sequence[Attempt]) -> Future[None]:
        """Add calls that were made for a trace beside its answer: ``audit``, ``shadow``, ``judge``, ``distillation``.

        The trace has to be recorded before.
        """
        return self._writer.put("calls", Extra(trace_id, purpose, tuple(attempts)))

    def signal(
        self,
        run_id: str,
        kind: str,
        value: float,
        source: str = "user",
        *,
        at: float | None = None,
        other: str | None = None,
        tier: str | None = None,
    ) -> Future[None]:
        """Keep what a source says about a run; see `Signal`. The same again changes nothing, a later value corrects.

        Raises:
            DataError: it is no signal, or the store is closed.
        """
        return self.give(Signal(str(run_id), kind, value, source, at, other, tier))

    def give(self, signal: Signal) -> Future[None]:
        """As `signal`."""
        return self._writer.put("signals", (signal, time()))

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was given before is committed.

        Raises:
            DeadlineExceededError: it is not, after `timeout` seconds.
            DataError: some of what was given since the last flush was dropped or refused.
        """
        self._writer.flush(timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """Write what is left and let go of the database."""
        self._writer.close(timeout)
        self._reading.dispose()

    def counts(self) -> Counts:
        """What the store holds, of all processes that write to it."""
        signals = tables.signals
        late = has_trace(signals.c.at > tables.traces.c.at + LATE_SECONDS)
        with self._reading.begin() as connection:

            def number(of: Any) -> int:
                return int(connection.scalar(of) or 0)

            return Counts(
                traces=number(select(func.count()).select_from(tables.traces)),
                calls=number(select(func.count()).select_from(tables.calls)),
                signals=number(select(func.count()).select_from(signals)),
                repeated_signals=number(select(func.sum(signals.c.given - 1))),
                late_signals=number(select(func.count()).select_from(signals).where(late)),
                unknown_signals=number(select(func.count()).select_from(signals).where(~has_trace())),
                dropped=number(select(func.sum(tables.drops.c.number))),
            )

    def traces(self, since: float | None = None, until: float | None = None) -> Iterator[Recorded]:
        """What was recorded in [since, until), seconds since 1970, in order of time."""
        return (recorded for recorded, _ in read_traces(self._reading, since, until))

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees the store as it is at its beginning; for questions of your own."""
        with self._reading.begin() as connection:
            yield connection

    def spent_usd(self, purpose: str) -> float:
        """What the calls of this purpose cost, as far as that is known."""
        calls = tables.calls
        with self._reading.begin() as connection:
            spent = connection.scalar(select(func.sum(calls.c.cost_usd)).where(calls.c.purpose == purpose))
        return float(spent or 0.0)

    def outcomes(
        self,
        label: Label = audited,
        since: float | None = None,
        until: float | None = None,
        *,
        beside: str | None = None,
        labelled: bool = False,
        without: Collection[str] = (),
        agree: Comparator = same_text,
    ) -> Iterator[OutcomeRow]:
        """What was recorded in [since, until) in the outcome format, the calls beside the answer included.

        Args:
            beside: only traces that have calls of this purpose, such as ``shadow``: where they were drawn at random,
                those are a random sample of all.
            label: quality of an answer from what was said of it; None is unknown. Unless another one is given, that
                is what audits say, their mean if there are several.
            labelled: only rows with the quality of an answer: of audits the sample that was drawn.
            without: audited units that are left out: those that a label was learned from, where audits certify, or all
                where labels do. Each row then says how probable it was that it stayed.
            agree: whether an answer says the same as the one that was returned, for labels that ask.
        """
        groups = repeated_units(self._reading, since, until)
        found = read_traces(self._reading, since, until)
        if beside is not None:
            found = ((recorded, signals) for recorded, signals in found if recorded.beside.get(beside))
        if without:
            found = ((one, signals) for one, signals in found if (one.unit or one.id) not in without)
        kept = unaudited_chances(self._reading, groups, since, until) if without else None
        rows = outcomes_of(found, label, groups, agree, kept=kept)
        if labelled:
            return (row for row in rows if any(outcome.quality is not None for outcome in row.outcomes.values()))
        return rows

    def judged(
        self, since: float | None = None, until: float | None = None, *, agree: Comparator = same_text
    ) -> Iterator[Judged]:
        """The audited answers of [since, until), with what else was said of them: what a `LabelModel` learns from."""
        return judged(read_traces(self._reading, since, until), agree)

    def prune(self, before: float) -> int:
        """Delete the traces before a time, seconds since 1970, and what was said of them; how many there were."""
        with writing(self._reading) as connection:
            return pruned(connection, before)

    @property
    def _reading(self) -> Any:
        if os.getpid() != self._process:
            # a connection cannot be shared with the process it was forked from
            self.engine.dispose(close=False)
            self._process = os.getpid()
        return self.engine

    def _prune_if_due(self) -> None:
        days = self.options.keep_days
        if days is not None and time() - self._pruned > 3600:
            self.prune(time() - days * 86_400)
            self._pruned = time()

    def _write(self, things: Sequence[Any], dropped: Mapping[str, int]) -> None:
        """One batch, one transaction; called in the writer's thread."""
        self._prune_if_due()
        recorded = [thing for thing in things if isinstance(thing, Recorded)]
        rows, names = Rows(), list[dict[str, Any]]()
        with writing(self._reading) as connection:
            known = known_ids(connection, [thing.id for thing in recorded])
            for thing in recorded:
                if thing.id in known:
                    names += rows_of_runs(thing)
                else:
                    rows.add(gently(rows_of_trace, thing, self._redaction))
                    known.add(thing.id)
            rows.insert(connection)
            if names:
                connection.execute(new_names(connection), names)
            for thing in things:
                if isinstance(thing, Extra):
                    add_calls(connection, thing, self._redaction)
            given = [row_of_signal(*thing) for thing in things if isinstance(thing, tuple)]
            if given:
                connection.execute(upsert(connection), given)
            lost = [{"at": time(), "what": lane, "number": number} for lane, number in dropped.items() if number]
            if lost:
                connection.execute(insert(tables.drops), lost)
