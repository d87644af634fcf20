"""What a framework tells of the programs it runs, as traces and signals: whoever listens to one is a `Recorder`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

from ..errors import PortfolioError, TierError
from ..portfolio import Portfolio, Tier
from ..tiers.boundary import received
from ..types import Attempt, Call, Completion, Query, Trace
from .runs import Failure, Run, Runs, key
from .shadow import Shadow
from .store import TraceStore

__all__ = ["Recorder"]

logger = logging.getLogger(__name__)

TIER = "routenlp_tier"
"""In the metadata of runs within an attempt of a router's tier."""
NOWHERE = "nowhere"
"""What is said of an answer whose trace nobody knows."""


class Recorder:
    """Keeps every call of a model in a trace store, and what the program around it tells of its quality.

    A listener of a framework tells it of runs as they begin and end, and what kind they are of. Each answered call of
    a model is a trace, with failed attempts at the same question before it; it is found by the id of its run and by
    those of all runs around it. Calls under one outermost run belong together.

    Args:
        store: what keeps it; flushing and closing it is the caller's.
        portfolio: prices the calls; without one their cost is unknown.
        tiers: name of a model, as its provider knows it -> name of the tier. Other models are the tiers of their own
            names, dated versions included, else the portfolio's frontier.
        task: of all calls that name none.
        shadow: puts a share of what was answered to other tiers too, in the background.

    Raises:
        PortfolioError: `tiers` names one that the portfolio does not have.
    """

    def __init__(
        self,
        store: TraceStore,
        portfolio: Portfolio | None = None,
        tiers: Mapping[str, str] | None = None,
        task: str | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self.store = store
        self.shadow = shadow
        self.portfolio = portfolio
        self.tiers = dict(tiers or {})
        if portfolio is not None:
            for name in self.tiers.values():
                portfolio.tier(name)
        self.task = task or (portfolio.tasks[0].name if portfolio and len(portfolio.tasks) == 1 else "default")
        self.runs = Runs()
        self._strange: set[str] = set()
        declared = {one.name for one in portfolio.tasks} if portfolio is not None else set[str]()
        self._tasks = declared or {self.task}

    def begin(self, run_id: object, parent_id: object, name: str, metadata: Mapping[str, Any] | None = None) -> Run:
        """A run begins, within its parent if that is known; ids are told apart as texts."""
        parent = None if parent_id is None else str(parent_id)
        return self.runs.begin(str(run_id), parent, name, metadata)

    def get(self, run_id: object) -> Run | None:
        """The run, if it is under way."""
        return self.runs.get(str(run_id))

    def task_of(self, run: Run) -> str:
        """The task of a run, by its metadata.

        Raises:
            PortfolioError: what they say is no name.
        """
        task = run.metadata.get("routenlp_task", self.task)
        if not isinstance(task, str) or not task:
            raise PortfolioError(f"routenlp_task must be the name of a task, got {task!r}")
        if self.portfolio is not None and task not in self._tasks:
            self._tasks.add(task)
            logger.warning(
                "task %r is none of the portfolio's (%s), and nothing of it is shadowed: name the task of each call",
                task,
                ", ".join(one.name for one in self.portfolio.tasks),
            )
        return task

    def asked(self, run: Run, query: Query) -> None:
        """A model is asked."""
        run.query = query
        before = run.root.answered.get(key(query))
        if before is not None:
            # what is asked again was not answered well
            self.store.signal(before, "retry", 0.0, "asked again")

    def heard(self, run: Run, answer: Completion | None, model: str | None = None, *, shadowed: bool = True) -> None:
        """The model answered, or ended without a word; behind a router the whole decision is kept.

        Args:
            model: what the framework calls it, where the answer does not say.
            shadowed: whether other tiers may be asked the same.
        """
        if run.query is None:
            return
        if run.decided is not None:
            self._record(run, run.query, run.decided.attempts)
        elif answer is not None:
            attempt = self._attempt(run, run.query, answer, model, accepted=True)
            self._record(run, run.query, (attempt,), shadowed=shadowed)
        else:
            self._failed(run, run.query, Attempt(self._tier(run, model).name, False, error="no answer"))

    def known(self, run: Run, trace_id: str | None) -> None:
        """The answer was kept when it was made, under this id if that is known: nothing is kept now, and what is said
        of it is said of that."""
        run.query, run.last = None, trace_id or NOWHERE

    def failed(self, run: Run, error: BaseException, model: str | None = None) -> None:
        """The model failed; that belongs to the next attempt at the same question."""
        if run.query is None:
            return
        failure = error if isinstance(error, Exception) else TierError(type(error).__name__, "")
        self._failed(run, run.query, self._attempt(run, run.query, failure, model, accepted=False))

    def decided(self, run: Run, trace: Trace) -> None:
        """A router's decision that was no call of a model, such as one over whole programs."""
        self.asked(run, trace.query)
        run.decided = trace
        self._record(run, trace.query, trace.attempts)

    def says(self, run: Run, kind: str, value: float, source: str) -> None:
        """Something around an answer tells of it; nothing is kept where there was none."""
        if TIER in run.metadata:
            # of an attempt, which may have been passed over
            return
        about = self.runs.answered_before(run)
        if about in (None, NOWHERE):
            return
        # an answer may call one tool twice: that one call failed speaks against it whatever the other did
        told = (about, kind, source[:256])
        worst = run.root.worst[told] = min(value, run.root.worst.get(told, 1.0))
        self.store.signal(*told[:2], worst, told[2])

    @contextmanager
    def ending(self, run_id: object) -> Iterator[Run | None]:
        """The run, if it is under way; it is forgotten whatever becomes of what is kept of it."""
        run = self.get(run_id)
        try:
            yield run
        finally:
            if run is not None:
                self._end(run)

    def _end(self, run: Run) -> None:
        for failures in self.runs.end(run.id):
            last, query, _ = failures[-1]
            attempts = tuple(attempt for *_, attempt in failures)
            trace = Trace(query, query.task, attempts, "every call of the model failed")
            self._write(last, run, trace, failures[:-1])

    def _attempt(
        self, run: Run, query: Query, answer: Completion | Exception, model: str | None, *, accepted: bool
    ) -> Attempt:
        named = answer.model if isinstance(answer, Completion) and answer.model is not None else model
        tier = self._tier(run, named)
        try:
            if isinstance(answer, Completion):
                answer = replace(answer, latency_ms=(perf_counter() - run.began) * 1e3)
            completion = received(tier, Call(tier.name, query), answer)
        except TierError as error:
            return Attempt(tier.name, False, error=str(error))
        return Attempt(tier.name, accepted, completion=completion)

    def _tier(self, run: Run, model: str | None) -> Tier:
        known = [
            name for name in (model, run.metadata.get("ls_model_name"), run.name) if isinstance(name, str) and name
        ]
        name = next((self.tiers[one] for one in known if one in self.tiers), None)
        if self.portfolio is None:
            return Tier(name or next(iter(known), "model"))
        if name is not None:
            return self.portfolio.tier(name)
        found = self.portfolio.tier_of_model(*known)
        if found is None and known and known[0] not in self._strange:
            self._strange.add(known[0])
            logger.warning("%s is taken for %s; name its tier in tiers=", known[0], self.portfolio.frontier)
        return found or self.portfolio.tier(self.portfolio.frontier)

    def _failed(self, run: Run, query: Query, attempt: Attempt) -> None:
        with self.runs.lock:
            run.root.failed.setdefault(key(query), []).append((run.id, replace(query, payload=None), attempt))

    def _record(self, run: Run, query: Query, attempts: Sequence[Attempt], *, shadowed: bool = False) -> None:
        # a run may hold several decisions: each is known by its own name
        name = run.id if run.decided is None else run.decided.id
        with self.runs.lock:
            failures = run.root.failed.pop(key(query), [])
            if any(attempt.accepted for attempt in attempts):
                run.root.answered[key(query)] = run.root.last = run.last = name
        whole = (*(attempt for *_, attempt in failures), *attempts)
        if run.decided is not None:
            decided = replace(run.decided, query=replace(run.decided.query, payload=None), attempts=whole)
            # under its own name: whoever else keeps the decision does so too
            self._write(decided.id, run, decided, failures, "served")
            return
        self._write(run.id, run, Trace(replace(query, payload=None), query.task, whole, "collected"), failures)
        if self.shadow is not None:
            asked = {attempt.tier for attempt in whole if attempt.error is None}
            self.shadow.offer(run.id, query, asked, able=shadowed and self._shadows(query))

    def _shadows(self, query: Query) -> bool:
        """What needs more than its task has, or is of no task, is not what a release is fitted for, and of a response
        format nobody knows how another model would be asked for it."""
        tasks = () if self.portfolio is None else self.portfolio.tasks
        declared = next((task for task in tasks if task.name == query.task), None)
        if declared is None:
            return not tasks and not query.requires
        return query.requires <= {"tools"}.intersection(declared.requires)

    def _write(self, name: str, run: Run, trace: Trace, failures: Sequence[Failure], origin: str = "collected") -> None:
        known: dict[str, int | None] = {one: place for place, (one, *_) in enumerate(failures)}
        known |= {one: None for one in (run.id, *self.runs.above(run)) if one != name}
        self.store.record(trace, name, runs=known, unit=run.unit, origin=origin, at=run.at)
