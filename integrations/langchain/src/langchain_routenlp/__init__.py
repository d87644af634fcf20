"""LangChain components over the tiers of a routenlp release."""

from .chains import RouterRunnable, chain_tiers
from .chat_model import RouterChatModel

__all__ = ["RouterChatModel", "RouterRunnable", "chain_tiers"]
