"""What a router decided last, for whoever listens to the call around it: DSPy's callbacks are not told of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from routenlp_plugins import Answer, TierError, Trace

__all__ = ["tell", "telling", "told"]

_LAST: ContextVar[Trace | None] = ContextVar("routenlp_last_decision", default=None)


def tell(answer: Answer) -> Answer:
    """Of an answer."""
    _LAST.set(answer.trace)
    return answer


@contextmanager
def telling() -> Iterator[None]:
    """Of a query that nobody answers within it."""
    try:
        yield
    except TierError as error:
        _LAST.set(error.trace)
        raise


def told() -> Trace | None:
    """The last decision in this context, once."""
    last = _LAST.get()
    if last is not None:
        _LAST.set(None)
    return last
