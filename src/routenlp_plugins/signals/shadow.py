"""Cheap tiers answer a share of the queries too, in the background: outcomes exist before anything is routed."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from time import monotonic
from types import TracebackType

from ..errors import DataError, PortfolioError, TierError
from ..evaluate.units import unit_interval
from ..portfolio import Portfolio
from ..tiers.boundary import SyncTierCallable, TierCallable, call_tier, sync_form
from ..types import Attempt, Call, Query
from .store import TraceStore

__all__ = ["Shadow", "ShadowCounts", "ShadowOptions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShadowOptions:
    """How much runs in the shadow.

    Attributes:
        share: of the queries, drawn by a hash of their run id.
        seed: of that hash.
        budget_usd: what the shadow calls of the store may cost in all, earlier ones included; calls under way may
            exceed it. None is no limit.
        workers: queries that run at once, in threads.
        waiting: queries that may wait for a worker; beyond it they are left out, and counted.
    """

    share: float = 0.1
    seed: int = 0
    budget_usd: float | None = None
    workers: int = 1
    waiting: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise DataError(f"share must be in (0, 1], got {self.share!r}")
        budget = self.budget_usd
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0):
            raise DataError(f"budget_usd must be at least 0, or None for no limit, got {budget!r}")
        for name in ("workers", "waiting"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{name} must be 1, 2, ..., got {value!r}")


@dataclass(frozen=True, slots=True)
class ShadowCounts:
    """What became of the queries that were drawn.

    Attributes:
        run: whose tiers were called.
        failed: calls that gave no answer.
        left_out: because too many waited.
        beyond_budget: because the budget was spent, or could not be kept: a call had no known cost.
        unable: because nobody knows how another tier would be asked, or their task does not have what they ask for.
        spent_usd: by all shadow calls of the store.
    """

    run: int
    failed: int
    left_out: int
    beyond_budget: int
    unable: int
    spent_usd: float


class Shadow:
    """Puts a random share of what was answered to other tiers, after the answer; a context manager.

    Which queries are drawn depends on nothing but a hash of their run id, so that the traces with shadow calls are a
    random sample of all: ``store.outcomes(beside="shadow")``.

    Args:
        store: where the traces are, and the calls go.
        portfolio: prices the calls, and says which tiers may serve a task.
        tiers: name -> callable ``Call -> Completion`` with a sync form, of tiers below the frontier.
        options: how much.

    Raises:
        PortfolioError: a tier is unknown, the frontier, no callable, or async only.
    """

    def __init__(
        self,
        store: TraceStore,
        portfolio: Portfolio,
        tiers: Mapping[str, TierCallable],
        options: ShadowOptions | None = None,
    ) -> None:
        self.store = store
        self.portfolio = portfolio
        self.options = options or ShadowOptions()
        self._functions = _functions(portfolio, tiers)
        self._spent = store.spent_usd("shadow")
        self._counts = {"run": 0, "failed": 0, "left_out": 0, "beyond_budget": 0, "unable": 0}
        self._asked_at = monotonic()
        self._waiting = 0
        self._lock = Lock()
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.options.workers, thread_name_prefix="shadow")
        self._closed = False

    def __enter__(self) -> Shadow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def drawn(self, run_id: str) -> bool:
        """Whether the query of a run is put to the other tiers."""
        return bool(unit_interval([run_id], self.options.seed, "shadow")[0] < self.options.share)

    def offer(
        self, run_id: str, query: Query, asked: Collection[str] = (), *, able: bool = True
    ) -> Future[None] | None:
        """Put a query to the other tiers if it is drawn; its trace has to be recorded before.

        Args:
            asked: tiers that have answered it already.
            able: whether others can be asked it; those that cannot are counted, and told once.

        Returns:
            A future that resolves when the calls are committed; None where the query was not drawn, or is left out.
        """
        if not self.drawn(run_id):
            return None
        if os.getpid() != self._process:
            # threads do not survive a fork
            self._process = os.getpid()
            self._waiting = 0
            self._pool = ThreadPoolExecutor(self.options.workers, thread_name_prefix="shadow")
        with self._lock:
            if self._closed:
                return None
            if not able:
                if not self._counts["unable"]:
                    what = ", ".join(sorted(query.requires)) or "a task of the portfolio"
                    logger.warning("task %r: a call that needs %s is not shadowed, nor are others", query.task, what)
                self._counts["unable"] += 1
                return None
            if self._beyond_budget():
                self._counts["beyond_budget"] += 1
                return None
            if self._waiting >= self.options.waiting:
                self._counts["left_out"] += 1
                return None
            self._waiting += 1
            return self._pool.submit(self._run, run_id, query, frozenset(asked))

    def counts(self) -> ShadowCounts:
        """What became of the queries that were drawn, of this process."""
        with self._lock:
            return ShadowCounts(**self._counts, spent_usd=self._spent)

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        with self._lock:
            self._closed = True
        if os.getpid() == self._process:
            self._pool.shutdown()

    def _beyond_budget(self) -> bool:
        if self.options.budget_usd is None:
            return False
        if monotonic() - self._asked_at > 10:
            # other processes spend too
            self._asked_at = monotonic()
            self._spent = max(self._spent, self.store.spent_usd("shadow"))
        return not self._spent < self.options.budget_usd

    def _run(self, run_id: str, query: Query, asked: Collection[str]) -> None:
        attempts = []
        try:
            for name in self.portfolio.below_frontier(query.task or ""):
                if name in self._functions and name not in asked:
                    if self._beyond_budget():
                        break
                    attempts.append(self._attempt(name, query))
        finally:
            with self._lock:
                self._waiting -= 1
                self._counts["run" if attempts else "beyond_budget"] += 1
        if attempts:
            try:
                self.store.record_calls(run_id, "shadow", attempts).result()
            except DataError as error:
                logger.warning("shadow calls of %s are lost: %s", run_id, error)
                raise

    def _attempt(self, name: str, query: Query) -> Attempt:
        tier = self.portfolio.tier(name)
        try:
            completion = call_tier(tier, self._functions[name], Call(name, query))
        except TierError as error:
            with self._lock:
                self._counts["failed"] += 1
                first = self._counts["failed"] == 1
            if first:
                logger.warning("a shadow call of %s failed, and more may: %s", name, type(error.__cause__).__name__)
            return Attempt(name, False, error=str(error))
        with self._lock:
            if completion.cost_usd is not None:
                self._spent += completion.cost_usd
            elif self.options.budget_usd is not None:
                logger.warning("shadow runs end: a call of %s has no known cost, so that no budget can be kept", name)
                self._spent = float("inf")
        return Attempt(name, False, completion=replace(completion, payload=None))


def _functions(portfolio: Portfolio, tiers: Mapping[str, TierCallable]) -> dict[str, SyncTierCallable]:
    functions = {}
    for name, tier in tiers.items():
        portfolio.tier(name)
        if not callable(tier):
            raise PortfolioError(
                f"tier {name!r}: {type(tier).__name__} is no callable Call -> Completion; of a framework's model "
                "shadow_tiers of its adapter makes one"
            )
        if name == portfolio.frontier:
            raise PortfolioError(f"tiers: {name} is the frontier, which answers already; give the others")
        function = sync_form(tier)
        if function is None:
            raise PortfolioError(f"tier {name!r} is async only; shadow runs need a sync form")
        functions[name] = function
    if not functions:
        raise PortfolioError("tiers: none is given; there is nothing to run in the shadow")
    return functions
