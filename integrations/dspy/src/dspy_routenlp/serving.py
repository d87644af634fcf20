"""Any tier of the core as a language model of DSPy."""

from __future__ import annotations

import asyncio
from inspect import iscoroutinefunction
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, TokenLogprob, UnsupportedFeatureError, Usage

from routenlp_plugins import Call, Completion, PortfolioError

from .messages import EVIDENCE, query_of

__all__ = ["AsyncTierEngine", "TierEngine", "tier_lm"]


def tier_lm(tier: Any, name: str, **options: Any) -> dspy.LM:
    """A tier, such as a `LlamaCppTier` or a student, as a language model that programs run on.

    Args:
        tier: a callable ``Call -> Completion``.
        name: of the model.
        options: of `dspy.LM`. Temperature and lengths of answers are the tier's own affair.

    Raises:
        PortfolioError: it cannot be called without an event loop.
    """
    engine = TierEngine(tier)
    own = {"cache": False, "num_retries": 0, **options}
    return dspy.LM(f"routenlp/{name}", engine=engine, async_engine=AsyncTierEngine(engine), **own)


class TierEngine:
    """Answers as a tier does: its best, whatever temperature is asked for short of sampling, as long as it likes."""

    def __init__(self, tier: Any) -> None:
        if not callable(tier) or iscoroutinefunction(tier) or iscoroutinefunction(tier.__call__):
            raise PortfolioError(f"expected a sync callable Call -> Completion, got {type(tier).__name__}")
        self._tier = tier

    def tier(self, model: str) -> Any:
        """What answers for a name of a model."""
        return self._tier

    def complete(self, request: Request) -> Response:
        """The tier's answer."""
        if request.config.temperature:
            raise UnsupportedFeatureError(
                f"this tier gives its best answer and draws none: temperature={request.config.temperature:g} asks for "
                "one that is drawn; leave temperature out, or 0"
            )
        if request.tools:
            raise UnsupportedFeatureError("this tier calls no tools")
        query = query_of(request, None, demonstrations=False)
        return _response(self.tier(request.model)(Call("tier", query)), request)

    def close(self) -> None:
        """Nothing: the tier is the caller's."""


class AsyncTierEngine:
    """As `TierEngine`, in a thread."""

    def __init__(self, engine: TierEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """The tier's answer."""
        return await asyncio.to_thread(self.engine.complete, request)

    async def aclose(self) -> None:
        """Nothing: the tier is the caller's."""


def _response(completion: Completion, request: Request) -> Response:
    evidence = {
        "confidence": completion.confidence,
        "mean_logprob": completion.mean_logprob,
        "scores": dict(completion.scores),
    }
    each = completion.token_logprobs or ()
    return Response(
        id=None,
        model=completion.model or request.model,
        message=Message.assistant([TextPart(completion.text)]),
        finish_reason="stop",
        usage=Usage(input_tokens=completion.input_tokens, output_tokens=completion.output_tokens),
        # a tier tells what its tokens weigh, not what they are
        logprobs=tuple(TokenLogprob("", value) for value in each) or None,
        provider_data={EVIDENCE: evidence},
    )
