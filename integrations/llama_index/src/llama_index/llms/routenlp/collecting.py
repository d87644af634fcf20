"""Whole engines as tiers of the core: what `routenlp_plugins.collect` runs to learn what each LLM makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from routenlp_plugins import Call, Completion, Portfolio, PortfolioError, Release, Tier, TierError, Trace

from .llm import RouterLLM

__all__ = ["EngineTier", "engine_tiers"]

_HEARD: ContextVar[list[Trace] | None] = ContextVar("routenlp_heard", default=None)
"""Decisions of the engine that runs in this context."""


def query_of_engine(engine: Any, text: str) -> Any:
    """What a query engine answers.

    Raises:
        PortfolioError: it is none; a chat engine would remember each query for the next.
    """
    if not hasattr(engine, "query"):
        raise PortfolioError(
            f"{type(engine).__name__} has no query(text): say how it is asked, ask=..., so that nothing of one query "
            "is left for the next"
        )
    return engine.query(text)


@dataclass(frozen=True, slots=True)
class EngineTier:
    """An engine on one LLM, as a core tier.

    The text is the engine's answer; evidence, model and tokens are those of its LLM, whose prompt is what a `RouterLLM`
    in its place is asked. An engine that asks its LLM more than once a query is a `TierError`: each call would be
    routed by itself, and what such an outcome says is not what the router would decide.
    """

    engine: Any
    ask: Callable[[Any, str], Any]

    def __call__(self, call: Call) -> Completion:
        """Ask the engine."""
        heard: list[Trace] = []
        token = _HEARD.set(heard)
        try:
            answer = str(self.ask(self.engine, call.query.text))
        finally:
            _HEARD.reset(token)
        if len(heard) != 1:
            raise TierError(
                "the engine answered without asking its LLM, as where nothing was retrieved"
                if not heard
                else f"the engine asks its LLM {len(heard)} times a query: collect outcomes of an engine that asks "
                'once, such as one with response_mode="compact" and few documents',
                call.tier,
            )
        (trace,) = heard
        told = trace.accepted.completion
        if told is None:
            raise TierError(trace.reason, call.tier)
        said = None if answer == told.text else told.text
        return replace(told, text=answer, said=said, asked=trace.query.text, payload=None)


def engine_tiers(
    tiers: Mapping[str, Any], build: Callable[[RouterLLM], Any], *, ask: Callable[[Any, str], Any] = query_of_engine
) -> dict[str, EngineTier]:
    """An engine for each tier: name -> what `routenlp_plugins.collect` calls.

    Args:
        tiers: as for `RouterLLM`.
        build: makes the engine on an LLM, such as ``lambda llm: index.as_query_engine(llm=llm)``.
        ask: (engine, words of the query) -> answer.
    """

    def pinned(name: str, tier: Any) -> RouterLLM:
        return RouterLLM({name: tier}, Release.frontier_only(Portfolio((Tier(name),))), listeners=(_hear,))

    return {name: EngineTier(build(pinned(name, tier)), ask) for name, tier in tiers.items()}


def _hear(trace: Trace) -> None:
    heard = _HEARD.get()
    if heard is not None:
        heard.append(trace)
