"""LangChain models as tiers of the core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableBinding

from routenlp_plugins import Call, Completion, PortfolioError, SelfConsistentTier, WrappingTier

from .messages import completion_of

__all__ = ["LangChainTier", "ModelCall"]


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What `RouterChatModel` was asked: the payload of its queries.

    Attributes:
        tool_options: what tools among the options were bound to the router with, so that each tier binds them in its
            own form; None where they are in the frontier's form already.
    """

    messages: list[BaseMessage]
    stop: list[str] | None
    options: dict[str, Any]
    tool_options: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class LangChainTier:
    """A chat model, or a binding of one, that answers without opening a run of its own.

    A nested run would count its tokens once more in every handler and leak rejected tokens into message streams.
    """

    model: BaseChatModel
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, tier: Any) -> Any:
        """A LangChain model as a core tier, also inside a tier that adds scores; any other core tier as it is.

        Raises:
            PortfolioError: it is neither.
        """
        if isinstance(tier, WrappingTier):
            inner = cls.of(name, tier.tier)
            if isinstance(tier, SelfConsistentTier) and isinstance(inner, cls):
                # a cache would answer every sample with the first
                inner = replace(inner, model=inner.model.model_copy(update={"cache": False}))
            return tier.around(inner)
        options: dict[str, Any] = {}
        model = tier
        while isinstance(model, RunnableBinding):
            if model.config.get("callbacks") or model.config_factories:
                raise PortfolioError(
                    f"tiers: {name} is bound to callbacks or listeners, but a tier opens no run they could hear of: "
                    "give them to the router"
                )
            options = {**model.kwargs, **options}
            model = model.bound
        if isinstance(model, BaseChatModel):
            if model.callbacks:
                raise PortfolioError(
                    f"tiers: {name} has callbacks, but a tier opens no run they could hear of: give them to the router"
                )
            return cls(model, options)
        if isinstance(model, Runnable) or not callable(tier):
            raise PortfolioError(
                f"tiers: {name} must be a chat model, a binding of one, or a callable Call -> Completion; "
                f"got {type(model).__name__}"
            )
        return tier

    def __call__(self, call: Call) -> Completion:
        """The model's answer to the messages in the payload."""
        # the inner half of invoke: cache, rate limiter and metadata of the tier, but no run
        asked = _asked(call)
        result = self.model._generate_with_cache(asked.messages, run_manager=None, **self._arguments(asked))
        return self._completion(result.generations[0].message)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        asked = _asked(call)
        result = await self.model._agenerate_with_cache(asked.messages, run_manager=None, **self._arguments(asked))
        return self._completion(result.generations[0].message)

    def _completion(self, message: BaseMessage) -> Completion:
        if not isinstance(message, AIMessage):
            raise TypeError(f"expected an AIMessage, got {type(message).__name__}")
        completion = completion_of(message)
        if completion.model is not None:
            return completion
        # what the answer does not say the model may: another one there is another tier
        return replace(completion, model=self.model._get_ls_params().get("ls_model_name"))

    def _arguments(self, asked: ModelCall) -> dict[str, Any]:
        """What is bound to the tier, then what the call asks for."""
        stop = {} if asked.stop is None else {"stop": asked.stop}
        arguments = {"stop": None, **self.options, **asked.options, **stop}
        if asked.tool_options is None:
            return arguments
        choice = {"tool_choice": arguments.pop("tool_choice")} if "tool_choice" in arguments else {}
        bound = self.model.bind_tools(arguments.pop("tools"), **choice, **asked.tool_options)
        return {**getattr(bound, "kwargs", {}), **arguments}


def _asked(call: Call) -> ModelCall:
    """The payload; a question of our own, such as whether an answer is right, has none."""
    if isinstance(call.payload, ModelCall):
        return call.payload
    return ModelCall([HumanMessage(call.query.text)], None, {})
