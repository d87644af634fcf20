"""LangChain components over the tiers of a routenlp release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .chains import Decisions, RouterRunnable, chain_tiers
from .chat_model import RouterChatModel
from .routed import WholeChain
from .signals import SignalCallbackHandler, shadow_tiers

if TYPE_CHECKING:
    from .agents import RouterMiddleware as RouterMiddleware

__all__ = [
    "Decisions",
    "RouterChatModel",
    "RouterMiddleware",
    "RouterRunnable",
    "SignalCallbackHandler",
    "WholeChain",
    "chain_tiers",
    "shadow_tiers",
]


def __getattr__(name: str) -> Any:
    # agents need the package langchain, which the rest does not
    if name != "RouterMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .agents import RouterMiddleware
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("langchain", "langgraph"):
            raise
        from routenlp_plugins import MissingExtraError

        raise MissingExtraError("langchain is not installed: pip install 'langchain-routenlp[agents]'") from None
    return RouterMiddleware
