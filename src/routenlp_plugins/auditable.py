"""Audits in place: whatever answers by a dispatcher gives the same, watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .auditing import AuditOptions, Auditor, Quality
from .dispatch import Dispatcher
from .errors import PortfolioError

if TYPE_CHECKING:
    from .signals.store import TraceStore

__all__ = ["Auditable"]


class Auditable:
    """What routes in a framework inherits it, and asks `_answering` for its answers.

    A subclass has the dispatcher that answers in `_dispatcher`, and None in `auditor`. What is watched is one: copies
    of it, deep ones too, share its auditor, and it cannot be pickled.
    """

    if TYPE_CHECKING:
        auditor: Auditor | None

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
            watched.auditor = auditor
            yield watched

    @property
    def expired(self) -> dict[str, str]:
        """Task -> why its certificate has expired, of what is audited."""
        return {} if self.auditor is None else self.auditor.expired

    @property
    def _answering(self) -> Dispatcher | Auditor:
        if self.auditor is None:
            return self._dispatcher
        if self.auditor.certified is not self._dispatcher:
            raise PortfolioError("this copy of what is audited has other tiers or another release: audit it by itself")
        return self.auditor

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        if self.auditor is not None:
            return copy(self)
        copied: Self = super().__deepcopy__(memo)  # type: ignore[misc]
        return copied

    def __getstate__(self) -> Any:
        if self.auditor is not None:
            raise PortfolioError("what is audited cannot be pickled: pickle what it was made of, and audit that there")
        return super().__getstate__()
