"""Drivers of the flow: they make the calls that `route` asks for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .comparing import Comparator
from .deciding import ConformalCascade
from .errors import PortfolioError, TierError
from .flow import drive, task_of
from .release import Release
from .tiers.boundary import TierCallable, acall_tier, async_form, boundary, call_tier, sync_form
from .types import Answer, Call, Completion, Query, Trace

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
        cascade = self._cascade
        # an encoder may take its time
        flow = await asyncio.to_thread(cascade.flow, asked) if self.release.router else cascade.flow(asked)
        with self._telling(asked):
            try:
                step = next(flow)
                while True:
                    try:
                        completion = await self._acall(step)
                    except TierError as error:
                        step = flow.throw(error)
                    else:
                        step = flow.send(completion)
            except StopIteration as stop:
                answer: Answer = stop.value
        self._tell(answer.trace)
        return answer

    @contextmanager
    def _telling(self, query: Query) -> Iterator[None]:
        """Tells of a query that nobody answered."""
        try:
            yield
        except TierError as error:
            task = task_of(self.release.policy, query)
            error.trace = Trace(query, task, error.attempts, f"no tier answered ({error})")
            self._tell(error.trace)
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

    async def _acall(self, call: Call) -> Completion:
        tier, function = self._priced[call.tier], async_form(self.tiers[call.tier])
        if function is None:
            return await asyncio.to_thread(self._call, call)
        return await acall_tier(tier, function, call)
