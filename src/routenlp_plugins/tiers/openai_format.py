"""The OpenAI chat-completion format, as plain data: what is sent and what of an answer is evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import Completion, Query

__all__ = ["request_body", "text_completion"]


def request_body(query: Query, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat-completion request for a query with these fields."""
    return {"messages": [dict(message) for message in query.chat], **fields}


def text_completion(response: Mapping[str, Any]) -> Completion:
    """The first choice of a chat-completion response, with log-probabilities and token counts where given.

    Raises:
        ValueError: there is no answer in it.
    """
    choices = response.get("choices") or []
    text = choices[0].get("message", {}).get("content") if choices else None
    if not text:
        raise ValueError("the answer is empty")
    tokens = (choices[0].get("logprobs") or {}).get("content") or []
    logprobs = tuple(min(float(token["logprob"]), 0.0) for token in tokens if token.get("logprob") is not None)
    usage = response.get("usage") or {}
    return Completion(
        text=text,
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        token_logprobs=logprobs or None,
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
    )
