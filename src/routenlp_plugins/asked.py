"""Options of a call, as chat APIs name them: what of them asks for more than text, and what of them changes answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["REQUIREMENTS", "beyond_text", "call_settings"]

BEYOND_TEXT = {
    **dict.fromkeys(("tools", "functions", "web_search_options", "mcp_servers"), "tools"),
    **dict.fromkeys(
        (
            "response_format",
            "response_schema",
            "response_json_schema",
            "response_mime_type",
            "format",
            "output_format",
            "output_config",
            "text",
            "guided_json",
        ),
        "structured output",
    ),
    "modalities": "other media",
    "model": "another model",
    "model_name": "another model",
}
REQUIREMENTS = ("tools", "structured output", "image", "audio", "video", "file", "document", "other media")
"""What calls ask for beyond text; messages of a framework may have parts of other kinds too."""
_ANOTHER_MODEL = ("model", "model_name")
HARMLESS = {
    *("user", "metadata", "timeout", "request_timeout", "max_retries", "store", "service_tier", "extra_headers"),
    *("stream", "streaming", "stream_usage", "stream_options", "prompt_cache_key", "safety_identifier"),
}
"""Options that do not change what is answered; all others must be as they were when outcomes were collected."""


def beyond_text(options: Mapping[str, Any]) -> frozenset[str]:
    """What they ask for that no certificate covers."""
    return frozenset(BEYOND_TEXT[name] for name, value in options.items() if name in BEYOND_TEXT and value)


def call_settings(options: Mapping[str, Any]) -> str:
    """The options that change answers, in a fixed notation; none of them is empty."""
    telling = {name: value for name, value in options.items() if value not in (None, [], {})}
    changing = {
        name: _choice(value) if name == "tool_choice" else _plain(value)
        for name, value in telling.items()
        if name not in HARMLESS and name not in _ANOTHER_MODEL and not name.startswith("ls_")
    }
    return json.dumps(changing, sort_keys=True) if changing else ""


def _choice(value: Any) -> Any:
    """Of tools: providers have several words for one choice."""
    if isinstance(value, Mapping):
        function = value.get("function")
        return function.get("name") if isinstance(function, Mapping) else _plain(value)
    return "required" if value is True or value == "any" else _plain(value)


def _plain(value: Any) -> Any:
    """The same for the same value in every process, and for 1 and 1.0."""
    if isinstance(value, Mapping):
        return {str(name): _plain(of) for name, of in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
