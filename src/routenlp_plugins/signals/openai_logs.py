"""Chat completions in the form of OpenAI's API: requests with their responses, batches, and chats for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ..conversation import user_words
from ..errors import DataError
from ..tiers.openai_format import text_completion
from ..types import Completion, Query
from .records import Found, ImportOptions, Line, identity, imported, text_of, when
from .rows import Recorded

__all__ = ["openai_logs"]


def openai_logs(lines: Iterator[Line], options: ImportOptions, bad: Callable[[DataError], None]) -> Iterator[Found]:
    """A trace for each completion; requests and responses of a batch are joined by their ``custom_id``."""
    halves: dict[str, Line] = {}
    for line in lines:
        try:
            whole = _joined(line, halves)
            if whole is not None:
                yield Found(_chat(whole, options))
        except DataError as error:
            bad(error)
    for name, half in halves.items():
        missing = "response" if "body" in half.facts else "request"
        bad(DataError(f"{half.source}: custom_id {name!r} has no {missing}"))


def _joined(line: Line, halves: dict[str, Line]) -> Line | None:
    """The record, of a batch once its request and its response were both seen."""
    facts, name = line.facts, line.facts.get("custom_id")
    if not isinstance(name, str) or "request" in facts or ("body" in facts) == ("response" in facts):
        return line
    other = halves.pop(name, None)
    if other is None:
        halves[name] = line
        return None
    return replace(line, facts={**other.facts, **facts})


def _chat(line: Line, options: ImportOptions) -> Recorded:
    facts = line.facts
    request = facts.get("request") or facts.get("body") or facts
    response = facts.get("response")
    if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping):
        response = response["body"]
    messages = request.get("messages") if isinstance(request, Mapping) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
        raise DataError(f"{line.source}: messages: expected the messages of a chat, got {messages!r:.60}")
    answer: Completion | str
    if response is None and messages[-1].get("role") == "assistant" and len(messages) > 1:
        answer = Completion(text_of(messages[-1].get("content")))
        messages = messages[:-1]
    elif not isinstance(response, Mapping):
        raise DataError(f"{line.source}: response: missing, and the messages do not end with an answer")
    else:
        try:
            answer = text_completion(response)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            told = response.get("error")
            answer = f"no answer: {told.get('message') if isinstance(told, Mapping) else told or error}"
    asked = request.get("model") if isinstance(request, Mapping) else None
    chat = tuple({"role": str(one.get("role", "user")), "content": text_of(one.get("content"))} for one in messages)
    given = response if isinstance(response, Mapping) else {}
    name = facts.get("custom_id") or facts.get("id") or given.get("id")
    task = facts.get("task") or options.task
    beyond = frozenset({"tools"} if request.get("tools") else ()) | (
        {"structured output"} if request.get("response_format") else frozenset()
    )
    query = Query(user_words(chat), str(task), None, chat, beyond)
    at = when(facts.get("timestamp", facts.get("created_at", given.get("created"))), line.source)
    # a custom_id is unique within its batch only
    own = given.get("id") if facts.get("custom_id") else None
    runs = {str(name): None} if isinstance(own, str) and 0 < len(str(name)) <= 256 else {}
    return imported(
        line,
        options,
        query,
        answer,
        asked if isinstance(asked, str) else None,
        id=identity(own or name, line),
        at=at,
        runs=runs,
    )
