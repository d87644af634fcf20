"""Which run was called by which: what a framework tells comes one run at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Lock
from time import perf_counter, time
from typing import Any

from ..types import Attempt, Query, Trace

__all__ = ["Failure", "Root", "Run", "Runs", "key"]

MOST = 100_000
"""That are under way at once; of more the oldest are forgotten: their ends never came."""
_UNITS = ("routenlp_unit", "thread_id", "session_id", "conversation_id")

Failure = tuple[str, Query, Attempt]
"""A call of a model that gave no answer."""


@dataclass(slots=True)
class Root:
    """What happened so far under a run that no known one called.

    Attributes:
        failed: question -> its failures, as long as it is unanswered.
        answered: question -> the run that answered it last.
        last: the run that answered anything last.
        errors: that were heard of already; each run that one passes through tells it again.
        open: the runs under way under it.
        worst: (run, kind, source) -> the lowest value that was said so far.
    """

    id: str
    failed: dict[str, list[Failure]] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)
    last: str | None = None
    errors: list[BaseException] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    worst: dict[tuple[str, str, str], float] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """One run under way.

    Attributes:
        query: what is asked, if it is the call of a model.
        decided: by a router, how it was answered.
        last: the run below or beside it that answered last.
    """

    id: str
    parent: str | None
    root: Root
    name: str
    metadata: Mapping[str, Any]
    at: float
    began: float
    parses: bool = False
    query: Query | None = None
    decided: Trace | None = None
    last: str | None = None

    @property
    def unit(self) -> str:
        """What it belongs to: a dialogue where the metadata tell, else what is under the same root."""
        named = next((str(self.metadata[name]) for name in _UNITS if self.metadata.get(name)), self.root.id)
        # longer names are equal where these are
        return named if len(named) <= 256 else sha256(named.encode("utf-8", "replace")).hexdigest()


class Runs:
    """The runs under way, of all threads."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._of: dict[str, Run] = {}

    def __len__(self) -> int:
        return len(self._of)

    def begin(self, run_id: str, parent_id: str | None, name: str, metadata: Mapping[str, Any] | None) -> Run:
        """A new run, under its parent if that is known."""
        with self.lock:
            parent = None if parent_id is None else self._of.get(parent_id)
            root = Root(parent_id or run_id) if parent is None else parent.root
            run = Run(run_id, parent_id, root, name, metadata or {}, time(), perf_counter())
            self._of[run_id] = run
            root.open.add(run_id)
            if len(self._of) > MOST:
                oldest = self._of.pop(next(iter(self._of)))
                oldest.root.open.discard(oldest.id)
            return run

    def get(self, run_id: str | None) -> Run | None:
        """The run, if it is under way."""
        return None if run_id is None else self._of.get(run_id)

    def end(self, run_id: str) -> list[list[Failure]]:
        """Forget a run; what was never answered, if it was the outermost."""
        with self.lock:
            run = self._of.pop(run_id, None)
            if run is None:
                return []
            run.root.open.discard(run_id)
            parent = self.get(run.parent)
            if parent is not None:
                parent.last = run.last or parent.last
                return []
            # of what was cancelled no end is told
            for left in run.root.open:
                self._of.pop(left, None)
            run.root.open.clear()
            unanswered = list(run.root.failed.values())
            run.root.failed.clear()
            return unanswered

    def above(self, run: Run) -> Iterator[str]:
        """The runs around it, innermost first."""
        parent = run.parent
        while parent is not None:
            yield parent
            known = self.get(parent)
            parent = None if known is None else known.parent

    def answered_before(self, run: Run) -> str | None:
        """The answer that a run is about: the last one in it, else in the innermost run around it that has one."""
        around = (known.last for name in self.above(run) if (known := self.get(name)) is not None)
        return run.last or next((last for last in around if last), run.root.last)


def key(query: Query) -> str:
    """The same for the same question."""
    return repr((query.text, query.messages, query.settings, sorted(query.requires)))
