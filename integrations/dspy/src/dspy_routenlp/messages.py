"""Between DSPy's requests and responses and the core's queries and completions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, TokenLogprob, Usage

from routenlp_plugins import (
    Answer,
    Completion,
    Query,
    alternative_scores,
    beyond_text,
    call_settings,
    chat_query,
    with_calls,
)

__all__ = ["EVIDENCE", "TASK", "completion_of", "context_task", "query_of", "response_of", "without_task"]

TASK = "routenlp_task"
"""Option of a call, or input field of a program, that names its task."""
EVIDENCE = "routenlp_evidence"
"""In a response's provider data: what a tier of the core knows of its answer, and DSPy has no place for."""
_HARMLESS = ("logprobs", "cache", "service_tier", "user_id", "store", "extensions")
"""Options that do not change what is answered."""
_SILENT = ("text", "thinking", "refusal", "citation", "tool_call", "tool_result")
"""Parts of messages that are no other medium."""


def query_of(request: Request, task: str | None, *, demonstrations: bool) -> Query:
    """The query of a request: its text is what the user said last, without what a harness added to it.

    Args:
        task: where neither the request nor the context names one.
        demonstrations: whether earlier turns are part of the prompt.

    Raises:
        DataError: the task is no name.
    """
    given = request.config.extensions or {}
    turns = [{"role": _role(message.role), "content": text_of(message.parts)} for message in request.messages]
    system = [{"role": "system", "content": _system(request)}] if request.system else []
    config = asdict(request.config)
    options = {name: value for name, value in config.items() if name not in _HARMLESS and value != ()}
    options |= {name: value for name, value in given.items() if name != TASK}
    options["tools"] = [asdict(tool) for tool in request.tools]
    requires = beyond_text(options) | _beyond_text(request.messages)
    if demonstrations and len(turns) > 1:
        options["demonstrations"] = sha256(json.dumps(turns[:-1]).encode("utf-8", "replace")).hexdigest()[:16]
    return chat_query(
        (*system, *turns),
        given.get(TASK, context_task(task)),
        requires=requires,
        settings=call_settings(options),
        payload=without_task(request),
    )


def context_task(task: str | None) -> Any:
    """The task of ``dspy.context(routenlp_task=...)``, else this one."""
    told = dspy.settings.get(TASK)
    return task if told is None else told


def without_task(request: Request) -> Request:
    """The request as a tier is sent it."""
    given = request.config.extensions or {}
    if TASK not in given:
        return request
    left = {name: value for name, value in given.items() if name != TASK}
    return replace(request, config=replace(request.config, extensions=left or None))


def text_of(parts: Iterable[Any]) -> str:
    """What parts of a message say; data in JSON."""
    said = []
    for part in parts:
        if part.type == "text":
            said.append(part.text)
        elif part.type == "data":
            said.append(json.dumps(part.value, ensure_ascii=False))
        elif part.type == "tool_result":
            said.append(text_of(part.content))
    return "\n".join(said)


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _system(request: Request) -> str:
    return request.system if isinstance(request.system, str) else text_of(request.system or ())


def _beyond_text(messages: Sequence[Message]) -> set[str]:
    kinds = {part.type for message in messages for part in message.parts}
    tools = {"tools"} if kinds & {"tool_call", "tool_result"} else set()
    return (kinds - {*_SILENT, "data"}) | tools


def completion_of(response: Response, provider: str = "") -> Completion:
    """A tier's response as evidence: log-probabilities and token counts where it has them.

    What cannot be read is missing evidence: it must not keep an answer from the user.

    Args:
        provider: of the model; some count what they read from a cache beside the input, or what was thought beside the
            output.
    """
    tokens = response.logprobs or () if response.logprobs_complete else ()
    logprobs = tuple(min(token.logprob, 0.0) for token in tokens)
    read, said, cached = counts_of(response.usage, provider)
    own = (response.provider_data or {}).get(EVIDENCE) or {}
    mean = sum(logprobs) / len(logprobs) if logprobs else own.get("mean_logprob")
    return Completion(
        text=with_calls(text_of(response.message.parts), [(call.name, call.input) for call in response.tool_calls]),
        confidence=own.get("confidence"),
        mean_logprob=mean,
        token_logprobs=logprobs or None,
        scores={
            **(alternative_scores([_openai(token) for token in tokens]) if logprobs else {}),
            **own.get("scores", {}),
        },
        model=response.model or None,
        input_tokens=read,
        output_tokens=said,
        cached_tokens=cached,
        payload=response,
    )


def counts_of(usage: Usage, provider: str) -> tuple[int | None, int | None, int | None]:
    """Input and output tokens as they are paid for, and how many of the input were in a cache."""
    read, said, cached = usage.input_tokens, usage.output_tokens, usage.cache_read_tokens
    if provider == "anthropic" and read is not None:
        read += (cached or 0) + (usage.cache_write_tokens or 0)
    if provider in ("gemini", "vertex", "vertex_ai", "xai") and said is not None:
        said += usage.reasoning_tokens or 0
    return read, said, cached


def _openai(token: TokenLogprob) -> Mapping[str, Any]:
    top = [{"token": one.token, "logprob": one.logprob} for one in token.top]
    return {"token": token.token, "logprob": token.logprob, "top_logprobs": top}


def response_of(answer: Answer) -> Response:
    """The response of a routed answer: usage of all attempts, the decision in ``provider_data["routenlp"]``."""
    own = answer.payload if isinstance(answer.payload, Response) else None
    told = {"routenlp": answer.trace.as_dict()}
    if own is None:
        chosen = answer.trace.accepted.completion
        model = answer.tier if chosen is None or chosen.model is None else chosen.model
        said = Message.assistant([TextPart(answer.text)])
        own = Response(id=None, model=model, message=said, finish_reason="stop", usage=Usage())
    return replace(own, usage=_usage(answer), provider_data={**(own.provider_data or {}), **told})


def _usage(answer: Answer) -> Usage:
    """Of all attempts; unknown where one of them is."""
    if answer.trace.tokens is None:
        return Usage()
    read, said = answer.trace.tokens
    told = [attempt.completion for attempt in answer.trace.attempts if attempt.completion is not None]
    cached = sum(one.cached_tokens or 0 for one in told)
    return Usage(input_tokens=read, output_tokens=said, total_tokens=read + said, cache_read_tokens=cached or None)
