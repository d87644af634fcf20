"""LangChain models as tiers of the core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import Runnable, RunnableBinding

from routenlp_plugins import (
    Call,
    Completion,
    Delta,
    Dispatcher,
    HeldBack,
    PortfolioError,
    SelfConsistentTier,
    TierError,
    WrappingTier,
    own_errors,
    text_only,
)

from .chunks import delta_of, whole
from .messages import answer_of, says_more
from .place import Place
from .structured import Structured

__all__ = ["LangChainTier", "ModelCall", "aerrors_of_tiers", "errors_of_tiers"]


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What `RouterChatModel` was asked: the payload of its queries.

    Attributes:
        tool_options: what tools among the options were bound to the router with, so that each tier binds them in its
            own form; None where they are in the frontier's form already.
        structured: how each tier asks for structured output, and reads it.
    """

    messages: list[BaseMessage]
    stop: list[str] | None
    options: dict[str, Any]
    tool_options: dict[str, Any] | None = None
    structured: Structured | None = None


@dataclass(frozen=True, slots=True)
class LangChainTier:
    """A chat model, or a binding of one, that answers without opening a run of its own.

    A nested run would count its tokens once more in every handler and leak rejected tokens into message streams.
    """

    model: BaseChatModel
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, tier: Any) -> Any:
        """A LangChain model as a core tier, also inside a tier that adds scores; any other core tier as it is.

        Raises:
            PortfolioError: it is neither.
        """
        if isinstance(tier, WrappingTier):
            inner = cls.of(name, tier.tier)
            if isinstance(tier, SelfConsistentTier) and isinstance(inner, cls):
                # a cache would answer every sample with the first
                inner = replace(inner, model=inner.model.model_copy(update={"cache": False}))
            return tier.around(inner)
        options: dict[str, Any] = {}
        model = tier
        while isinstance(model, RunnableBinding):
            if model.config.get("callbacks") or model.config_factories:
                raise PortfolioError(
                    f"tiers: {name} is bound to callbacks or listeners, but a tier opens no run they could hear of: "
                    "give them to the router"
                )
            options = {**model.kwargs, **options}
            model = model.bound
        if isinstance(model, BaseChatModel):
            if model.callbacks:
                raise PortfolioError(
                    f"tiers: {name} has callbacks, but a tier opens no run they could hear of: give them to the router"
                )
            return cls(model, options)
        if isinstance(model, Runnable) or not callable(tier):
            raise PortfolioError(
                f"tiers: {name} must be a chat model, a binding of one, or a callable Call -> Completion; "
                f"got {type(model).__name__}"
            )
        return text_only(tier)

    def __call__(self, call: Call) -> Completion:
        """The model's answer to the messages in the payload."""
        # the inner half of invoke: cache, rate limiter and metadata of the tier, but no run
        asked = _asked(call)
        result = self.model._generate_with_cache(asked.messages, run_manager=None, **self._arguments(call, asked))
        return self._completion(result.generations[0].message, call)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        asked = _asked(call)
        arguments = self._arguments(call, asked)
        result = await self.model._agenerate_with_cache(asked.messages, run_manager=None, **arguments)
        return self._completion(result.generations[0].message, call)

    def stream(self, call: Call) -> Iterator[Delta | Completion]:
        """The answer as the model streams it, and at last the whole of it; only the latter if it does not stream."""
        asked, chunks = _asked(call), list[ChatGenerationChunk]()
        # what is to be parsed is of no use before it is whole
        arguments = self._arguments(call, asked)
        if asked.structured or not self.model._should_stream(async_api=False, **{**arguments, "stream": True}):
            yield self(call)
            return
        if self.model.rate_limiter:
            self.model.rate_limiter.acquire(blocking=True)
        held = HeldBack(call)
        for chunk in self.model._stream(asked.messages, **arguments):
            chunks.append(chunk)
            yield from held.after(delta_of(chunk), says=_said(chunk))
        if chunks:
            yield self._completion(whole(chunks), call)

    async def astream(self, call: Call) -> AsyncIterator[Delta | Completion]:
        """As `stream`, without blocking the event loop."""
        asked, chunks = _asked(call), list[ChatGenerationChunk]()
        arguments = self._arguments(call, asked)
        if asked.structured or not self.model._should_stream(async_api=True, **{**arguments, "stream": True}):
            yield await self.acall(call)
            return
        if self.model.rate_limiter:
            await self.model.rate_limiter.aacquire(blocking=True)
        held = HeldBack(call)
        async for chunk in self.model._astream(asked.messages, **arguments):
            chunks.append(chunk)
            for delta in held.after(delta_of(chunk), says=_said(chunk)):
                yield delta
        if chunks:
            yield self._completion(whole(chunks), call)

    def _completion(self, message: BaseMessage, call: Call) -> Completion:
        if not isinstance(message, AIMessage):
            raise TypeError(f"expected an AIMessage, got {type(message).__name__}")
        completion = answer_of(message)
        structured = _asked(call).structured
        if structured is not None:
            valid = structured.form(call.tier).valid(message)
            completion = replace(completion, scores={**completion.scores, "valid": float(valid)})
        if completion.model is not None:
            return completion
        # what the answer does not say the model may: another one there is another tier
        return replace(completion, model=self.model._get_ls_params().get("ls_model_name"))

    def _arguments(self, call: Call, asked: ModelCall) -> dict[str, Any]:
        """What is bound to the tier, then what the call asks for."""
        stop = {} if asked.stop is None else {"stop": asked.stop}
        form = {} if asked.structured is None else asked.structured.form(call.tier).options
        arguments = {"stop": None, **self.options, **form, **asked.options, **stop}
        if asked.tool_options is None:
            return arguments
        choice = {"tool_choice": arguments.pop("tool_choice")} if "tool_choice" in arguments else {}
        bound = self.model.bind_tools(arguments.pop("tools"), **choice, **asked.tool_options)
        return {**getattr(bound, "kwargs", {}), **arguments}


def _said(chunk: ChatGenerationChunk) -> bool:
    message = chunk.message
    return bool(message.text or getattr(message, "tool_call_chunks", None) or says_more(message))


@contextmanager
def errors_of_tiers(place: Place, dispatcher: Dispatcher | None = None) -> Iterator[None]:
    """A failing chat model raises what it raised without us, so that retries and fallbacks still know it; the handlers
    of the place are told what was tried.

    Args:
        dispatcher: of whose tiers only the chat models do so; None: all do.
    """
    with own_errors(_known(dispatcher)):
        try:
            yield
        except TierError as error:
            if error.trace is not None:
                place.announce(error.trace)
            raise


@asynccontextmanager
async def aerrors_of_tiers(place: Place, dispatcher: Dispatcher | None = None) -> AsyncIterator[None]:
    """As `errors_of_tiers`, awaiting handlers that are async."""
    with own_errors(_known(dispatcher)):
        try:
            yield
        except TierError as error:
            if error.trace is not None:
                await place.aannounce(error.trace)
            raise


def _known(dispatcher: Dispatcher | None) -> Callable[[str, BaseException], bool]:
    def known(tier: str, _: BaseException) -> bool:
        return dispatcher is None or isinstance(WrappingTier.innermost(dispatcher.tiers[tier]), LangChainTier)

    return known


def _asked(call: Call) -> ModelCall:
    """The payload; a question of our own, such as whether an answer is right, has none."""
    if isinstance(call.payload, ModelCall):
        return call.payload
    return ModelCall([HumanMessage(call.query.text)], None, {})
