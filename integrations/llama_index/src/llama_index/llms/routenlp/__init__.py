"""LlamaIndex components over the tiers of a routenlp release."""

from .collecting import EngineTier, engine_tiers
from .llm import RouteDecisionEvent, RouterLLM
from .signals import SignalEventHandler, shadow_tiers

__all__ = ["EngineTier", "RouteDecisionEvent", "RouterLLM", "SignalEventHandler", "engine_tiers", "shadow_tiers"]
