"""Keep a certificate honest while it serves: audit a random share of all queries on every tier."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING
from uuid import uuid4

from .dispatch import Dispatcher
from .errors import DataError, PortfolioError, TierError
from .evaluate.outcomes import Outcome, OutcomeRow
from .evaluate.resuming import append_row, locked, whole_rows
from .evaluate.units import unit_interval
from .flow import plan
from .tiers.boundary import SyncTierCallable, call_tier, sync_form
from .types import Answer, Attempt, Call, Completion, Delta, Query, Trace
from .watching import Watch

if TYPE_CHECKING:
    from .signals.store import TraceStore

__all__ = ["AuditOptions", "Auditor"]

logger = logging.getLogger(__name__)

Quality = Callable[[Query, Completion], float | None]
"""(query, answer of a tier) -> quality in [0, 1] as in the outcomes the release was fitted on; None is unknown."""


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """How much is audited.

    Attributes:
        share: of all queries, drawn by a hash of their id before anything is decided.
        seed: of that hash.
        delta: chance that a certificate that holds is ever declared expired, shared by the certified tasks; None takes
            that of the certificate.
        workers: audits that run at once, in threads, after their query was answered.
    """

    share: float = 0.02
    seed: int = 0
    delta: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise DataError(f"share must be in (0, 1], got {self.share!r}")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise DataError(f"workers must be 1, 2, ..., got {self.workers!r}")
        if self.delta is not None and not (isinstance(self.delta, int | float) and 0 < self.delta < 1):
            raise DataError(f"delta must be strictly between 0 and 1, got {self.delta!r}")


class Auditor:
    """A dispatcher whose certificate is watched; a context manager.

    A random share of all queries, whichever tier answered them, is also put to every other tier, after the answer
    has been returned. Each audited row tells what the certified policy did on a query drawn like all others, so that
    nothing has to be corrected for what the policy chose to call. A test that may be looked at after every row
    (`routenlp_plugins.cascade.monitor`) declares the certificate of a task expired once the rows speak against it; the
    task is then answered by the frontier, while its audits go on: they are what a new release is fitted on.

    The rows are appended to `log` in the outcome format. That file is the whole state: a new auditor on the same file
    goes on where the last one stopped.

    Args:
        dispatcher: what answers; its release must be certified.
        quality: scores the answers of all tiers; called in a thread.
        log: file of audited outcomes, ``.jsonl``.
        store: keeps the trace of every query too, what audits called, and as signals of kind ``audit`` the qualities
            that they found, with the propensity of being audited; flushing and closing it is the caller's.

    Raises:
        DataError: the log holds rows of another release or another share, or another auditor is writing to it.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        quality: Quality,
        log: str | Path,
        options: AuditOptions | None = None,
        store: TraceStore | None = None,
    ) -> None:
        if not callable(quality):
            raise DataError(f"quality must be a function (query, completion) -> quality, got {quality!r}")
        if store is not None and not hasattr(store, "record_calls"):
            raise DataError(f"store must be a TraceStore, got {type(store).__name__}")
        self.store = store
        self.options = options or AuditOptions()
        self.certified = dispatcher
        self.quality = quality
        self.log = Path(log).resolve()
        self.spent_usd = 0.0
        self.watch = Watch.over(dispatcher.release, self.options.delta)
        self._functions = _functions(dispatcher)
        self._running: set[Future[None]] = set()
        self._taken: set[str | None] = set()
        self._failed = False
        self._closed = False
        self._process = os.getpid()
        self._writing = Lock()
        with ExitStack() as stack:
            stack.enter_context(locked(self.log))
            self._seen = whole_rows(self.log, self._check)
            for row in self._seen.values():
                self.watch = self.watch.after(row, dispatcher.comparators)
            self._pool = stack.enter_context(ThreadPoolExecutor(self.options.workers, thread_name_prefix="audit"))
            self._open = stack.pop_all()
        self._serving = self._dispatcher()

    def __enter__(self) -> Auditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # the error of the body is what is raised; those of audits were logged
        self._closed = True
        self._open.close()

    def run(self, query: Query | str) -> Answer:
        """Answer a query as the dispatcher does; its audit, if it is drawn, comes later.

        Raises:
            TierError: the frontier failed.
        """
        query = self._identified(query)
        with self._failures(query):
            answer = self._serving.run(query)
        self._audit_later(query, answer.trace)
        return answer

    async def arun(self, query: Query | str) -> Answer:
        """As `run`, without blocking the event loop."""
        query = self._identified(query)
        with self._failures(query):
            answer = await self._serving.arun(query)
        self._audit_later(query, answer.trace)
        return answer

    def stream(self, query: Query | str) -> Generator[Delta | Answer]:
        """As `run`, piece by piece; see `Dispatcher.stream`."""
        query = self._identified(query)
        with self._failures(query), closing(self._serving.stream(query)) as parts:
            for part in parts:
                if isinstance(part, Answer):
                    self._audit_later(query, part.trace)
                yield part

    async def astream(self, query: Query | str) -> AsyncGenerator[Delta | Answer]:
        """As `stream`, without blocking the event loop."""
        query = self._identified(query)
        with self._failures(query):
            async with aclosing(self._serving.astream(query)) as parts:
                async for part in parts:
                    if isinstance(part, Answer):
                        self._audit_later(query, part.trace)
                    yield part

    @contextmanager
    def _failures(self, query: Query) -> Iterator[None]:
        """What nobody answered is audited too."""
        try:
            yield
        except TierError as error:
            self._audit_later(query, error.trace)
            raise

    @property
    def expired(self) -> dict[str, str]:
        """Task -> why its certificate has expired."""
        return self.watch.expired

    def flush(self) -> None:
        """Wait for the audits under way.

        A row whose quality function failed, or returned what is no quality, is logged with unknown quality.

        Raises:
            DataError, or what the quality function raised: for the first audit since the last time that ended so.
        """
        ended = list(self._running)
        errors = [error for future in ended if (error := future.exception()) is not None]
        self._running.difference_update(ended)
        self._failed = False
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Wait for the audits under way and let go of the log."""
        self._closed = True
        with self._open:
            self.flush()

    def drawn(self, query: Query) -> bool:
        """Whether a query is audited: a hash of its id, so that nothing about it or its answer plays a part."""
        return bool(unit_interval([query.id or ""], self.options.seed, "audit")[0] < self.options.share)

    def _identified(self, query: Query | str) -> Query:
        if self._closed:
            raise DataError(f"the auditor of {self.log} is closed; open a new one on the same log")
        if os.getpid() != self._process:
            raise DataError(
                f"the auditor of {self.log} was opened in another process; open one in each process, on its own log"
            )
        query = Query(query) if isinstance(query, str) else query
        if query.id is not None and not (isinstance(query.id, str) and query.id):
            raise DataError(f"query id must be a non-empty string, or None for a new one, got {query.id!r}")
        return query if query.id is not None else replace(query, id=uuid4().hex)

    def _speaks_of(self, query: Query, task: str | None) -> bool:
        # calls that need more than their task has are not what the certificate speaks of
        covered = self.certified.release.policy.requires.get(task or "", ())
        return query.requires <= set(covered) and bool(self.watch.proof_of(task))

    def _audit_later(self, query: Query, trace: Trace | None) -> None:
        if trace is None or not self.drawn(query):
            return
        task = plan(self.certified.release.policy, query)[0]
        if not self._speaks_of(query, task):
            return
        with self._writing:
            if query.id in self._seen or query.id in self._taken:
                return
            self._taken.add(query.id)
        try:
            future = self._pool.submit(self._audit, replace(query, task=task), trace)
        except RuntimeError:
            # closed while the answer was made, which must reach the user all the same
            return
        self._running.add(future)
        future.add_done_callback(self._ended)

    def _ended(self, audit: Future[None]) -> None:
        error = audit.exception()
        if error is not None:
            logger.warning("audit for %s: %s: %s", self.log, type(error).__name__, error)
        # the first failure is kept, so that flush tells
        if error is None or self._failed:
            self._running.discard(audit)
        self._failed |= error is not None

    def _audit(self, query: Query, trace: Trace) -> None:
        made = {attempt.tier: attempt for attempt in trace.attempts}
        outcomes = {name: self._outcome(name, query, made.get(name)) for name in self._tiers(query)}
        try:
            for name, outcome in outcomes.items():
                if outcome.error is None:
                    outcomes[name] = replace(outcome, quality=self._quality_of(query, name, outcome.completion))
        finally:
            # also where the user's function failed: else what it fails on would never be seen
            self._keep(query, outcomes)
            if self.store is not None:
                _tell(self.store, trace, {name: one for name, one in outcomes.items() if name not in made}, outcomes)

    def _keep(self, query: Query, outcomes: Mapping[str, Outcome]) -> None:
        row = OutcomeRow(
            replace(query, payload=None),
            outcomes,
            timestamp=datetime.now(UTC).isoformat(),
            propensity=self.options.share,
            policy=self._policy,
            source=f"{self.log}:{query.id}",
        )
        with self._writing:
            self._taken.discard(query.id)
            append_row(self.log, row)
            self._seen[str(query.id)] = row
            before, self.watch = self.watch.expired, self.watch.after(row, self.certified.comparators)
            if self.watch.expired != before:
                self._serving = self._dispatcher()

    @property
    def _policy(self) -> str | None:
        certificate = self.certified.release.certificate
        return None if certificate is None else certificate.policy

    def _dispatcher(self) -> Dispatcher:
        of = self.certified
        # first, since a trace is written once and this one knows the propensity
        listeners = of.listeners if self.store is None else (self._record, *of.listeners)
        return Dispatcher(self.watch.serving, of.tiers, of.comparators, listeners)

    def _record(self, trace: Trace) -> None:
        if self.store is not None:
            if not self._speaks_of(trace.query, trace.task):
                self.store.record(trace)
                return
            with self._writing:
                again = trace.query.id in self._seen or trace.query.id in self._taken
            # a query is audited once
            drawn = None if again else self.drawn(trace.query)
            self.store.record(trace, propensity=self.options.share, drawn=drawn)

    def _check(self, row: OutcomeRow) -> None:
        unknown = [tier for tier in row.outcomes if tier not in self.certified.release.portfolio.names]
        if unknown or self.certified.release.portfolio.frontier not in row.outcomes:
            raise DataError(f"{row.source}: belongs to another portfolio; log to a new file")
        if row.policy != self._policy:
            raise DataError(f"{row.source}: was audited under another release; log to a new file")
        if row.propensity != self.options.share:
            raise DataError(
                f"{row.source}: was drawn with a share of {row.propensity}, not {self.options.share}; go on with that "
                "one, or log to a new file"
            )

    def _tiers(self, query: Query) -> tuple[str, ...]:
        portfolio = self.certified.release.portfolio
        return (*(n for n in portfolio.below_frontier(query.task or "") if n in self._functions), portfolio.frontier)

    def _outcome(self, tier: str, query: Query, made: Attempt | None) -> Outcome:
        """What the tier answered, now if it was not asked before; its quality is still unknown."""
        if made is not None and made.error is not None:
            return Outcome(None, Completion(""), made.error)
        completion = None if made is None else made.completion
        if completion is None:
            try:
                completion = call_tier(
                    self.certified.release.portfolio.tier(tier), self._functions[tier], Call(tier, query)
                )
            except TierError as error:
                return Outcome(None, Completion(""), str(error))
            self.spent_usd += completion.cost_usd or 0.0
        return Outcome(None, completion)

    def _quality_of(self, query: Query, tier: str, completion: Completion) -> float | None:
        quality = self.quality(query, completion)
        if quality is not None and not (isinstance(quality, int | float) and 0 <= quality <= 1):
            raise DataError(
                f"query {query.id!r}: the quality function returned {quality!r} for {tier}; expected [0, 1]"
            )
        return None if quality is None else float(quality)


def _tell(store: TraceStore, trace: Trace, called: Mapping[str, Outcome], outcomes: Mapping[str, Outcome]) -> None:
    """What an audit called, and what it found."""
    attempts = [
        Attempt(name, False, error=one.error)
        if one.error is not None
        else Attempt(name, False, completion=replace(one.completion, payload=None))
        for name, one in called.items()
    ]
    store.record_calls(trace.id, "audit", attempts)
    for name, one in outcomes.items():
        if one.quality is not None:
            store.signal(trace.id, "audit", one.quality, "auditor", tier=name)


def _functions(dispatcher: Dispatcher) -> dict[str, SyncTierCallable]:
    """The tiers that can be called from a thread."""
    functions = {name: function for name, tier in dispatcher.tiers.items() if (function := sync_form(tier)) is not None}
    missing = [name for name in dispatcher.release.policy.tiers if name not in functions]
    if missing:
        raise PortfolioError(f"audit: {', '.join(missing)} is async only; audits need a sync form")
    return functions
