"""Between LlamaIndex's messages and the core's queries and completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage, ChatResponse, MessageRole

from routenlp_plugins import Answer, Completion, Query, alternative_scores, chat_query, with_calls

__all__ = ["completion_of", "query_of", "response_of", "without_decision"]

_DECISION = "routenlp"

_ROLES = {"tool": "tool", "function": "tool", "developer": "system", "model": "assistant", "chatbot": "assistant"}


def query_of(
    messages: Sequence[ChatMessage], task: str | None, requires: frozenset[str], settings: str, payload: Any
) -> Query:
    """The query of a conversation: its text is what the user said last, without what a harness added to it.

    Args:
        requires: what the call asks for beyond text; images and tool calls in the conversation are added.
        settings: options of the call that change answers.

    Raises:
        DataError: there is no message, or the task is no name.
    """
    chat = tuple({"role": _role(message), "content": message.content or ""} for message in messages)
    return chat_query(
        chat,
        task,
        requires=requires | _beyond_text(messages),
        settings=settings,
        payload=payload,
    )


def _role(message: ChatMessage) -> str:
    return _ROLES.get(message.role.value, message.role.value)


def _beyond_text(messages: Sequence[ChatMessage]) -> set[str]:
    blocks = {
        block.block_type
        for m in messages
        for block in m.blocks
        if not isinstance(block, TextBlock | ThinkingBlock | ToolCallBlock)
    }
    tools = any(
        m.role in (MessageRole.TOOL, MessageRole.FUNCTION)
        or m.additional_kwargs.get("tool_calls")
        or any(isinstance(block, ToolCallBlock) for block in m.blocks)
        for m in messages
    )
    return blocks | ({"tools"} if tools else set())


def completion_of(response: ChatResponse, *, streamed: bool = False) -> Completion:
    """A tier's response as evidence: log-probabilities and token counts where its raw form has them.

    What cannot be read is missing evidence: it must not keep an answer from the user.

    Args:
        streamed: whether it is the last of a stream, whose raw form has the log-probabilities of its last piece only.
    """
    raw = _plain(response.raw)
    choice: Mapping[str, Any] = next(iter(raw.get("choices") or ()), {})
    tokens = (choice.get("logprobs") or {}).get("content") or []
    logprobs = tuple(min(float(t["logprob"]), 0.0) for t in tokens if isinstance(t.get("logprob"), int | float))
    whole = logprobs and len(logprobs) == len(tokens) and not streamed
    usage, counts = raw.get("usage") or {}, response.additional_kwargs
    model = raw.get("model")
    return Completion(
        text=_text(response.message),
        mean_logprob=sum(logprobs) / len(logprobs) if whole else None,
        token_logprobs=logprobs if whole else None,
        scores=alternative_scores(tokens) if whole else {},
        model=model if isinstance(model, str) and model else None,
        input_tokens=_count(usage.get("prompt_tokens", counts.get("prompt_tokens"))),
        output_tokens=_count(usage.get("completion_tokens", counts.get("completion_tokens"))),
        cached_tokens=_count((usage.get("prompt_tokens_details") or {}).get("cached_tokens")),
        payload=response,
    )


def response_of(answer: Answer) -> ChatResponse:
    """The response of a routed answer: token counts of all attempts, the decision in ``additional_kwargs``."""
    response = answer.payload
    if not isinstance(response, ChatResponse):
        response = ChatResponse(message=ChatMessage(answer.text, role=MessageRole.ASSISTANT))
    counts: dict[str, int] = {}
    if answer.trace.tokens is not None:
        read, said = answer.trace.tokens
        counts = {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
    told = answer.trace.as_dict()
    if _DECISION in response.additional_kwargs:
        # of a router in a router
        told["within"] = response.additional_kwargs[_DECISION]
    more = {**response.additional_kwargs, **counts, _DECISION: told}
    return response.model_copy(update={"additional_kwargs": more})


def without_decision(response: ChatResponse) -> dict[str, Any]:
    """What its tier had said beside the message."""
    told = dict(response.additional_kwargs)
    within = (told.pop(_DECISION, None) or {}).get("within")
    return told if within is None else {**told, _DECISION: within}


def _text(message: ChatMessage) -> str:
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    calls = [(one.tool_name, _arguments(one.tool_kwargs)) for one in blocks]
    return with_calls(message.content or "", calls or _older_calls(message))


def _older_calls(message: ChatMessage) -> list[tuple[str, Any]]:
    """Of models that put calls beside the message: selections of tools, or OpenAI's objects."""
    found = []
    for call in message.additional_kwargs.get("tool_calls") or ():
        function = getattr(call, "function", None) or call
        name = getattr(function, "name", None) or getattr(function, "tool_name", None)
        found.append(
            (str(name or call), _arguments(getattr(function, "arguments", getattr(function, "tool_kwargs", ""))))
        )
    return found


def _arguments(told: Any) -> Any:
    if not isinstance(told, str):
        return told
    try:
        return json.loads(told)
    except ValueError:
        return told


def _plain(raw: Any) -> Mapping[str, Any]:
    if hasattr(raw, "model_dump"):
        raw = raw.model_dump(warnings=False)
    return raw if isinstance(raw, Mapping) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
