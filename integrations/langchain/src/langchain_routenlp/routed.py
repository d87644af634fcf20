"""Whole chains as tiers: the cheapest whose output its release accepts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import patch_config
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from routenlp_plugins import Answer, Call, Completion, Delta, Dispatcher, PortfolioError, Query

from .messages import answer_of, completion_of
from .place import TIER, Place
from .tiers import aerrors_of_tiers, errors_of_tiers

__all__ = ["RoutedChains", "WholeChain", "text_of"]

NOSTREAM = "nostream"
"""Tag by which LangGraph leaves tokens out of message streams."""
ToText = Callable[[Any], str]


def text_of(value: Any) -> str:
    """What a chain takes or gives, as text."""
    if isinstance(value, BaseMessage):
        return str(value.text)
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value, default=str, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class WholeChain:
    """A chain as a core tier: what `RouterRunnable.of_chains` calls, and `routenlp_plugins.collect`.

    The text of a completion is the chain's output. Its tokens are those of all model calls within; log-probabilities
    and the model's name are taken where there was one call only.

    Attributes:
        to_input: from a query to the chain's input, where the chain is called for a query alone.
    """

    chain: Runnable[Any, Any]
    to_input: Callable[[Query], Any] = attrgetter("text")

    def __call__(self, call: Call) -> Completion:
        """Run the chain."""
        heard = _Heard()
        value, config, options = self._arguments(call, heard)
        return heard.completion(self.chain.invoke(value, config, **options))

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        heard = _Heard()
        value, config, options = self._arguments(call, heard)
        return heard.completion(await self.chain.ainvoke(value, config, **options))

    def stream(self, call: Call) -> Iterator[Delta | Completion]:
        """What the chain streams, and at last the whole of it."""
        heard, parts = _Heard(), _Parts()
        value, config, options = self._arguments(call, heard)
        for part in self.chain.stream(value, config, **options):
            yield from parts.after(part)
        if parts.all:
            yield heard.completion(_sum(parts.all))

    async def astream(self, call: Call) -> AsyncIterator[Delta | Completion]:
        """As `stream`, without blocking the event loop."""
        heard, parts = _Heard(), _Parts()
        value, config, options = self._arguments(call, heard)
        async for part in self.chain.astream(value, config, **options):
            for ready in parts.after(part):
                yield ready
        if parts.all:
            yield heard.completion(_sum(parts.all))

    def _arguments(self, call: Call, heard: _Heard) -> tuple[Any, RunnableConfig, dict[str, Any]]:
        asked = call.payload
        if not isinstance(asked, _ChainCall):
            return self.to_input(call.query), {"callbacks": [heard]}, {}
        child = asked.manager.get_child(f"tier:{call.tier}")
        child.add_handler(heard, inherit=True)
        child.add_metadata({TIER: call.tier})
        if call.may_be_passed_over:
            # no token of it may be seen
            child.add_tags([NOSTREAM])
        return asked.input, patch_config(asked.config, callbacks=child), asked.options


class RoutedChains(RunnableSerializable[Any, Any]):
    """Runs the chain of the cheapest tier whose output its release accepts.

    Each chain runs below this one's run, so that usage is counted by the models that had it. The decision is told to
    handlers as a custom event, see `Decisions`.

    Args:
        tiers: name -> chain.
        to_text: from the input to the words of the query.
        task, comparators, listeners: see `RouterChatModel`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    tiers: Mapping[str, Any] = Field(exclude=True)
    release: Any = Field(exclude=True)
    task: str | None = None
    to_text: ToText = Field(default=text_of, exclude=True)
    comparators: Mapping[str, Any] | None = Field(default=None, exclude=True)
    listeners: tuple[Any, ...] = Field(default=(), exclude=True)
    _dispatcher: Dispatcher = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Check the chains against the release now, not at the first call."""
        super().model_post_init(context)
        for name, chain in self.tiers.items():
            if not isinstance(chain, Runnable | WholeChain):
                raise PortfolioError(f"tiers: {name} must be a chain, got {type(chain).__name__}")
        chains = {n: one if isinstance(one, WholeChain) else WholeChain(one) for n, one in self.tiers.items()}
        self._dispatcher = Dispatcher(self.release, chains, self.comparators, self.listeners)
        self._dispatcher.release.check_task(self.task)

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        """The accepted chain's output."""

        def run(value: Any, run_manager: Any, config: RunnableConfig) -> Any:
            place = Place.of(run_manager)
            with errors_of_tiers(place):
                answer = self._dispatcher.run(self._query(value, run_manager, config, kwargs))
            place.announce(answer.trace)
            return answer.payload

        return self._call_with_config(run, input, config)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        """As `invoke`, without blocking the event loop."""

        async def run(value: Any, run_manager: Any, config: RunnableConfig) -> Any:
            place = Place.of(run_manager)
            async with aerrors_of_tiers(place):
                answer = await self._dispatcher.arun(self._query(value, run_manager, config, kwargs))
            await place.aannounce(answer.trace)
            return answer.payload

        return await self._acall_with_config(run, input, config)

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:  # noqa: A002
        """The accepted chain's output as it streams it, where nothing can reject it any more, else in one piece."""

        def run(values: Iterator[Any], run_manager: Any, config: RunnableConfig) -> Iterator[Any]:
            query, place = self._query(_sum(list(values)), run_manager, config, kwargs), Place.of(run_manager)
            with errors_of_tiers(place), closing(self._dispatcher.stream(query)) as parts:
                for part in parts:
                    if isinstance(part, Answer):
                        place.announce(part.trace)
                    else:
                        yield part.payload

        yield from self._transform_stream_with_config(iter([input]), run, config)

    async def astream(
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """As `stream`, without blocking the event loop."""

        async def run(values: AsyncIterator[Any], run_manager: Any, config: RunnableConfig) -> AsyncIterator[Any]:
            place = Place.of(run_manager)
            query = self._query(_sum([value async for value in values]), run_manager, config, kwargs)
            async with aerrors_of_tiers(place), aclosing(self._dispatcher.astream(query)) as parts:
                async for part in parts:
                    if isinstance(part, Answer):
                        await place.aannounce(part.trace)
                    else:
                        yield part.payload

        async def given() -> AsyncIterator[Any]:
            yield input

        async for part in self._atransform_stream_with_config(given(), run, config):
            yield part

    def _query(self, value: Any, manager: Any, config: RunnableConfig, options: dict[str, Any]) -> Query:
        task = manager.metadata.get("routenlp_task", self.task)
        return Query(self.to_text(value), task=task, payload=_ChainCall(value, manager, config, options))


@dataclass(frozen=True, slots=True)
class _ChainCall:
    """What was asked: the payload of queries."""

    input: Any
    manager: Any
    config: RunnableConfig
    options: dict[str, Any]


class _Heard(BaseCallbackHandler):
    """The messages of the models within a chain."""

    def __init__(self) -> None:
        self._messages: list[AIMessage] = []

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        """Keep the message."""
        for some in response.generations:
            for one in some[:1]:
                message = one.message if isinstance(one, ChatGeneration) else AIMessage(one.text)
                if isinstance(message, AIMessage):
                    self._messages.append(message)

    def completion(self, output: Any) -> Completion:
        """Of the chain's output."""
        told = [completion_of(message) for message in self._messages]
        models = sorted({one.model for one in told if one.model is not None})
        alone = told[0] if len(told) == 1 else Completion("", model=" + ".join(models) or None)
        said = answer_of(output) if isinstance(output, AIMessage) else Completion(text_of(output))
        return replace(
            alone,
            text=said.text,
            scores={**alone.scores, "valid": float(_says(output) and said.valid)},
            input_tokens=_total([one.input_tokens for one in told]),
            output_tokens=_total([one.output_tokens for one in told]),
            cached_tokens=sum(one.cached_tokens or 0 for one in told),
            payload=output,
        )


class _Parts:
    """What a chain streams; what says nothing waits for what does, since nothing can be taken back after that."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._held: list[Any] = []
        self._begun = False

    def after(self, part: Any) -> list[Delta]:
        self.all.append(part)
        self._held.append(part)
        self._begun = self._begun or _says(part)
        if not self._begun:
            return []
        ready, self._held = self._held, []
        return [Delta(text_of(one), payload=one) for one in ready]


def _says(part: Any) -> bool:
    if isinstance(part, AIMessageChunk):
        return bool(part.content or part.tool_call_chunks)
    return bool(part) if part is None or isinstance(part, str | list | dict) else True


def _total(counts: Sequence[int | None]) -> int | None:
    """Of all calls; unknown where that of one is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _sum(parts: list[Any]) -> Any:
    """Parts of a stream added up, as LangChain does; the last of those that cannot be."""
    whole = parts[0]
    for part in parts[1:]:
        try:
            whole = whole + part
        except TypeError:
            whole = part
    return whole
