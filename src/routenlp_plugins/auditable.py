"""Audits in place: whatever answers by a dispatcher gives the same, watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .auditing import AuditOptions, Auditor, Quality
from .dispatch import Dispatcher
from .errors import PortfolioError

if TYPE_CHECKING:
    from .signals.store import TraceStore

__all__ = ["Auditable"]


class Auditable:
    """What routes in a framework inherits it, and asks `_answering` for its answers.

    A subclass has the dispatcher that answers in `_dispatcher`, and None in `_auditor`.
    """

    if TYPE_CHECKING:
        _auditor: Auditor | None

        @property
        def _dispatcher(self) -> Dispatcher: ...

    @contextmanager
    def audited(
        self,
        quality: Quality,
        log: str | Path,
        options: AuditOptions | None = None,
        store: TraceStore | None = None,
    ) -> Iterator[Self]:
        """The same with its certificate watched: a share of what it is asked is put to every tier, after the answer.

        Args:
            quality, log, options, store: see `Auditor`.

        Raises:
            DataError: the release is not certified, the log is of another one, or another auditor writes to it.
        """
        with Auditor(self._dispatcher, quality, log, options, store) as auditor:
            watched = copy(self)
            watched._auditor = auditor
            yield watched

    @property
    def expired(self) -> dict[str, str]:
        """Task -> why its certificate has expired, of what is audited."""
        return {} if self._auditor is None else self._auditor.expired

    @property
    def _answering(self) -> Dispatcher | Auditor:
        if self._auditor is None:
            return self._dispatcher
        if self._auditor.certified is not self._dispatcher:
            raise PortfolioError("this copy of what is audited has other tiers or another release: audit it by itself")
        return self._auditor
