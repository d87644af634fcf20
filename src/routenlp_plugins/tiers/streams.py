"""Answers that come piece by piece: what a tier streams, and which pieces are passed on before the answer is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing, closing, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

from ..errors import PortfolioError, TierError
from ..flow import Flow
from ..portfolio import Tier
from ..types import Answer, Attempt, Call, Completion, Delta, Final
from .boundary import TierCallable, boundary, complete, prompt_fingerprint

__all__ = [
    "AsyncStreamCallable",
    "FlowRun",
    "StreamCallable",
    "astream_form",
    "astream_tier",
    "in_threads",
    "stream_form",
    "stream_tier",
]

StreamCallable = Callable[[Call], Iterator[Delta | Completion]]
AsyncStreamCallable = Callable[[Call], AsyncIterator[Delta | Completion]]
"""What streams for a tier: the pieces of its answer, and at last the whole `Completion`. A tier has them as methods
``stream`` and ``astream``."""


def stream_form(tier: TierCallable) -> StreamCallable | None:
    """The form that streams without an event loop, if there is one."""
    return getattr(tier, "stream", None)


def astream_form(tier: TierCallable) -> AsyncStreamCallable | None:
    """The form that streams without blocking an event loop, if there is one."""
    return getattr(tier, "astream", None)


def stream_tier(tier: Tier, function: StreamCallable, call: Call) -> Generator[Delta | Completion, None, None]:
    """The pieces of an answer, and at last the answer, measured and priced.

    Raises:
        TierError: whatever went wrong; the stream was empty, or ended before the answer was whole.
    """
    checked = _Checked(tier, call)
    with boundary(tier.name):
        source: Any = function(call)
    with closing(source) if hasattr(source, "close") else nullcontext():
        while not checked.whole:
            with boundary(tier.name):
                item = next(source, None)
            yield checked.item(item)


async def astream_tier(tier: Tier, function: AsyncStreamCallable, call: Call) -> AsyncGenerator[Delta | Completion]:
    """As `stream_tier`, without blocking the event loop."""
    checked = _Checked(tier, call)
    with boundary(tier.name):
        source: Any = function(call)
    async with aclosing(source) if hasattr(source, "aclose") else nullcontext():
        while not checked.whole:
            with boundary(tier.name):
                item = await anext(source, None)
            yield checked.item(item)


def in_threads(function: StreamCallable) -> AsyncStreamCallable:
    """A form that does not block an event loop, of one that would."""

    async def stream(call: Call) -> AsyncGenerator[Delta | Completion]:
        source = await asyncio.to_thread(function, call)
        while (item := await asyncio.to_thread(next, source, None)) is not None:
            yield item

    return stream


class _Checked:
    """What comes out of a stream of a tier, one after the other."""

    def __init__(self, tier: Tier, call: Call) -> None:
        self.whole = False
        self._tier, self._call = tier, call
        self._start = perf_counter()
        self._begun = False

    def item(self, item: Any) -> Delta | Completion:
        name = self._tier.name
        if isinstance(item, Delta):
            self._begun = True
            return replace(item, tier=name)
        if item is None:
            raise TierError("the stream ended before the answer was whole" if self._begun else _EMPTY, name)
        if not isinstance(item, Completion):
            raise PortfolioError(
                f"tier {name!r}: streamed a {type(item).__name__}; a tier streams Delta, and at last its Completion"
            )
        if not (self._begun or item.text or item.payload is not None) and item.valid:
            raise TierError(_EMPTY, name)
        self.whole = True
        return complete(self._tier, self._call, item, (perf_counter() - self._start) * 1e3)


_EMPTY = "the stream was empty"


class FlowRun:
    """A flow under way: takes what its calls bring, and says which pieces of an answer may be passed on.

    Attributes:
        call: that is to be made next; None once there is an answer.
    """

    def __init__(self, flow: Flow) -> None:
        self.call: Call | None = None
        self._answer: Answer | None = None
        self._flow = flow
        self._begun = False
        self._advance(lambda: next(flow))

    @property
    def answer(self) -> Answer:
        """What the flow ended with."""
        assert self._answer is not None, "the flow has not ended"
        return self._answer

    @property
    def passes_on(self) -> bool:
        """Whether words of the answer to the call may be passed on before it is whole."""
        return self._final is not None

    def take(self, piece: Delta | Completion) -> list[Delta]:
        """What is to be passed on, now that this piece of the answer to the call came.

        Raises:
            TierError: the whole answer may not be returned, and its beginning was passed on.
        """
        if isinstance(piece, Delta):
            return self._passed_on(piece)
        if self._begun and self._final is not None:
            if not _within(self._final, piece.model, piece.prompt):
                raise TierError(
                    "the certificate is void: model or prompt changed after the answer had begun to be passed on",
                    self._called.tier,
                )
            if self._final.valid and not piece.valid:
                raise TierError("the answer that was passed on turned out not to be valid", self._called.tier)
        self._advance(lambda: self._flow.send(piece))
        return []

    def fail(self, error: TierError) -> None:
        """Go on after a call that failed.

        Raises:
            TierError: nobody is left to answer, or words of this answer were passed on; carries all attempts.
        """
        error.begun = self._begun
        self._advance(lambda: self._flow.throw(error))

    def abandoned(self) -> tuple[Attempt, ...]:
        """The attempts so far, the last of which nobody waited for; empty where the flow had ended."""
        if self.call is None:
            return ()
        error = TierError("the call was given up before its end", self.call.tier)
        error.begun = True
        try:
            self._flow.throw(error)
        except TierError as ended:
            return ended.attempts
        return ()

    def rest(self) -> list[Delta]:
        """The answer in one piece, if none of it was passed on."""
        if self._begun:
            return []
        answer = self.answer
        told = answer.trace.accepted.completion
        return [Delta(answer.text, None if told is None else told.model, answer.tier, answer.payload)]

    def _advance(self, step: Callable[[], Call]) -> None:
        self._final: Final | None = None
        self._held: list[Delta] = []
        try:
            self.call = self._called = step()
        except StopIteration as stop:
            self.call, self._answer = None, stop.value
            return
        final = self.call.final
        if final is not None and (not final.prompts or prompt_fingerprint(self.call.query) in final.prompts):
            self._final = final

    def _passed_on(self, delta: Delta) -> list[Delta]:
        if self._final is not None and not _within(self._final, delta.model, None):
            self._final = None
        if self._final is None:
            return []
        if self._final.models and delta.model is None and not self._begun:
            self._held.append(delta)
            return []
        ready, self._held = [*self._held, delta], []
        self._begun = True
        return ready


def _within(final: Final, model: str | None, prompt: str | None) -> bool:
    """Whether an answer may be passed on unseen, by what is known of it."""
    return not (model and final.models and model not in final.models) and not (
        prompt and final.prompts and prompt not in final.prompts
    )
