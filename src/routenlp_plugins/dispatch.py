"""Drivers of the flow: they make the calls that `route` asks for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from pathlib import Path

from .comparing import Comparator
from .deciding import ConformalCascade
from .errors import PortfolioError, TierError
from .flow import Flow, drive, task_of
from .release import Release
from .tiers.boundary import TierCallable, acall_tier, async_form, boundary, call_tier, sync_form
from .tiers.streams import FlowRun, astream_form, astream_tier, in_threads, stream_form, stream_tier
from .types import Answer, Call, Completion, Delta, Query, Trace

__all__ = ["Dispatcher", "Listener"]

logger = logging.getLogger(__name__)

Listener = Callable[[Trace], object]
"""Is told the trace of a query; what it returns is not looked at."""


class Dispatcher:
    """Answers queries with the policy of a release.

    Holds no state of any query: it may be shared by threads and event loops.

    Args:
        release: what decides, or the folder it was saved in.
        tiers: name -> callable ``Call -> Completion``, sync or async; every tier the release can call must be
            there. A tier that has both forms is a sync callable with an async method ``acall``.
        comparators: your own, by the names that tasks of the portfolio give them.
        listeners: are told the trace of every query, answered or not, such as ``store.record`` of a `TraceStore`. They
            are called before the answer is returned, and one that raises is logged and harms nothing.

    Raises:
        PortfolioError: a tier is missing, is not in the portfolio or is not callable.
        DataError: the policy needs a comparator that is not supplied.
    """

    def __init__(
        self,
        release: Release | str | Path,
        tiers: Mapping[str, TierCallable],
        comparators: Mapping[str, Comparator] | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._cascade = ConformalCascade(release, comparators)
        release = self._cascade.release
        names = release.portfolio.names
        missing = [name for name in release.policy.tiers if name not in tiers]
        if missing:
            raise PortfolioError(
                f"tiers: no callable for {', '.join(missing)}, which the release can call; given: "
                f"{', '.join(tiers) or 'none'}"
            )
        unknown = [name for name in tiers if name not in names]
        if unknown:
            raise PortfolioError(
                f"tiers: {', '.join(unknown)} is not in the portfolio of the release; its tiers: {', '.join(names)}"
            )
        for name, tier in tiers.items():
            if not callable(tier):
                raise PortfolioError(f"tiers: {name} must be a callable Call -> Completion, got {type(tier).__name__}")
        self.release = release
        self.comparators = comparators
        self.listeners = tuple(listeners)
        self.tiers = dict(tiers)
        self._priced = {tier.name: tier for tier in release.portfolio.tiers}

    def pinned(self, tier: str) -> Dispatcher:
        """A dispatcher with the same tiers that sends every query to this one."""
        portfolio = replace(self.release.portfolio, frontier=tier)
        release = Release.frontier_only(portfolio, tuple(self.release.policy.ladders))
        return Dispatcher(release, self.tiers, self.comparators, self.listeners)

    def run(self, query: Query | str) -> Answer:
        """Answer one query.

        Raises:
            TierError: the frontier failed; carries all attempts.
            PortfolioError: the query needs a tier that is async only.
        """
        asked = Query.given(query)
        with self._telling(asked):
            answer = drive(self._cascade.flow(asked), self._call)
        self._tell(answer.trace)
        return answer

    async def arun(self, query: Query | str) -> Answer:
        """Answer one query without blocking the event loop: sync tiers run in a thread.

        Raises:
            TierError: the frontier failed; carries all attempts.
        """
        asked = Query.given(query)
        run = FlowRun(await self._aflow(asked))
        with self._telling(asked, run):
            while run.call is not None:
                try:
                    completion = await self._acall(run.call)
                except TierError as error:
                    run.fail(error)
                else:
                    run.take(completion)
        self._tell(run.answer.trace)
        return run.answer

    def stream(self, query: Query | str) -> Generator[Delta | Answer]:
        """Answer one query piece by piece: the pieces, and at last the whole answer.

        No word of an answer that is rejected is ever passed on. What may still be rejected comes in one piece once it
        is accepted. What nothing can reject any more comes as its tier streams it: an answer of the frontier, and of a
        tier whose every answer is accepted. A tier streams by methods ``stream`` and ``astream``, as
        `OpenAICompatibleTier` does. Listeners are told of a stream that is closed before its end too.

        Raises:
            TierError: the frontier failed, or a tier some of whose answer was passed on; carries all attempts.
            PortfolioError: the query needs a tier that is async only.
        """
        asked = Query.given(query)
        run = FlowRun(self._cascade.flow(asked))
        with self._telling(asked, run):
            while run.call is not None:
                try:
                    with closing(self._pieces(run.call, run.passes_on)) as pieces:
                        for piece in pieces:
                            yield from run.take(piece)
                except TierError as error:
                    run.fail(error)
        self._tell(run.answer.trace)
        yield from run.rest()
        yield run.answer

    async def astream(self, query: Query | str) -> AsyncGenerator[Delta | Answer]:
        """As `stream`, without blocking the event loop: sync tiers run in a thread."""
        asked = Query.given(query)
        run = FlowRun(await self._aflow(asked))
        with self._telling(asked, run):
            while run.call is not None:
                try:
                    async with aclosing(self._apieces(run.call, run.passes_on)) as pieces:
                        async for piece in pieces:
                            for ready in run.take(piece):
                                yield ready
                except TierError as error:
                    run.fail(error)
        self._tell(run.answer.trace)
        for ready in run.rest():
            yield ready
        yield run.answer

    async def _aflow(self, query: Query) -> Flow:
        # an encoder may take its time
        return await asyncio.to_thread(self._cascade.flow, query) if self.release.router else self._cascade.flow(query)

    @contextmanager
    def _telling(self, query: Query, run: FlowRun | None = None) -> Iterator[None]:
        """Tells of a query that nobody answered, or whose answer nobody waited for."""
        try:
            yield
        except TierError as error:
            task = task_of(self.release.policy, query)
            error.trace = Trace(query, task, error.attempts, str(error))
            self._tell(error.trace)
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if run is not None and (attempts := run.abandoned()):
                task = task_of(self.release.policy, query)
                self._tell(Trace(query, task, attempts, "nobody waited for the answer"))
            raise

    def _tell(self, trace: Trace) -> None:
        for listener in self.listeners:
            try:
                with boundary("listener"):
                    listener(trace)
            except TierError as error:
                # its message may quote the query
                logger.warning("a listener failed with %s", type(error.__cause__).__name__)

    def _call(self, call: Call) -> Completion:
        function = sync_form(self.tiers[call.tier])
        if function is None:
            raise PortfolioError(f"tier {call.tier!r} is async only: use arun, or give it a sync form")
        return call_tier(self._priced[call.tier], function, call)

    def _pieces(self, call: Call, passes_on: bool) -> Generator[Delta | Completion]:
        function = stream_form(self.tiers[call.tier]) if passes_on else None
        if function is None:
            yield self._call(call)
        else:
            yield from stream_tier(self._priced[call.tier], function, call)

    async def _apieces(self, call: Call, passes_on: bool) -> AsyncGenerator[Delta | Completion]:
        tier = self.tiers[call.tier]
        function = astream_form(tier) if passes_on else None
        if function is None and passes_on and (blocking := stream_form(tier)) is not None:
            function = in_threads(blocking)
        if function is None:
            yield await self._acall(call)
            return
        async with aclosing(astream_tier(self._priced[call.tier], function, call)) as pieces:
            async for piece in pieces:
                yield piece

    async def _acall(self, call: Call) -> Completion:
        tier, function = self._priced[call.tier], async_form(self.tiers[call.tier])
        if function is None:
            return await asyncio.to_thread(self._call, call)
        return await acall_tier(tier, function, call)
