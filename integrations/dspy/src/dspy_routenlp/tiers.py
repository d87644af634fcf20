"""Language models of DSPy as tiers of the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from queue import SimpleQueue
from typing import Any

import anyio
import dspy
from anyio.from_thread import start_blocking_portal
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Config, LM15Error, Message, Request, Response, request_from_openai_chat

from routenlp_plugins import (
    Call,
    Completion,
    Delta,
    PortfolioError,
    SelfConsistentTier,
    WrappingTier,
    text_only,
    valid_if_said,
)

from .messages import completion_of

__all__ = ["OUTER", "LMTier", "provider_of"]


def provider_of(lm: dspy.LM) -> str:
    """Of a model, by its name."""
    provider, slash, _ = lm.model.partition("/")
    return provider if slash else ""


@dataclass(frozen=True, slots=True)
class LMTier:
    """A language model that answers the request in the payload.

    It is called silently: the router's own call is what DSPy's history, callbacks and usage tracker hear of. Its own
    options hold where the request has none. What is sampled never comes from its cache, which would give each sample
    the same answer.
    """

    lm: dspy.LM
    sampled: bool = False
    options: Config = field(init=False)

    def __post_init__(self) -> None:
        body = {"model": self.lm.model, "messages": [{"role": "user", "content": ""}]}
        own = {name: value for name, value in self.lm.kwargs.items() if value is not None and name not in OUTER}
        object.__setattr__(self, "options", request_from_openai_chat({**body, **own}).config)

    @classmethod
    def of(cls, name: str, tier: Any) -> Any:
        """An LM as a core tier, also inside a tier that adds scores; any other core tier as it is.

        Raises:
            PortfolioError: it is neither.
        """
        if isinstance(tier, WrappingTier):
            inner = cls.of(name, tier.tier)
            if isinstance(tier, SelfConsistentTier) and isinstance(inner, cls):
                inner = cls(inner.lm, sampled=True)
            return tier.around(inner)
        if isinstance(tier, dspy.LM):
            try:
                return cls(tier)
            except LM15Error as error:
                raise PortfolioError(f"tiers: {name} has an option that no request carries: {error}") from None
        if isinstance(tier, dspy.BaseLM) or not callable(tier):
            raise PortfolioError(
                f"tiers: {name} must be a dspy.LM or a callable Call -> Completion, got {type(tier).__name__}"
            )
        return text_only(tier)

    def __call__(self, call: Call) -> Completion:
        """The model's answer."""
        request, cache = self._asked(call)
        with _silent():
            return self._completion(self.lm(request, cache=cache))

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        request, cache = self._asked(call)
        with _silent():
            return self._completion(await self.lm.acall(request, cache=cache))

    def stream(self, call: Call) -> Iterator[Delta | Completion]:
        """The answer as the model streams it, and at last the whole of it."""
        request, cache = self._asked(call)
        if not _plain(request):
            yield self(call)
            return
        pieces = _Pieces()

        def answer() -> Any:
            with _silent(send_stream=pieces):
                return self.lm(request, cache=cache)

        # DSPy hands pieces on through an event loop: in a thread of its own they can be taken while the call goes on
        with start_blocking_portal() as portal:
            running = portal.start_task_soon(anyio.to_thread.run_sync, answer)
            running.add_done_callback(lambda _: pieces.put(None))
            try:
                while (piece := pieces.get()) is not None:
                    yield piece
                yield self._completion(running.result())
            finally:
                pieces.closed = True

    async def astream(self, call: Call) -> AsyncIterator[Delta | Completion]:
        """As `stream`, without blocking the event loop."""
        request, cache = self._asked(call)
        if not _plain(request):
            yield await self.acall(call)
            return
        pieces = _AsyncPieces()

        async def answer() -> Any:
            with _silent(send_stream=pieces):
                return await self.lm.acall(request, cache=cache)

        running = asyncio.create_task(answer())
        running.add_done_callback(lambda _: pieces.queue.put_nowait(None))
        try:
            while (piece := await pieces.queue.get()) is not None:
                yield piece
            yield self._completion(await running)
        finally:
            running.cancel()

    def _completion(self, response: Response) -> Completion:
        return valid_if_said(completion_of(response, provider_of(self.lm)))

    def _asked(self, call: Call) -> tuple[Request, bool]:
        """The request, with the tier's own options, and whether its cache may answer it."""
        asked = call.payload
        if not isinstance(asked, Request):
            # a question of our own, such as whether an answer is right
            asked = Request(model=self.lm.model, messages=(Message.user(call.query.text),))
        given = {f.name: value for f in fields(Config) if (value := getattr(asked.config, f.name)) not in (None, ())}
        more = {**(self.options.extensions or {}), **(given.pop("extensions", None) or {})}
        config = replace(self.options, **given, extensions=more or None)
        cache = bool(self.lm.cache) and not self.sampled and not config.temperature
        return replace(asked, model=self.lm.model, config=config), cache


OUTER = (*CLIENT_KEYS, "n", "num_generations", "rollout_id", "cache", "prompt_cache")
"""Options of an LM that are no part of a request."""


def _silent(**more: Any) -> AbstractContextManager[None]:
    """Within it no call is heard of by anyone but its caller."""
    quiet: dict[str, Any] = {"usage_tracker": None, "disable_history": True, "callbacks": [], "send_stream": None}
    context: AbstractContextManager[None] = dspy.context(**{**quiet, **more})
    return context


def _plain(request: Request) -> bool:
    """Whether the answer is text only, so that it can be passed on in pieces."""
    return not (request.tools or request.config.reasoning or request.config.response_format)


class _Pieces(SimpleQueue[Delta | None]):
    """Takes what DSPy streams, from any thread; once it is closed the call ends where it is."""

    closed = False

    async def send(self, chunk: Any) -> None:
        if self.closed:
            raise anyio.BrokenResourceError
        if (piece := _delta(chunk)) is not None:
            self.put(piece)


class _AsyncPieces:
    """Takes what DSPy streams, in an event loop."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def send(self, chunk: Any) -> None:
        if (piece := _delta(chunk)) is not None:
            self.queue.put_nowait(piece)


def _delta(chunk: Any) -> Delta | None:
    choices = getattr(chunk, "choices", None)
    text = choices[0].delta.content if choices else None
    if not isinstance(text, str) or not text:
        return None
    model = getattr(chunk, "model", None)
    return Delta(text, model if isinstance(model, str) and model else None)
