"""LangChain components over the tiers of a routenlp release."""

from .chains import Decisions, RouterRunnable, chain_tiers
from .chat_model import RouterChatModel
from .signals import SignalCallbackHandler, shadow_tiers

__all__ = ["Decisions", "RouterChatModel", "RouterRunnable", "SignalCallbackHandler", "chain_tiers", "shadow_tiers"]
