"""Between streams of the core and the chunks of LangChain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_chunk_to_message
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.outputs.chat_generation import merge_chat_generation_chunks

from routenlp_plugins import Answer, Delta

from .messages import answer_message

__all__ = ["Chunks", "delta_of", "whole"]

_OF_EVERY_CHUNK = ("model_provider", "output_version")
"""Metadata that say how a chunk's content is to be read."""


def delta_of(chunk: ChatGenerationChunk) -> Delta | None:
    """What a chunk of a tier adds; None where it has metadata only."""
    message = chunk.message
    if not (message.content or message.additional_kwargs or getattr(message, "tool_call_chunks", None)):
        return None
    told = {**(chunk.generation_info or {}), **message.response_metadata}
    model = next((m for name in ("model_name", "model", "model_id") if (m := told.get(name))), None)
    return Delta(str(message.text), model if isinstance(model, str) else None, payload=message)


def whole(chunks: Sequence[ChatGenerationChunk]) -> AIMessage:
    """The message that they make up, with all that they tell of it."""
    merged = merge_chat_generation_chunks([*chunks])
    assert merged is not None, "there is no chunk"
    message = message_chunk_to_message(merged.message)
    told = {**(merged.generation_info or {}), **message.response_metadata}
    made = message.model_copy(update={"response_metadata": told})
    if not isinstance(made, AIMessage):
        raise TypeError(f"expected chunks of an AIMessage, got those of a {type(made).__name__}")
    return made


class Chunks:
    """The chunks of one answer: of the pieces only what they say, all other facts on a last one.

    LangChain adds chunks up: what stood on two of them would be there twice.
    """

    def __init__(self) -> None:
        self._nothing: str | list[Any] = ""

    def of(self, delta: Delta) -> ChatGenerationChunk:
        """A piece of the answer, or the whole of it."""
        said = delta.payload if isinstance(delta.payload, BaseMessage) else AIMessage(delta.text)
        self._nothing = "" if isinstance(said.content, str) else []
        return ChatGenerationChunk(
            message=AIMessageChunk(
                content=said.content,
                additional_kwargs=said.additional_kwargs,
                tool_call_chunks=_tool_call_chunks(said),
                response_metadata=_how_to_read(said),
            )
        )

    def last(self, answer: Answer) -> ChatGenerationChunk:
        """The facts of the whole answer."""
        message = answer_message(answer)
        return ChatGenerationChunk(
            message=AIMessageChunk(
                content=self._nothing,
                response_metadata=message.response_metadata,
                usage_metadata=message.usage_metadata,
                chunk_position="last",
            )
        )


def _how_to_read(message: BaseMessage) -> dict[str, Any]:
    return {name: value for name in _OF_EVERY_CHUNK if (value := message.response_metadata.get(name)) is not None}


def _tool_call_chunks(message: BaseMessage) -> list[Any]:
    if isinstance(message, AIMessageChunk):
        return message.tool_call_chunks
    if not isinstance(message, AIMessage):
        return []
    calls: list[tuple[str | None, str | None, str | None]] = [
        (call["name"], json.dumps(call["args"]), call["id"]) for call in message.tool_calls
    ]
    calls += [(call["name"], call["args"], call["id"]) for call in message.invalid_tool_calls]
    return [
        tool_call_chunk(name=name, args=args, id=known, index=place) for place, (name, args, known) in enumerate(calls)
    ]
