"""Existing chains: their model replaced by the router, or run whole on each tier to collect outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBindingBase

from routenlp_plugins import (
    AuditOptions,
    Call,
    Completion,
    Portfolio,
    PortfolioError,
    Query,
    Release,
    Task,
    Tier,
    TierError,
    Trace,
    TraceStore,
)

from .chat_model import RouterChatModel
from .messages import completion_of, query_of
from .place import DECISION
from .rewrite import chat_models, describe, model_name, rewrite
from .routed import RoutedChains, text_of

__all__ = ["ChainTier", "Decisions", "RouterRunnable", "chain_tiers"]


class RouterRunnable(RunnableBindingBase[Any, Any]):
    """A chain whose chat model was replaced by a `RouterChatModel`; everything else is as it was.

    Not to be confused with ``langchain_core.runnables.RouterRunnable``, which picks a runnable by a key of the input.
    """

    @classmethod
    def from_chain(
        cls,
        chain: Runnable[Any, Any],
        tiers: Mapping[str, Any],
        release: Release | str | Path,
        *,
        model: BaseChatModel | str | None = None,
        task: str | None = None,
        comparators: Mapping[str, Any] | None = None,
    ) -> RouterRunnable:
        """Replace the chat model of a chain.

        Looks into sequences, parallels, assignments, branches, bindings and retries, and into the primary of
        fallbacks.

        Args:
            chain: any chain with a chat model in it; it is not changed.
            tiers: name -> chat model or core tier. The frontier may be left out or None: it is the chain's own model.
            release: a release, or the folder it was saved in.
            model: which chat model to replace if there are several: the object, its class or model name.
            task, comparators: see `RouterChatModel`.

        Raises:
            PortfolioError: the chain has no chat model that can be seen, or several and none was chosen, or the release
                does not know the task.
        """
        release = release if isinstance(release, Release) else Release.load(release)
        found = _chosen(chain, model)
        frontier = release.portfolio.frontier
        named = {**tiers, frontier: _silent(found)} if tiers.get(frontier) is None else {**tiers}
        router = RouterChatModel(
            tiers=named,
            release=release,
            task=task,
            comparators=comparators,
            callbacks=found.callbacks,
            tags=found.tags,
            metadata=found.metadata,
            name=found.name,
        )
        return cls(bound=rewrite(chain, lambda one: router if one is found else one))

    @classmethod
    def of_chains(
        cls,
        tiers: Mapping[str, Runnable[Any, Any]],
        release: Release | str | Path,
        *,
        to_text: Callable[[Any], str] | None = None,
        task: str | None = None,
        comparators: Mapping[str, Any] | None = None,
        listeners: Sequence[Callable[[Trace], object]] = (),
    ) -> RouterRunnable:
        """Route over whole chains, one for each tier: each gets the input, and the output that is accepted is returned.

        Outcomes are collected by ``collect(..., tiers={name: WholeChain(chain)})``.

        Args:
            tiers: name -> chain; `WholeChain` says how it is called for a query alone.
            release: a release, or the folder it was saved in.
            to_text: from the input to the words of the query; a text or message is its own, all else is JSON.
            task, comparators, listeners: see `RouterChatModel`.

        Raises:
            PortfolioError: a tier is missing, unknown or no chain, or the release does not know the task.
        """
        routed = RoutedChains(
            tiers=tiers,
            release=Release.given(release),
            to_text=to_text or text_of,
            task=task,
            comparators=comparators,
            listeners=tuple(listeners),
        )
        return cls(bound=routed)

    @contextmanager
    def audited(
        self,
        quality: Callable[[Query, Completion], float | None],
        log: str | Path,
        options: AuditOptions | None = None,
        store: TraceStore | None = None,
    ) -> Iterator[RouterRunnable]:
        """The same chain with its certificate watched; see `RouterChatModel.audited`."""
        routers = [model for model in chat_models(self.bound) if isinstance(model, RouterChatModel)]
        if not routers:
            raise PortfolioError("the tiers are whole chains: audit a Dispatcher over their WholeChain by an Auditor")
        if len(routers) > 1:
            raise PortfolioError("the chain has several routed models: audit each before it is built in")
        (router,) = routers
        with router.audited(quality, log, options, store) as watched:
            yield self.model_copy(update={"bound": rewrite(self.bound, lambda one: watched if one is router else one)})

    @property
    def expired(self) -> dict[str, str]:
        """Task -> why its certificate has expired, of a chain that is audited."""
        routers = [model for model in chat_models(self.bound) if isinstance(model, RouterChatModel)]
        return {task: reason for router in routers for task, reason in router.expired.items()}


@dataclass(frozen=True, slots=True)
class ChainTier:
    """A whole chain as a core tier: what `routenlp_plugins.collect` calls.

    The text is the chain's output; log-probabilities and token counts are those of its model. A chain that fails
    after its model answered gives an empty answer: the router, which stands where the model stands, would have
    accepted it. A failing model is a `TierError`. So is a chain that calls its model more than once a query, or with
    tools or a response format that its task does not have: what such an outcome says is not what the router would
    decide.

    Attributes:
        chain: with a `RouterChatModel` of one tier in it.
        to_input: from the query to the chain's input.
        requires: what the chain's calls may ask for beyond text, as their task says.
    """

    chain: Runnable[Any, Any]
    to_input: Callable[[Query], Any]
    requires: tuple[str, ...] = ()

    def __call__(self, call: Call) -> Completion:
        """Run the chain on its tier."""
        decisions = _Asked()
        inputs, config = [self.to_input(call.query)], _config(decisions, call)
        (output,) = self.chain.batch(inputs, config, return_exceptions=True)
        return _completion(decisions, call, output, self.requires)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        decisions = _Asked()
        inputs, config = [self.to_input(call.query)], _config(decisions, call)
        (output,) = await self.chain.abatch(inputs, config, return_exceptions=True)
        return _completion(decisions, call, output, self.requires)


def chain_tiers(
    chain: Runnable[Any, Any],
    tiers: Mapping[str, Any],
    *,
    model: BaseChatModel | str | None = None,
    to_input: Callable[[Query], Any] = lambda query: query.text,
    requires: Sequence[str] = (),
) -> dict[str, ChainTier]:
    """The chain once for each tier, its model replaced by that tier.

    Args:
        chain: as for `RouterRunnable.from_chain`.
        tiers: name -> chat model or core tier; None stands for the chain's own model.
        model: as for `RouterRunnable.from_chain`.
        to_input: from the query to the chain's input; the text by default.
        requires: what the chain's calls ask for beyond text, as the task of the portfolio says.
    """
    found, needed = _chosen(chain, model), Task("of the chain", requires=tuple(requires)).requires

    def pinned(name: str, tier: Any) -> Runnable[Any, Any]:
        release = Release.frontier_only(Portfolio((Tier(name),)))
        router = RouterChatModel(tiers={name: _silent(found) if tier is None else tier}, release=release)
        return rewrite(chain, lambda one: router if one is found else one)

    return {name: ChainTier(pinned(name, tier), to_input, needed) for name, tier in tiers.items()}


class Decisions(BaseCallbackHandler):
    """Keeps the messages of the routed model during a run: behind a parser their metadata would be lost.

    Attributes:
        messages: with the decision in ``response_metadata["routenlp"]``, in order; those of whole chains have none.
        traces: of all decisions, in order.
    """

    def __init__(self) -> None:
        self.messages: list[AIMessage] = []
        self.traces: list[Trace] = []

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **_: Any) -> None:
        """Keep the trace of a decision."""
        if name == DECISION:
            self.traces.append(data["trace"])

    def on_llm_end(self, response: LLMResult, *, run_id: UUID | None = None, **_: Any) -> None:
        """Keep the message if a router made it."""
        generation = response.generations[0][0]
        message = generation.message if isinstance(generation, ChatGeneration) else None
        if isinstance(message, AIMessage) and "routenlp" in message.response_metadata:
            self.messages.append(message)


class _Asked(Decisions):
    """Keeps beside each message the words of the user that its model was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._started: dict[UUID, str] = {}

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **_: Any
    ) -> None:
        if messages and messages[0]:
            self._started[run_id] = query_of(messages[0], None, frozenset(), "", None).text

    def on_llm_end(self, response: LLMResult, *, run_id: UUID | None = None, **_: Any) -> None:
        before = len(self.messages)
        super().on_llm_end(response, run_id=run_id)
        if len(self.messages) > before and run_id is not None:
            self.texts.append(self._started[run_id])


def _config(decisions: Decisions, call: Call) -> RunnableConfig:
    return {"callbacks": [decisions], "metadata": {"routenlp_task": call.query.task}}


def _completion(decisions: _Asked, call: Call, output: Any, requires: Sequence[str]) -> Completion:
    if not decisions.messages:
        if isinstance(output, Exception):
            raise output
        raise TierError("the chain ended without calling its model", call.tier)
    if len(decisions.messages) > 1:
        raise TierError(
            f"the chain calls its model {len(decisions.messages)} times a query, and each call would be routed by "
            "itself: collect outcomes of each step, as a chain of its own",
            call.tier,
        )
    message = decisions.messages[-1]
    decision = message.response_metadata["routenlp"]
    beyond = [one for one in decision["requires"] if one not in requires]
    if beyond:
        raise TierError(
            f"the chain calls its model with {', '.join(beyond)}, and such calls always go to the frontier: there is "
            "nothing to collect, unless its task has them, Task(requires=...), and chain_tiers(requires=...) is told",
            call.tier,
        )
    facts = decision["attempts"][-1]
    own = ("confidence", "mean_logprob", "scores", "model", "prompt", "cost_usd", "latency_ms")
    completion = completion_of(message)
    text = "" if isinstance(output, Exception) else text_of(output)
    return replace(
        completion,
        text=text,
        said=None if text == completion.text else completion.text,
        asked=decisions.texts[-1],
        **{name: facts[name] for name in own},
    )


def _chosen(chain: Runnable[Any, Any], model: BaseChatModel | str | None) -> BaseChatModel:
    found = chat_models(chain)
    if not found:
        raise PortfolioError(
            "the chain has no chat model that can be seen; one inside a function, a message history or configurable "
            "fields cannot be replaced: use a RouterChatModel there, or route the chain inside; an agent takes a "
            "RouterMiddleware"
        )
    chosen = [one for one in found if model is None or one is model or model in (type(one).__name__, model_name(one))]
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(describe(one) for one in found)
    if not chosen:
        named = describe(model) if isinstance(model, BaseChatModel) else repr(model)
        raise PortfolioError(f"model={named} is not in the chain; its chat models: {listed}")
    raise PortfolioError(
        f"the chain has {len(chosen)} chat models to choose from ({listed}): name one with model=, by object, "
        "class or model name"
    )


def _silent(model: BaseChatModel) -> BaseChatModel:
    """The chain's own model as a tier: its callbacks go over to the router."""
    return model.model_copy(update={"callbacks": None}) if model.callbacks else model
