"""What of a conversation a decision is about: the words of the user in the present turn.

Harnesses write more into messages than the user said. The rule: of the messages with the role ``user``, the last one
that has words; of its text, without every element whose tag is in `HARNESS_TAGS`; if what is left has elements whose
tag is in `REQUEST_TAGS`, what those enclose and nothing else. System prompts, tool results and the model's own messages
have other roles. A text without such elements stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from .errors import DataError
from .types import Message, Query

__all__ = ["HARNESS_TAGS", "REQUEST_TAGS", "chat_query", "turn_key", "user_words", "with_calls"]

HARNESS_TAGS = (
    *("system-reminder", "system_reminder", "system", "context", "environment_details", "environment_context"),
    *("user_info", "user_instructions", "git_status", "open_files", "attached_files", "attachments", "attachment"),
    *("additional_data", "current_file", "editor_context", "editorContext", "ide_selection", "ide_opened_file"),
    *("tool_result", "tool_results", "function_results", "command-name", "command-message", "command-args"),
    *("local-command-stdout", "local-command-stderr", "reminderInstructions", "repository_context"),
)
"""Elements that agent harnesses add to the user's messages."""
REQUEST_TAGS = ("user_query", "user-query", "userRequest", "user_request", "user_message")
"""Elements in which harnesses enclose what the user said."""


def user_words(
    messages: Sequence[Mapping[str, Any]],
    harness: Collection[str] = HARNESS_TAGS,
    requests: Collection[str] = REQUEST_TAGS,
) -> str:
    """The words of the user in the present turn; of a conversation without any, its last message.

    Args:
        messages: at least one; content may be text, parts, or None.
        harness, requests: names of tags, in any case.

    Raises:
        DataError: there is no message, or one is of another form.

    >>> turn = {"role": "user", "content": "<context>14 files</context>Where is it?"}
    >>> user_words([turn, {"role": "tool", "content": "found 5"}])
    'Where is it?'
    """
    if not messages or isinstance(messages, str):
        raise DataError("user_words: expected the messages of a conversation, at least one")
    said = [_content(message) for message in messages if _role(message) == "user"]
    for content in reversed(said):
        words = _words(content, harness, requests)
        if words.strip():
            return words
    return said[-1] if said else _content(messages[-1])


def turn_key(
    messages: Sequence[Mapping[str, Any]],
    harness: Collection[str] = HARNESS_TAGS,
    requests: Collection[str] = REQUEST_TAGS,
) -> str:
    """The same for all calls of one turn, whatever tools and harness have added since; another one in the next."""
    said = (_words(_content(message), harness, requests) for message in messages if _role(message) == "user")
    digest = sha256()
    for words in said:
        if words.strip():
            digest.update(sha256(words.strip().encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _role(message: Mapping[str, Any]) -> str:
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f'messages: expected {{"role": ..., "content": ...}}, got {type(message).__name__}')
    return str(message["role"])


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; of content in parts, that of its text parts."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise DataError(f"messages: content must be text or a list of parts, got {type(content).__name__}")
    return "\n".join(str(part.get("text", "")) for part in content if part.get("type") == "text")


def _words(text: str, harness: Collection[str], requests: Collection[str]) -> str:
    if "<" not in text:
        return text
    text = _without(text, _elements(text, harness))
    asked = _elements(text, requests)
    enclosed = "\n".join(text[element.inner].strip() for element in asked)
    return enclosed if enclosed.strip() else _without(text, asked)


def _without(text: str, elements: Sequence[_Element]) -> str:
    if not elements:
        return text
    starts, ends = [0, *(e.outer.stop for e in elements)], [*(e.outer.start for e in elements), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


@dataclass(frozen=True, slots=True)
class _Element:
    """Where an element lies in a text, with its tags and without."""

    outer: slice
    inner: slice


def _elements(text: str, tags: Collection[str]) -> list[_Element]:
    """The outermost elements with these tags, in order.

    One pass, whatever was left open: nothing that is sent may take more than linear time.
    """
    if not tags:
        return []
    names = "|".join(re.escape(tag) for tag in tags)
    found: list[_Element] = []
    opened: list[tuple[str, int, int]] = []
    count: dict[str, int] = {}
    for tag in re.finditer(rf"<(/?)({names})(?=[\s/>])[^<>]*>", text, re.IGNORECASE):
        name = tag[2].lower()
        if not tag[1]:
            if not tag[0].endswith("/>"):
                opened.append((name, tag.start(), tag.end()))
                count[name] = count.get(name, 0) + 1
            continue
        if not count.get(name):
            continue
        while True:
            top, start, content = opened.pop()
            count[top] -= 1
            if top == name:
                break
        while found and found[-1].outer.start > start:
            found.pop()
        found.append(_Element(slice(start, tag.end()), slice(content, tag.start())))
    return found


def chat_query(chat: tuple[Message, ...], task: str | None, **facts: Any) -> Query:
    """The query of a conversation: its text is what the user said last, without what a harness added to it.

    Args:
        facts: further attributes of the query.

    Raises:
        DataError: there is no message, or the task is no name.
    """
    if not chat:
        raise DataError("messages: empty; there is nothing to answer")
    if task is not None and not isinstance(task, str):
        raise DataError(f"routenlp_task must be the name of a task, got {task!r}")
    return Query(user_words(chat), task=task, messages=chat, **facts)


def with_calls(said: str, calls: Sequence[tuple[str, Any]]) -> str:
    """What an answer says, and after it what it calls: answers that call different tools are different answers.

    Args:
        calls: (name, arguments) of each.
    """
    if not calls:
        return said
    named = [{"name": name, "args": arguments} for name, arguments in calls]
    told = json.dumps(named, sort_keys=True, ensure_ascii=False, default=str)
    return f"{said}\n{told}" if said else told
