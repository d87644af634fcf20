"""`RouterLLM`: an LLM that is several."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any, Self

from llama_index.core.base.llms.generic_utils import (
    achat_to_completion_decorator,
    astream_chat_to_completion_decorator,
    chat_to_completion_decorator,
    stream_chat_to_completion_decorator,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata, MessageRole
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM, ToolSelection
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import active_instrument_tags
from llama_index_instrumentation.span import active_span_id

from routenlp_plugins import (
    Answer,
    Auditable,
    Delta,
    Dispatcher,
    PortfolioError,
    Query,
    Release,
    TierError,
    Trace,
    WrappingTier,
    beyond_text,
    call_settings,
    own_errors,
)

from .messages import query_of, response_of, without_decision
from .tiers import LLMTier, ModelCall, ToolsAsked

__all__ = ["RouteDecisionEvent", "RouterLLM"]

instrumentation = get_dispatcher(__name__)
_TOOLS, _TASK = "routenlp_tools", "routenlp_task"


class RouteDecisionEvent(BaseEvent):
    """Told after each routed answer, and of each query that nobody answered.

    Attributes:
        decision: as `routenlp_plugins.Trace.as_dict` has it.
        trace: the decision itself, for listeners in this process.
    """

    decision: dict[str, Any]
    trace: Any = Field(default=None, exclude=True)

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "RouteDecisionEvent"


class RouterLLM(Auditable, FunctionCallingLLM):
    """Answers each query with the cheapest tier its release accepts.

    The decision is in ``additional_kwargs["routenlp"]`` of the response, and in a `RouteDecisionEvent`; token counts
    there are those of all attempts. Streams come word by word where nothing can reject the answer any more, and else in
    one piece: see `routenlp_plugins.Dispatcher.stream`.

    Args:
        tiers: name -> LLM, a `ScoredTier` or the like around one, or any core tier ``Call -> Completion``.
        release: a release, or the folder it was saved in.
        task: of every call; ``routenlp_task=`` of a call goes first, then ``routenlp_task`` in the
            ``additional_kwargs`` of its last message, then that of ``instrument_tags``. May be left out if the release
            knows one task only.
        auditor: what watches it, see `audited`; None.
        comparators, listeners: see `routenlp_plugins.Dispatcher`.

    Raises:
        PortfolioError: a tier is missing or unknown, or the release does not know the task.
        ReleaseError: the release cannot be used.
    """

    tiers: Mapping[str, Any] = Field(exclude=True)
    release: Any = Field(exclude=True)
    task: str | None = None
    comparators: Mapping[str, Any] | None = Field(default=None, exclude=True)
    listeners: Sequence[Any] = Field(default=(), exclude=True)
    auditor: Any = Field(default=None, exclude=True, repr=False)
    _dispatcher: Dispatcher = PrivateAttr()

    def __init__(self, tiers: Mapping[str, Any], release: Release | str | Path, **more: Any) -> None:
        unknown = sorted(more.keys() - type(self).model_fields.keys())
        if unknown:
            known = "task, comparators, listeners, and those of any LLM"
            raise PortfolioError(f"unknown argument {', '.join(unknown)}; known: tiers, release, {known}")
        super().__init__(tiers=tiers, release=Release.given(release), **more)
        self._dispatcher = self._made()
        self.release.check_task(self.task)

    def _made(self) -> Dispatcher:
        used = {name: LLMTier.of(name, tier) for name, tier in self.tiers.items()}
        return Dispatcher(self.release, used, self.comparators, tuple(self.listeners))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, which answers as what is changed in it says."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied._dispatcher = copied._made()
        return copied

    @classmethod
    def class_name(cls) -> str:
        """Name of the class, for LlamaIndex."""
        return "RouterLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What all tiers that are LLMs can do."""
        told = [llm.metadata for llm in self._llms.values()]
        if not told:
            return LLMMetadata(model_name="routenlp-router", is_chat_model=True)
        return LLMMetadata(
            context_window=min(one.context_window for one in told),
            num_output=min(one.num_output for one in told),
            is_chat_model=True,
            is_function_calling_model=all(one.is_function_calling_model for one in told),
            model_name="routenlp-router",
        )

    @property
    def _llms(self) -> dict[str, LLM]:
        found = {name: WrappingTier.innermost(tier) for name, tier in self._dispatcher.tiers.items()}
        return {name: tier.llm for name, tier in found.items() if isinstance(tier, LLMTier)}

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return self._chat(messages, **kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`, without blocking the event loop."""
        return await self._achat(messages, **kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Iterator[ChatResponse]:
        """Answer a conversation piece by piece; the last piece is the whole with its decision."""
        return self._stream_chat(messages, **kwargs)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncIterator[ChatResponse]:
        """As `stream_chat`, without blocking the event loop."""
        return await self._astream_chat(messages, **kwargs)

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        query, span = self._query(messages, kwargs), active_span_id.get()
        with self._errors(span):
            return _told(self._answering.run(query), span)

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        query, span = self._query(messages, kwargs), active_span_id.get()
        with self._errors(span):
            return _told(await self._answering.arun(query), span)

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse]:
        query, span = self._query(messages, kwargs), active_span_id.get()

        def pieces() -> Generator[ChatResponse]:
            with self._errors(span), closing(self._answering.stream(query)) as parts:
                for part in parts:
                    yield _last(part, span) if isinstance(part, Answer) else _piece(part)

        return pieces()

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncGenerator[ChatResponse]:
        query, span = self._query(messages, kwargs), active_span_id.get()

        async def pieces() -> AsyncGenerator[ChatResponse]:
            with self._errors(span):
                async with aclosing(self._answering.astream(query)) as parts:
                    async for part in parts:
                        yield _last(part, span) if isinstance(part, Answer) else _piece(part)

        return pieces()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, as the only message of a conversation."""
        return chat_to_completion_decorator(self._chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `complete`, without blocking the event loop."""
        return await achat_to_completion_decorator(self._achat)(prompt, **kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Iterator[CompletionResponse]:
        """Answer a prompt piece by piece."""
        return stream_chat_to_completion_decorator(self._stream_chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncIterator[CompletionResponse]:
        """As `stream_complete`, without blocking the event loop."""
        return await astream_chat_to_completion_decorator(self._astream_chat)(prompt, **kwargs)

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[Any],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Keep the tools in no model's form: each tier prepares them itself."""
        said = ChatMessage(user_msg, role=MessageRole.USER) if isinstance(user_msg, str) else user_msg
        options = {"allow_parallel_tool_calls": allow_parallel_tool_calls, "tool_required": tool_required}
        if "tool_choice" in kwargs:
            options["tool_choice"] = kwargs.pop("tool_choice")
        asked = ToolsAsked(list(tools), options) if tools else None
        return {"messages": [*(chat_history or ()), *([said] if said else ())], _TOOLS: asked, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of a response, as the tier that answered reads them."""
        told = response.additional_kwargs.get("routenlp") or {}
        llm = self._llms.get(told.get("tier", self.release.portfolio.frontier))
        if isinstance(llm, FunctionCallingLLM):
            own = response.model_copy(update={"additional_kwargs": without_decision(response)})
            return llm.get_tool_calls_from_response(own, error_on_no_tool_call=error_on_no_tool_call, **kwargs)
        if error_on_no_tool_call:
            raise ValueError(f"Expected at least one tool call, but tier {told.get('tier')!r} calls none")
        return []

    def _query(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> Query:
        options = dict(given)
        tools: ToolsAsked | None = options.pop(_TOOLS, None)
        last = messages[-1].additional_kwargs.get(_TASK) if messages else None
        told = active_instrument_tags.get().get(_TASK, self.task)
        task = options.pop(_TASK, told if last is None else last)
        asked = {} if tools is None else {"tools": [_spec(tool) for tool in tools.tools], **tools.options}
        requires = beyond_text({**options, **asked})
        plain = [_without_task(message) for message in messages]
        call = ModelCall(plain, options, tools)
        return query_of(plain, task, requires, call_settings({**options, **asked}), call)

    @contextmanager
    def _errors(self, span: str | None) -> Iterator[None]:
        """A failing LLM raises what it raised without us, so that callers still know it; who gave up is told too."""

        def known(tier: str, _: BaseException) -> bool:
            return isinstance(WrappingTier.innermost(self._dispatcher.tiers[tier]), LLMTier)

        with own_errors(known):
            try:
                yield
            except TierError as error:
                if error.trace is not None:
                    _tell(error.trace, span)
                raise


def _told(answer: Answer, span: str | None) -> ChatResponse:
    _tell(answer.trace, span)
    return response_of(answer)


def _last(answer: Answer, span: str | None) -> ChatResponse:
    return _told(answer, span).model_copy(update={"delta": ""})


def _tell(trace: Trace, span: str | None) -> None:
    # a stream is read after its span was left
    instrumentation.event(RouteDecisionEvent(decision=trace.as_dict(), trace=trace, span_id=span))


def _piece(delta: Delta) -> ChatResponse:
    """A piece of a stream, which says which tier it is of."""
    response = delta.payload
    if not isinstance(response, ChatResponse):
        response = ChatResponse(message=ChatMessage(delta.text, role=MessageRole.ASSISTANT))
    told = {**response.additional_kwargs, "routenlp": {"tier": delta.tier}}
    # calls are no words: what comes in one piece has both
    said = (response.message.content or "") if response.delta is None else response.delta
    return response.model_copy(update={"delta": said, "additional_kwargs": told})


def _spec(tool: Any) -> Any:
    return tool if isinstance(tool, Mapping) else tool.metadata.to_openai_tool(skip_length_check=True)


def _without_task(message: ChatMessage) -> ChatMessage:
    if _TASK not in message.additional_kwargs:
        return message
    left = {name: value for name, value in message.additional_kwargs.items() if name != _TASK}
    return message.model_copy(update={"additional_kwargs": left})
