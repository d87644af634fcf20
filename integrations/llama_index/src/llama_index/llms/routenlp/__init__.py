"""LlamaIndex components over the tiers of a routenlp release."""

from .llm import RouteDecisionEvent, RouterLLM
from .signals import SignalEventHandler, shadow_tiers

__all__ = ["RouteDecisionEvent", "RouterLLM", "SignalEventHandler", "shadow_tiers"]
