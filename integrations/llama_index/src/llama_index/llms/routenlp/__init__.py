"""LlamaIndex components over the tiers of a routenlp release."""

from .llm import RouteDecisionEvent, RouterLLM

__all__ = ["RouteDecisionEvent", "RouterLLM"]
