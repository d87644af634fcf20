"""The trace store: what chains did and what people thought of it, in SQLite or PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from time import time
from types import TracebackType
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, func, insert, select

from ..comparing import Comparator, same_text
from ..errors import DataError
from ..evaluate.outcomes import OutcomeRow
from ..types import Attempt, Trace
from . import tables
from .counting import Counts
from .engine import open_engine, overwrite, writing
from .exporting import Label, check_selection, outcomes_of
from .opinions import Judged, audited, judged
from .reading import read_traces
from .redaction import Redact, Redaction
from .rows import Extra, Recorded, row_of_signal, rows_of_runs, rows_of_trace
from .sampling import Groups, audited_units, certain_audits, chance_of, designed, drawn, in_sample, unit_of, was_audited
from .signal import Signal
from .statements import Rows, add_calls, gently, known_ids, new_names, pruned, upsert
from .writer import Writer

__all__ = ["StoreOptions", "TraceStore"]


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
        drawn: bool | None = None,
        at: float | None = None,
    ) -> Future[None]:
        """Keep a trace.

        Args:
            run_id: its identity, by which signals find it; None is the trace's own. Signals find it by the id of its
                query too. A trace that is there already is not written again, but is known by new `runs`.
            runs: other ids by which it may be known; with a position, those of its calls.
            unit: what it belongs to (dialogue, user): traces of the same unit are not independent.
            origin: ``served`` by a policy, ``collected`` from a chain without one, or ``imported``.
            propensity: probability with which its unit was to be audited; None where that is not known.
            drawn: whether it is; None where the audits that come tell.
            at: seconds since 1970, UTC; None is now.

        Raises:
            DataError: the store is closed, or an identity is none.
        """
        identity = trace.id if run_id is None and isinstance(trace, Trace) else run_id
        when = time() if at is None else at
        names = {} if runs is None else dict(runs)
        recorded = Recorded(identity, when, trace, origin, unit, propensity, names, drawn=drawn)
        return self._writer.put("traces", recorded)

    def record_calls(
        self, trace_id: str, purpose: str, attempts: Sequence[Attempt], batch: str | None = None
    ) -> Future[None]:
        """Add calls that were made for a trace beside its answer: ``audit``, ``shadow``, ``judge``, ``distillation``.

        The trace has to be recorded before.

        Args:
            batch: identity of these calls; what is there already is not written again. None makes a new one.
        """
        made = tuple(attempts)
        return self._writer.put(
            "calls", Extra(trace_id, purpose, made) if batch is None else Extra(trace_id, purpose, made, batch)
        )

    def signal(
        self,
        run_id: str | UUID,
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
        if not isinstance(run_id, str | UUID):
            raise DataError(f"signal: run_id must be a string or a UUID, got {run_id!r}")
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
        with self._reading.begin() as connection:
            return Counts.of(connection)

    def traces(self, since: float | None = None, until: float | None = None) -> Iterator[Recorded]:
        """What was recorded in [since, until), seconds since 1970, in order of time."""
        return (recorded for recorded, _ in read_traces(self._reading, *_window(since, until)))

    def known(self, run_id: str) -> tuple[str, str | None] | None:
        """Where the trace of this identity came from, and the text of its query if it was kept; None if not written."""
        traces, contents = tables.traces, tables.contents
        with self._reading.begin() as connection:
            found = connection.execute(
                select(traces.c.origin, contents.c.text)
                .outerjoin(contents, contents.c.trace_id == traces.c.id)
                .where(traces.c.id == run_id)
            ).one_or_none()
        return None if found is None else (found.origin, found.text)

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
        unaudited: bool = False,
        without: Collection[str] = (),
        agree: Comparator = same_text,
        requires: Mapping[str, Collection[str]] | None = None,
    ) -> Iterator[OutcomeRow]:
        """What was recorded in [since, until) in the outcome format, the calls beside the answer included.

        Left out are calls that needed more than text, and more than `requires`: no release is fitted for them. What
        several traces belong to, by their unit or by the id of their query, is a group.

        Args:
            beside: only traces that have calls of this purpose, such as ``shadow``: where they were drawn at random,
                those are a random sample of all.
            label: quality of an answer from what was said of it; None is unknown. Unless another one is given, that
                is what audits say, their mean if there are several.
            labelled: only the sample that was drawn to be audited, with its propensities; what was never audited of it
                has no quality.
            unaudited: only rows whose unit was neither drawn nor audited, for another label: a sample too, of the
                remaining probabilities.
            without: of `labelled` rows these units are left out, such as those that a label was learned from.
            agree: whether an answer says the same as the one that was returned, for labels that ask.
            requires: task -> what its calls may ask for beyond text, as `Portfolio.requires` has it.

        Raises:
            DataError: the sample is none: nobody told the propensity of what was audited (see `draw` and `design`), or
                some traces were certain to be audited, so that none like them remains unaudited.
        """
        check_selection(label, beside, labelled=labelled, unaudited=unaudited, without=without)
        since, until = _window(since, until)
        with self._reading.begin() as connection:
            groups = Groups.of(connection)
            left_out = audited_units(connection) if unaudited else set(without)
            certain = certain_audits(connection, since, until) if unaudited else 0
        if certain:
            raise DataError(
                f"unaudited: {certain} traces were certain to be audited, so that nothing unaudited speaks for such "
                "queries; certify on audits, with labels as hints"
            )
        found = read_traces(self._reading, since, until, *([in_sample()] if labelled else []))
        if beside is not None:
            found = ((recorded, signals) for recorded, signals in found if recorded.beside.get(beside))
        if left_out:
            found = ((one, signals) for one, signals in found if _unit(one) not in left_out)
        chance = chance_of(labelled=labelled, unaudited=unaudited)
        return outcomes_of(found, label, groups, agree, chance, requires or {})

    def judged(
        self, since: float | None = None, until: float | None = None, *, agree: Comparator = same_text
    ) -> Iterator[Judged]:
        """The audited answers of [since, until), with what else was said of them: what a `LabelModel` learns from.

        Where it is known which were drawn, other audits are left out: they are no sample.
        """
        since, until = _window(since, until)
        return judged(read_traces(self._reading, since, until, was_audited(), in_sample()), _unit, agree)

    def draw(
        self, share: float, since: float | None = None, until: float | None = None, *, seed: int = 0
    ) -> list[Recorded]:
        """Choose what of [since, until) is audited, by chance, and keep the propensity with all of it.

        Units are drawn whole: dialogues, and queries that were asked again. The same again chooses the same, a larger
        share with the same seed more. What another design speaks of, an `Auditor` or another seed, is left alone. What
        is drawn and never audited counts as bad.

        Raises:
            DataError: `share` is none.
        """
        since, until = _window(since, until)
        with writing(self._reading) as connection:
            chosen = drawn(connection, share, seed, since, until)
        return [recorded for recorded, _ in read_traces(self._reading, since, until, chosen)]

    def design(self, propensity: float, since: float | None = None, until: float | None = None) -> int:
        """Tell with what probability each trace of [since, until) was to be audited, where that is not known yet.

        For audits that were drawn by chance elsewhere; which ones were drawn, they tell themselves.

        Returns:
            How many traces there were.
        """
        with writing(self._reading) as connection:
            return designed(connection, propensity, *_window(since, until))

    def prune(self, before: float) -> int:
        """Delete the traces before a time, seconds since 1970, and what was said of them; how many there were."""
        with writing(self._reading) as connection:
            number = pruned(connection, before)
        if number:
            overwrite(self._reading)
        return number

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
        """One batch, one transaction; called in the writer's thread, without any thing where it is idle."""
        self._prune_if_due()
        if not things and not dropped:
            return
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


def _window(since: float | None, until: float | None) -> tuple[float | None, float | None]:
    for name, value in (("since", since), ("until", until)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or isnan(value)):
            raise DataError(f"{name} must be seconds since 1970, got {value!r}")
    return since, until


def _unit(recorded: Recorded) -> str:
    return unit_of(recorded.unit, recorded.trace.query.id, recorded.id)
