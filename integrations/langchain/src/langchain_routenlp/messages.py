"""Between LangChain's messages and the core's queries and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import isnan
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata, add_usage

from routenlp_plugins import (
    Answer,
    Completion,
    Query,
    Session,
    alternative_scores,
    chat_query,
    turn_key,
    valid_if_said,
    with_calls,
)

__all__ = ["answer_message", "answer_of", "completion_of", "message_of", "query_of", "says_more"]

MOST_TOKENS = 10**15
_ROLES = {"human": "user", "ai": "assistant", "developer": "system"}


def query_of(
    messages: Sequence[BaseMessage], task: str | None, requires: frozenset[str], settings: str, payload: Any
) -> Query:
    """The query of a conversation: its text is what the user said last, without what a harness added to it.

    Args:
        requires: what the call asks for beyond text; images and tool calls in the conversation are added.
        settings: options of the call that change answers.

    Raises:
        DataError: there is no message, or the task is no name.
    """
    chat = tuple({"role": _role(message), "content": str(message.text)} for message in messages)
    return chat_query(
        chat,
        task,
        requires=requires | _beyond_text(messages),
        settings=settings,
        session=_session(messages, chat),
        payload=payload,
    )


def _session(messages: Sequence[BaseMessage], chat: Sequence[Mapping[str, str]]) -> Session | None:
    """What the last routed answer of the conversation left behind, if it still carries its decision."""
    for place in reversed(range(len(messages))):
        message = messages[place]
        decision = message.response_metadata.get("routenlp") if isinstance(message, AIMessage) else None
        if isinstance(decision, dict) and isinstance(decision.get("tier"), str):
            attempts = [attempt for attempt in decision.get("attempts") or () if isinstance(attempt, dict)]
            accepted: dict[str, Any] = next((attempt for attempt in attempts if attempt.get("accepted")), {})
            counts = [accepted.get(name) for name in ("input_tokens", "output_tokens")]
            tokens = [count if isinstance(count, int) and count >= 0 else 0 for count in counts]
            return Session(decision["tier"], turn_key(chat[:place]), *tokens)
    return None


def _role(message: BaseMessage) -> str:
    own = message.role if isinstance(message, ChatMessage) else message.type
    return _ROLES.get(own, own)


def _beyond_text(messages: Sequence[BaseMessage]) -> set[str]:
    blocks = {block["type"] for m in messages if not isinstance(m.content, str) for block in m.content_blocks}
    tools = any(
        isinstance(m, ToolMessage | FunctionMessage)
        or (
            isinstance(m, AIMessage)
            and (m.tool_calls or m.invalid_tool_calls or "function_call" in m.additional_kwargs)
        )
        for m in messages
    )
    return (blocks - {"text", "reasoning", "tool_call"}) | ({"tools"} if tools else set())


def completion_of(message: AIMessage) -> Completion:
    """A tier's message as evidence: log-probabilities and token counts where the tier gave them.

    What cannot be read is missing evidence: it must not keep an answer from the user.
    """
    reported = message.response_metadata.get("logprobs")
    logprobs = _logprobs(reported)
    model = next((m for n in ("model_name", "model", "model_id") if (m := message.response_metadata.get(n))), None)
    usage = message.usage_metadata
    if not _counted(usage):
        usage = None
    return Completion(
        text=_text(message),
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        token_logprobs=logprobs or None,
        scores=alternative_scores(_tokens(reported)) if logprobs else {},
        model=model if isinstance(model, str) and model else None,
        input_tokens=usage["input_tokens"] if usage else None,
        output_tokens=usage["output_tokens"] if usage else None,
        cached_tokens=_cached(usage),
        payload=message,
    )


def _counted(usage: Mapping[str, Any] | None) -> bool:
    """Whether usage has both counts: of an answer from a cache LangChain may leave its price only."""
    counts = [(usage or {}).get(side) for side in ("input_tokens", "output_tokens")]
    return all(isinstance(count, int) and 0 <= count <= MOST_TOKENS for count in counts)


def _text(message: AIMessage) -> str:
    return with_calls(str(message.text), [(call["name"], call["args"]) for call in message.tool_calls])


def _cached(usage: UsageMetadata | None) -> int | None:
    """Of the input tokens, those read from the prompt cache."""
    told = usage.get("input_token_details") if usage else None
    count = told.get("cache_read") if isinstance(told, Mapping) else None
    return count if isinstance(count, int) and 0 <= count <= MOST_TOKENS else None


def _logprobs(reported: Any) -> tuple[float, ...]:
    """Of the answer's tokens, in OpenAI's form (``{"content": [...]}``) or as a list; empty if they are not whole."""
    values = [token.get("logprob") for token in _tokens(reported)]
    known = tuple(min(float(v), 0.0) for v in values if isinstance(v, int | float) and not isnan(v))
    return known if len(known) == len(values) else ()


def _tokens(reported: Any) -> list[Mapping[str, Any]]:
    tokens = reported.get("content") if isinstance(reported, Mapping) else reported
    return [token if isinstance(token, Mapping) else {} for token in tokens] if isinstance(tokens, list) else []


def message_of(completion: Completion, tier: str) -> AIMessage:
    """The message of an answer: the tier's own where it is a LangChain model, else one with the same facts."""
    if isinstance(completion.payload, AIMessage):
        return completion.payload
    metadata: dict[str, Any] = {"model_name": tier}
    if completion.token_logprobs is not None:
        metadata["logprobs"] = {"content": [{"logprob": logprob} for logprob in completion.token_logprobs]}
    return AIMessage(completion.text, response_metadata=metadata, usage_metadata=_usage(completion))


def answer_of(message: AIMessage) -> Completion:
    """A message as the answer of a tier: one that says nothing is not valid."""
    completion = completion_of(message)
    return completion if says_more(message) else valid_if_said(completion)


def says_more(message: BaseMessage) -> bool:
    """Whether a message says something that is no text: media, a refusal, a call in an older form."""
    blocks = [] if isinstance(message.content, str) else message.content
    kinds = {block.get("type") for block in blocks if isinstance(block, dict)}
    older = ("refusal", "function_call", "tool_calls")
    return bool(kinds - {"text", "reasoning", "thinking", None}) or any(message.additional_kwargs.get(n) for n in older)


def answer_message(answer: Answer) -> AIMessage:
    """The message of a routed answer: usage of all attempts, the decision in ``response_metadata["routenlp"]``."""
    completions = [attempt.completion for attempt in answer.trace.attempts if attempt.completion is not None]
    chosen = answer.trace.accepted.completion
    message = message_of(completions[-1] if chosen is None else chosen, answer.tier)
    every = [_usage_of(completion) for completion in completions]
    known = [usage for usage in every if usage is not None]
    # a sum that leaves one out would be wrong
    usage = reduce(add_usage, known) if known and len(known) == len(every) else None
    metadata = dict(message.response_metadata)
    metadata.setdefault("model_name", answer.tier)
    metadata["routenlp"] = answer.trace.as_dict()
    return message.model_copy(update={"usage_metadata": usage, "response_metadata": metadata})


def _usage_of(completion: Completion) -> UsageMetadata | None:
    """As the message tells it, with its details, unless more calls than that one were needed."""
    told = completion.payload.usage_metadata if isinstance(completion.payload, AIMessage) else None
    told = told if _counted(told) else None
    total = _usage(completion)
    return total if told is None or (total and total["total_tokens"] != told["total_tokens"]) else told


def _usage(completion: Completion) -> UsageMetadata | None:
    if completion.input_tokens is None or completion.output_tokens is None:
        return None
    total = completion.input_tokens + completion.output_tokens
    return UsageMetadata(
        input_tokens=completion.input_tokens, output_tokens=completion.output_tokens, total_tokens=total
    )
