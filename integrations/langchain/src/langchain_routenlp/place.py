"""Where in a run the router is: what handlers there are, and what the call's metadata say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.callbacks.manager import BaseRunManager, ahandle_event, handle_event
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.utils.uuid import uuid7
from pydantic import PrivateAttr

from routenlp_plugins import Trace

__all__ = ["DECISION", "TIER", "Place", "PlacedChatModel"]

DECISION = "routenlp_decision"
"""Name of the custom event that tells handlers the whole trace of an answer, under ``trace``."""

TIER = "routenlp_tier"
"""In the metadata of runs that are attempts of a tier, and of all runs within."""


@dataclass(frozen=True, slots=True)
class Place:
    """A run of the router; one without a run tells nobody."""

    run_id: UUID | None = None
    handlers: Sequence[BaseCallbackHandler] = ()
    tags: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, manager: BaseRunManager | None) -> Place:
        """That of a manager, as models are given them."""
        if manager is None:
            return cls()
        return cls(manager.run_id, manager.handlers, manager.tags, manager.metadata)

    @classmethod
    def around(cls) -> Place:
        """That of the run which is under way here."""
        manager = ensure_config().get("callbacks")
        if not isinstance(manager, BaseCallbackManager):
            return cls()
        return cls(manager.parent_run_id, manager.handlers, manager.tags, manager.metadata)

    def announce(self, trace: Trace) -> None:
        """Tell the handlers of a decision."""
        if self.run_id is not None:
            handle_event([*self.handlers], *_event(trace), **self._facts)

    async def aannounce(self, trace: Trace) -> None:
        """As `announce`, awaiting those that are async."""
        if self.run_id is not None:
            await ahandle_event([*self.handlers], *_event(trace), **self._facts)

    @property
    def _facts(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "tags": [*self.tags], "metadata": dict(self.metadata)}


class PlacedChatModel(BaseChatModel):
    """A chat model that knows in which run it streams.

    LangChain tells `_stream` nothing of the run it is in. But the task of a call is in the run's metadata, and the
    decision is told to the run's handlers: a copy of the model, made for this call, knows its place.
    """

    _place: Place = PrivateAttr(Place())

    def stream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Stream the answer to one input."""
        config, place = _placed(self, config, CallbackManager)
        yield from super(PlacedChatModel, self._at(place)).stream(input, config, stop=stop, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As `stream`, without blocking the event loop."""
        config, place = _placed(self, config, AsyncCallbackManager)
        chunks = super(PlacedChatModel, self._at(place)).astream(input, config, stop=stop, **kwargs)
        async for chunk in chunks:
            yield chunk

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        there = self._at(Place.of(run_manager))
        return super(PlacedChatModel, there)._generate_with_cache(messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        there = self._at(Place.of(run_manager))
        return await super(PlacedChatModel, there)._agenerate_with_cache(messages, stop, run_manager, **kwargs)

    def _at(self, place: Place) -> Self:
        copy = self.model_copy()
        copy._place = place
        return copy


def _placed(
    model: BaseChatModel, config: RunnableConfig | None, kind: type[CallbackManager | AsyncCallbackManager]
) -> tuple[RunnableConfig, Place]:
    """The config of a stream with the id of its run, and the place it will have.

    A streaming model is told nothing of its run, so that its id is chosen, and its handlers are found, beforehand.
    """
    known = ensure_config(config)
    run_id = known.get("run_id") or uuid7()
    manager: BaseCallbackManager = kind.configure(
        known.get("callbacks"),
        model.callbacks,
        model.verbose,
        known.get("tags"),
        model.tags,
        known.get("metadata"),
        model.metadata,
    )
    return {**known, "run_id": run_id}, Place(run_id, manager.handlers, manager.tags, manager.metadata)


def _event(trace: Trace) -> tuple[str, str, str, dict[str, Trace]]:
    return "on_custom_event", "ignore_custom_event", DECISION, {"trace": trace}
