"""LlamaIndex models as tiers of the core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.tools import BaseTool
from llama_index_instrumentation.dispatcher import active_instrument_tags, instrument_tags

from routenlp_plugins import (
    Call,
    Completion,
    Delta,
    HeldBack,
    PortfolioError,
    TierError,
    WrappingTier,
    text_only,
    valid_if_said,
)

from .messages import completion_of

__all__ = ["TIER", "LLMTier", "ModelCall", "ToolsAsked"]

TIER = "routenlp_tier"
"""Tag of the events and spans of a tier below a router, by which listeners tell them from the router's own."""


@dataclass(frozen=True, slots=True)
class ToolsAsked:
    """Tools of a call, and how they are to be used, in no model's form."""

    tools: Sequence[Any]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What `RouterLLM` was asked: the payload of its queries."""

    messages: list[ChatMessage]
    options: dict[str, Any]
    tools: ToolsAsked | None = None


@dataclass(frozen=True, slots=True)
class LLMTier:
    """An LLM of LlamaIndex that answers the messages in the payload."""

    llm: LLM

    @classmethod
    def of(cls, name: str, tier: Any) -> Any:
        """An LLM as a core tier, also inside a tier that adds scores; any other core tier as it is.

        Raises:
            PortfolioError: it is neither.
        """
        if isinstance(tier, WrappingTier):
            return tier.around(cls.of(name, tier.tier))
        if isinstance(tier, LLM):
            return cls(tier)
        if not callable(tier):
            raise PortfolioError(
                f"tiers: {name} must be an LLM or a callable Call -> Completion, got {type(tier).__name__}"
            )
        return text_only(tier)

    def __call__(self, call: Call) -> Completion:
        """The model's answer."""
        way, arguments = self._way(call, "chat")
        with _tagged(call):
            return self._completion(call, way(**arguments))

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        way, arguments = self._way(call, "achat")
        with _tagged(call):
            return self._completion(call, await way(**arguments))

    def stream(self, call: Call) -> Iterator[Delta | Completion]:
        """The answer as the model streams it, and at last the whole of it."""
        if _must_parse(call):
            yield self(call)
            return
        way, arguments = self._way(call, "stream_chat")
        with _tagged(call):
            responses = iter(way(**arguments))
        held, last = HeldBack(call), None
        while (response := _next(call, responses)) is not None:
            last = response
            yield from held.after(_delta(last), says=_says(last))
        if last is not None:
            yield self._completion(call, last, streamed=True)

    async def astream(self, call: Call) -> AsyncIterator[Delta | Completion]:
        """As `stream`, without blocking the event loop."""
        if _must_parse(call):
            yield await self.acall(call)
            return
        way, arguments = self._way(call, "astream_chat")
        with _tagged(call):
            responses = aiter(await way(**arguments))
        held, last = HeldBack(call), None
        while (response := await _anext(call, responses)) is not None:
            last = response
            for delta in held.after(_delta(last), says=_says(last)):
                yield delta
        if last is not None:
            yield self._completion(call, last, streamed=True)

    def _completion(self, call: Call, response: ChatResponse, *, streamed: bool = False) -> Completion:
        completion = valid_if_said(completion_of(response, streamed=streamed))
        if not _must_parse(call) or self._parses(call.payload.tools, response):
            return completion
        return replace(completion, scores={**completion.scores, "valid": 0.0})

    def _parses(self, tools: ToolsAsked, response: ChatResponse) -> bool:
        """Whether it calls tools that there are, with arguments that they take."""
        assert isinstance(self.llm, FunctionCallingLLM), "it was asked for tools"
        schemas = {one.metadata.get_name(): one.metadata.fn_schema for one in tools.tools if isinstance(one, BaseTool)}
        try:
            calls = self.llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
            for made in calls:
                schema = schemas[made.tool_name]
                if schema is not None:
                    schema.model_validate(made.tool_kwargs)
        except (ValueError, KeyError):
            return False
        return bool(calls)

    def _way(self, call: Call, name: str) -> tuple[Any, dict[str, Any]]:
        """The method that answers, and what it is given."""
        asked = call.payload if isinstance(call.payload, ModelCall) else ModelCall([ChatMessage(call.query.text)], {})
        messages = [*asked.messages]
        if asked.tools is None:
            return getattr(self.llm, name), {"messages": messages, **asked.options}
        if not isinstance(self.llm, FunctionCallingLLM) or not self.llm.metadata.is_function_calling_model:
            raise TierError(f"{type(self.llm).__name__} calls no tools", call.tier)
        arguments = {"tools": asked.tools.tools, "chat_history": messages, **asked.tools.options, **asked.options}
        return getattr(self.llm, f"{name}_with_tools"), arguments


def _tagged(call: Call) -> AbstractContextManager[None]:
    return instrument_tags({**active_instrument_tags.get(), TIER: call.tier})


def _next(call: Call, responses: Iterator[ChatResponse]) -> ChatResponse | None:
    # each step is tagged, since a class may call another method of its own only when its stream is read
    with _tagged(call):
        return next(responses, None)


async def _anext(call: Call, responses: AsyncIterator[ChatResponse]) -> ChatResponse | None:
    with _tagged(call):
        return await anext(responses, None)


def _says(response: ChatResponse) -> bool:
    message = response.message
    calls = message.additional_kwargs.get("tool_calls") or any(isinstance(b, ToolCallBlock) for b in message.blocks)
    return bool(response.delta) or bool(calls)


def _must_parse(call: Call) -> bool:
    """Whether it asks for tools to be called, as structured prediction does: an answer that calls none, or not as they
    take it, is none. Of tools in one provider's form nobody knows what they take."""
    tools = call.payload.tools if isinstance(call.payload, ModelCall) else None
    if tools is None or not call.may_be_passed_over or not tools.options.get("tool_required"):
        return False
    return all(isinstance(one, BaseTool) for one in tools.tools)


def _delta(response: ChatResponse) -> Delta | None:
    """What a piece adds: words, calls or thoughts; None where it has none."""
    if not (_says(response) or response.additional_kwargs.get("thinking_delta")):
        return None
    model = getattr(response.raw, "model", None)
    return Delta(response.delta or "", model if isinstance(model, str) and model else None, payload=response)
