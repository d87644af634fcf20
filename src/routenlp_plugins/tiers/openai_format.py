"""The OpenAI chat-completion format, as plain data: what is sent and what of an answer is evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evidence import certainty, top_two_margin
from ..types import Completion, Delta, Query

__all__ = ["StreamedText", "alternative_scores", "request_body", "text_completion"]

ROUNDING = 1e-3
"""A log-probability may be this much above 0."""


def alternative_scores(tokens: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``margin`` and ``certainty`` where every token came with two alternatives or more (``top_logprobs=2``).

    What has another form is no evidence.
    """
    found = [_logprobs(token.get("top_logprobs")) for token in tokens]
    if not found or any(len(some) < 2 for some in found):
        return {}
    return {"margin": top_two_margin(found), "certainty": certainty(found)}


def _logprobs(alternatives: Any) -> list[float]:
    """Of a token's alternatives; none if any cannot be read."""
    if not isinstance(alternatives, list | tuple):
        return []
    values = [other.get("logprob") if isinstance(other, Mapping) else None for other in alternatives]
    known = [min(float(value), 0.0) for value in values if isinstance(value, int | float) and value <= ROUNDING]
    return known if len(known) == len(values) else []


def request_body(query: Query, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat-completion request for a query with these fields."""
    return {"messages": [dict(message) for message in query.chat], **fields}


class StreamedText:
    """The chunks of a streamed chat completion, put together."""

    def __init__(self) -> None:
        self._response: dict[str, Any] = {"usage": None, "model": None}
        self._words: list[str] = []
        self._tokens: list[Mapping[str, Any]] = []
        self._ended = False

    def after(self, chunk: Mapping[str, Any]) -> Delta | None:
        """What a chunk adds to the text of the first choice, if anything."""
        for name in ("usage", "model"):
            self._response[name] = chunk.get(name) or self._response[name]
        # the chunk with the usage has no choice
        choice: Mapping[str, Any] = next(iter(chunk.get("choices") or ()), {})
        self._ended = self._ended or choice.get("finish_reason") is not None
        self._tokens += (choice.get("logprobs") or {}).get("content") or ()
        word = (choice.get("delta") or {}).get("content")
        if not word:
            return None
        self._words.append(word)
        return Delta(word, self._response["model"])

    def completion(self) -> Completion:
        """The whole answer.

        Raises:
            ValueError: there is none, or the stream broke off.
        """
        if self._words and not self._ended:
            raise ValueError("the stream broke off")
        choice = {"message": {"content": "".join(self._words)}, "logprobs": {"content": self._tokens}}
        return text_completion({**self._response, "choices": [choice]})


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
    model = response.get("model")
    usage = response.get("usage") or {}
    return Completion(
        text=text,
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        token_logprobs=logprobs or None,
        scores=alternative_scores(tokens),
        model=model if isinstance(model, str) and model else None,
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    )
