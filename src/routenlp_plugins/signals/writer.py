"""Writes in the background, in batches, without ever keeping a request waiting."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import count
from math import inf
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from ..errors import DataError, DeadlineExceededError, TierError
from ..tiers.boundary import boundary

__all__ = ["Item", "Write", "Writer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """Something to be written, and the promise about it."""

    what: Any
    number: int
    written: Future[None] = field(default_factory=Future)

    def settle(self, error: Exception | None = None) -> None:
        """Resolve the promise."""
        if error is None:
            self.written.set_result(None)
        else:
            self.written.set_exception(error)


Write = Callable[[Sequence[Any], Mapping[str, int]], None]
"""Writes these things, and by their lanes how many were dropped, in one transaction."""

LONGEST_WAIT = 5.0
"""Seconds between attempts on a database that cannot be reached."""
IDLE = 600.0
"""Seconds without anything to write after which `write` is called all the same, so that what is old is deleted."""


class Writer:
    """Bounded queues, and a thread that empties them.

    Args:
        write: what writes a batch; called in the thread.
        lanes: names of the queues; each is bounded by itself and keeps its order.
        capacity: of each queue; beyond it the oldest is dropped.
        batch: the most that is taken from a queue at once.
        interval: seconds until what was put is taken at the latest.
        after: lane -> the lane of what it builds on: nothing is taken before what was put there earlier.
    """

    def __init__(
        self,
        write: Write,
        lanes: Sequence[str],
        capacity: int = 50_000,
        batch: int = 500,
        interval: float = 0.05,
        after: Mapping[str, str] | None = None,
    ) -> None:
        self._write = write
        self._after = dict(after or {})
        self.capacity, self._batch, self._interval = capacity, min(batch, capacity), interval
        self._lanes = tuple(lanes)
        self._begin()
        atexit.register(self.close, 5.0)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._queues: dict[str, deque[Item]] = {lane: deque() for lane in self._lanes}
        self._flying: dict[str, list[Item]] = {lane: [] for lane in self._lanes}
        self._untold = Counter[str]()
        self._lost = Counter[str]()
        self._numbers = count()
        self._lock, self._wake = Lock(), Event()
        self._closed = False
        self._gave_up = Event()
        self._thread = Thread(target=self._run, name="trace-store", daemon=True)
        self._thread.start()
        if "multiprocessing.util" in sys.modules:
            # its processes end without the functions of atexit
            from multiprocessing.util import Finalize

            Finalize(None, self.close, (5.0,), exitpriority=0)

    def put(self, lane: str, what: Any) -> Future[None]:
        """Queue something; the future resolves when it is committed, or says why it never will be.

        Raises:
            DataError: the writer is closed.
        """
        if os.getpid() != self._process:
            # threads do not survive a fork; what the parent had queued is the parent's
            self._begin()
        queue = self._queues[lane]
        with self._lock:
            if self._closed:
                raise DataError("the trace store is closed")
            item = Item(what, next(self._numbers))
            # it will be written whatever becomes of who waits for it
            item.written.set_running_or_notify_cancel()
            queue.append(item)
            dropped = queue.popleft() if len(queue) > self.capacity else None
            if dropped is not None:
                self._untold[lane] += 1
                self._lost[lane] += 1
            full = len(queue) >= self._batch
        if dropped is not None:
            self._tell_dropped(lane, [dropped])
        if full:
            self._wake.set()
        return item.written

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was put before is committed.

        Raises:
            DeadlineExceededError: it is not, after `timeout` seconds.
            DataError: some of what was put since the last flush was dropped or refused.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            # a lane keeps its order: its last one is written last
            waiting = [queue or self._flying[lane] for lane, queue in self._queues.items()]
            last = [items[-1].written for items in waiting if items]
        self._wake.set()
        if wait(last, timeout).not_done:
            raise DeadlineExceededError(f"the trace store could not write everything within {timeout} s")
        with self._lock:
            lost, self._lost = self._lost, Counter()
        if lost:
            told = ", ".join(f"{number} {lane}" for lane, number in sorted(lost.items()))
            raise DataError(f"since the last flush the trace store dropped or refused: {told}")

    def close(self, timeout: float | None = None) -> None:
        """Write what is left and end the thread; what could not be written after `timeout` seconds is given up."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
        self._wake.set()
        self._thread.join(timeout)
        self._gave_up.set()
        self._wake.set()
        atexit.unregister(self.close)

    def _run(self) -> None:
        failures, wrote = 0, monotonic()
        while not self._gave_up.is_set():
            if failures:
                # what comes in meanwhile is no reason to try earlier
                self._gave_up.wait(min(0.1 * 2**failures, LONGEST_WAIT))
            else:
                self._wake.wait(self._interval)
            self._wake.clear()
            while (batch := self._taken()) or self._untold:
                error = self._written(batch)
                if error is not None:
                    self._returned(batch)
                    if not failures:
                        logger.warning("the trace store cannot be written to and is tried again: %s", error)
                    failures += 1
                    break
                if failures:
                    logger.warning("the trace store is written to again")
                failures, wrote = 0, monotonic()
            else:
                if self._closed:
                    return
                if monotonic() - wrote > IDLE:
                    self._tried((), {})
                    wrote = monotonic()
        for lane, queue in self._queues.items():
            self._tell_dropped(lane, queue)

    def _taken(self) -> dict[str, list[Item]]:
        with self._lock:
            for lane, queue in self._queues.items():
                earlier = self._queues[self._after[lane]] if lane in self._after else ()
                first = earlier[0].number if earlier else inf
                self._flying[lane] = []
                while queue and len(self._flying[lane]) < self._batch and queue[0].number < first:
                    self._flying[lane].append(queue.popleft())
            return {lane: items for lane, items in self._flying.items() if items}

    def _returned(self, batch: Mapping[str, list[Item]]) -> None:
        """Back to the head of the queues, and what no longer fits is dropped."""
        for lane, items in batch.items():
            with self._lock:
                self._flying[lane] = []
                queue = self._queues[lane]
                queue.extendleft(reversed(items))
                dropped = [queue.popleft() for _ in range(len(queue) - self.capacity)]
                if dropped:
                    self._untold[lane] += len(dropped)
                    self._lost[lane] += len(dropped)
            self._tell_dropped(lane, dropped)

    def _written(self, batch: Mapping[str, list[Item]]) -> str | None:
        """Why the database may take the batch later; a part of it that it will never take is refused by itself."""
        items = [item for lane in batch.values() for item in lane]
        with self._lock:
            untold, self._untold = self._untold, Counter()
        error = self._tried(items, untold)
        if error is None:
            for item in items:
                item.settle()
            self._settled()
            return None
        with self._lock:
            self._untold += untold
        if _passing(error):
            return type(error).__name__
        # one of them is at fault: each by itself
        for lane, some in batch.items():
            for item in some:
                error = self._tried([item], {})
                if error is not None and _passing(error):
                    return type(error).__name__
                item.settle(None if error is None else DataError(f"not written: {error}"))
                if error is not None:
                    self._lost[lane] += 1
                    logger.warning("the trace store refused one of %s: %s", lane, type(error).__name__)
        self._settled()
        return None

    def _settled(self) -> None:
        with self._lock:
            self._flying = {lane: [] for lane in self._lanes}

    def _tried(self, items: Sequence[Item], untold: Mapping[str, int]) -> BaseException | None:
        try:
            with boundary("trace store"):
                self._write([item.what for item in items], untold)
        except TierError as error:
            return error.__cause__ or error
        return None

    def _tell_dropped(self, lane: str, items: Sequence[Item] | deque[Item]) -> None:
        for item in items:
            item.settle(DataError(f"dropped: more than {self.capacity} {lane} waited to be written"))


def _passing(error: BaseException) -> bool:
    """Whether the database may take it later."""
    if isinstance(error, OperationalError | InterfaceError):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated
