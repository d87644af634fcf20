"""Listens to engines and agents that run already, and keeps what they did."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr, ValidationError
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
    LLMStructuredPredictEndEvent,
)
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import SimpleSpan
from llama_index_instrumentation.span_handlers import BaseSpanHandler

from routenlp_plugins import (
    Portfolio,
    Query,
    Recorder,
    RouteNLPError,
    Shadow,
    TraceStore,
    beyond_text,
    call_settings,
)

from .llm import RouteDecisionEvent, RouterLLM
from .messages import completion_of, query_of
from .tiers import TIER, LLMTier, ModelCall

__all__ = ["SignalEventHandler", "shadow_tiers"]

logger = logging.getLogger(__name__)

_STRUCTURED = ("structured_predict", "astructured_predict")
_OWN = ("routenlp_tools", "routenlp_task")
MOST = 10_000
"""Spans that wait for streams in one outermost span, and outermost spans that do; of more the oldest are given up:
nobody reads those."""


class SignalEventHandler(BaseEventHandler):
    """Keeps every call of a model in a trace store, and what LlamaIndex tells of its quality.

    ``with handler.attached(): engine.query(...)``, or for good ``handler.attach()``. Nothing is routed, and no request
    waits. Each call is a trace, found by the ids of its span and of all spans around it. A call of a call, as
    ``complete`` makes of ``chat``, is one; behind a `RouterLLM` the whole decision is kept, and its tiers' calls are no
    traces of their own. Structured prediction that succeeds or fails becomes a signal by itself, where it is not
    streamed. A stream is kept when it has been read, while the handler is attached; of streams there are no
    log-probabilities.

    Task and dialogue are tags: ``with instrument_tags({"routenlp_task": ..., "thread_id": ...})``. Calls under one
    outermost span belong together.

    Args:
        store: what keeps it; flushing and closing it is the caller's.
        portfolio: prices the calls; without one their cost is unknown.
        tiers: name of a model, as its provider knows it -> name of the tier; see `routenlp_plugins.Recorder`.
        task: of all calls that name none.
        shadow: puts a share of what was answered to other tiers too, in the background; its tiers are those of
            `shadow_tiers`.

    Raises:
        PortfolioError: `tiers` names one that the portfolio does not have.
    """

    _recorder: Recorder = PrivateAttr()
    _spans: _Spans = PrivateAttr()
    _models: dict[str, str | None] = PrivateAttr(default_factory=dict)
    _routers: set[str] = PrivateAttr(default_factory=set)
    _streams: set[str] = PrivateAttr(default_factory=set)
    _attached: int = PrivateAttr(default=0)
    _lock: Any = PrivateAttr(default_factory=RLock)
    _speaking: dict[str, set[str]] = PrivateAttr(default_factory=dict)
    _waiting: dict[str, list[str]] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        store: TraceStore,
        *,
        portfolio: Portfolio | None = None,
        tiers: Mapping[str, str] | None = None,
        task: str | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        super().__init__()
        self._recorder = Recorder(store, portfolio, tiers, task, shadow)
        self._spans = _Spans(self)

    @classmethod
    def class_name(cls) -> str:
        """Name of the handler."""
        return "SignalEventHandler"

    def attach(self) -> None:
        """Listen to all of LlamaIndex, from now on; as often as it is attached it must be detached."""
        with self._lock:
            self._attached += 1
            if self._attached > 1:
                return
            root = get_dispatcher()
            root.add_event_handler(self)
            root.add_span_handler(self._spans)

    def detach(self) -> None:
        """Listen no more, once nobody listens any more."""
        with self._lock:
            self._attached = max(self._attached - 1, 0)
            if self._attached:
                return
        root = get_dispatcher()
        root.event_handlers = [one for one in root.event_handlers if one is not self]
        root.span_handlers = [one for one in root.span_handlers if one is not self._spans]

    @contextmanager
    def attached(self) -> Iterator[SignalEventHandler]:
        """Listen within it."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    def handle(self, event: BaseEvent, **_: Any) -> None:
        """Keep what an event tells. LlamaIndex hides what handlers raise, so that it is logged."""
        try:
            with self._lock:
                self._told(event)
        except RouteNLPError as error:
            logger.warning("%s is not kept: %s", event.class_name(), error)

    def _told(self, event: BaseEvent) -> None:
        if isinstance(event, LLMChatStartEvent):
            self._asked(event, event.messages, event.additional_kwargs, event.model_dict)
        elif isinstance(event, LLMCompletionStartEvent):
            said = [ChatMessage(event.prompt, role=MessageRole.USER)]
            self._asked(event, said, event.additional_kwargs, event.model_dict)
        elif isinstance(event, LLMChatInProgressEvent | LLMCompletionInProgressEvent):
            if event.span_id is not None and event.span_id in self._models:
                self._streams.add(event.span_id)
        elif isinstance(event, LLMChatEndEvent | LLMCompletionEndEvent):
            self._heard(event.span_id, event.response)
        elif isinstance(event, ExceptionEvent):
            self._failed(event.span_id, event.exception)
        elif isinstance(event, RouteDecisionEvent):
            run = self._recorder.get(event.span_id)
            if run is not None:
                run.decided = event.trace
        elif isinstance(event, LLMStructuredPredictEndEvent):
            run = self._recorder.get(event.span_id)
            if run is not None:
                self._recorder.says(run, "parser", 1.0, "parser:structured prediction")

    def _asked(self, event: BaseEvent, messages: Any, options: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        name = event.span_id or event.id_
        run = self._recorder.get(name) or self._recorder.begin(name, None, "llm", event.tags)
        above = list(self._recorder.runs.above(run))
        if TIER in event.tags or name.startswith("StructuredLLM."):
            # a tier's call is part of its router's, and a structured model's that of the model in it
            return
        for one in above:
            if one in self._models:
                # one call of a model, told twice: as completion and as the chat that it is
                self._forget(one)
        given = {key: value for key, value in options.items() if key not in _OWN and value is not None}
        task = self._recorder.task_of(run)
        self._models[name] = model.get("model") or model.get("model_name")
        self._speaking.setdefault(run.root.id, set()).add(name)
        call = ModelCall(list(messages), given)
        self._recorder.asked(run, query_of(messages, task, beyond_text(given), call_settings(given), call))

    def _heard(self, name: str | None, response: ChatResponse | CompletionResponse | None) -> None:
        run = self._recorder.get(name)
        if run is None or name not in self._models:
            return
        if isinstance(response, CompletionResponse):
            said = ChatMessage(response.text, role=MessageRole.ASSISTANT)
            response = ChatResponse(message=said, raw=response.raw, additional_kwargs=response.additional_kwargs)
        answer = None if response is None else completion_of(response, streamed=name in self._streams)
        try:
            # tools are in the form of one provider here: nobody else could be asked with them
            self._recorder.heard(run, answer, self._models[name], shadowed=not _requires(run.query))
        finally:
            self._spoken(name)

    def _failed(self, name: str | None, error: BaseException | None) -> None:
        run = self._recorder.get(name)
        if run is None or name not in self._models:
            return
        run.decided = getattr(error, "trace", None) or run.decided
        try:
            if run.decided is not None:
                self._recorder.heard(run, None)
            elif name not in self._routers:
                # who gave up on a router is known to its listeners, with the tiers that were asked
                self._recorder.failed(run, error or RuntimeError("no answer"), self._models[name])
        finally:
            self._spoken(name)

    def _forget(self, name: str) -> None:
        """Take back that a run is the call of a model."""
        run = self._recorder.get(name)
        self._models.pop(name, None)
        if run is not None:
            run.query = None
            self._speaking.get(run.root.id, set()).discard(name)

    def _spoken(self, name: str) -> None:
        """An answer is whole: the spans that only waited for it end."""
        run = self._recorder.get(name)
        if run is None:
            return
        self._models.pop(name, None)
        self._streams.discard(name)
        root = run.root.id
        speaking = self._speaking.get(root, set())
        speaking.discard(name)
        if not speaking:
            self._speaking.pop(root, None)
            for one in self._waiting.pop(root, []):
                self._end(one)

    def entered(self, name: str, instance: Any, parent: str | None, tags: Mapping[str, Any] | None) -> None:
        """A span begins."""
        kind = "span" if instance is None else type(instance).__name__
        with self._lock:
            self._recorder.begin(name, parent, kind, tags)
            if isinstance(instance, RouterLLM):
                self._routers.add(name)

    def left(self, name: str, error: BaseException | None = None) -> None:
        """A span ends; one in which a stream goes on ends with that."""
        with self._lock:
            self._left(name, error)

    def _left(self, name: str, error: BaseException | None) -> None:
        run = self._recorder.get(name)
        if run is None:
            return
        if error is not None:
            self._failed(name, error)
            if isinstance(error, ValidationError | ValueError) and _method(name) in _STRUCTURED:
                self._recorder.says(run, "parser", 0.0, "parser:structured prediction")
        if self._speaking.get(run.root.id):
            waiting = self._waiting.setdefault(run.root.id, [])
            waiting.append(name)
            if len(waiting) > MOST:
                self._end(waiting.pop(0))
            if len(self._waiting) > MOST:
                root = next(iter(self._waiting))
                self._speaking.pop(root, None)
                for one in self._waiting.pop(root):
                    self._end(one)
        else:
            self._end(name)

    def _end(self, name: str) -> None:
        self._models.pop(name, None)
        self._routers.discard(name)
        self._streams.discard(name)
        with self._recorder.ending(name):
            pass


class _Spans(BaseSpanHandler[SimpleSpan]):
    """Tells the handler which span is within which: events do not say."""

    _handler: SignalEventHandler = PrivateAttr()

    def __init__(self, handler: SignalEventHandler) -> None:
        super().__init__()
        self._handler = handler

    @classmethod
    def class_name(cls) -> str:
        """Name of the handler."""
        return "SignalSpans"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **_: Any,
    ) -> SimpleSpan | None:
        """A span begins; there is nothing to keep open here."""
        self._handler.entered(id_, instance, parent_span_id, tags)
        return None

    def span_exit(self, id_: str, bound_args: inspect.BoundArguments, instance: Any = None, *_: Any, **__: Any) -> None:
        """A span ends."""
        self._handler.left(id_)

    def span_drop(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        err: BaseException | None = None,
        **_: Any,
    ) -> None:
        """A span ends by an error."""
        self._handler.left(id_, err or RuntimeError("the span was dropped"))

    def prepare_to_exit_span(self, *_: Any, **__: Any) -> SimpleSpan | None:
        """Nothing is kept open."""
        return None

    def prepare_to_drop_span(self, *_: Any, **__: Any) -> SimpleSpan | None:
        """Nothing is kept open."""
        return None


def shadow_tiers(models: Mapping[str, Any]) -> dict[str, Any]:
    """LLMs as the tiers of a `routenlp_plugins.Shadow`.

    Raises:
        PortfolioError: one is no LLM and no callable ``Call -> Completion``.
    """
    return {name: LLMTier.of(name, model) for name, model in models.items()}


def _requires(query: Query | None) -> frozenset[str]:
    return frozenset() if query is None else query.requires


def _method(name: str) -> str:
    """Of a span's id, such as ``OpenAI.chat-6c3a...``."""
    return name.partition(".")[2].partition("-")[0]
