"""`RouterMiddleware`: agents of LangChain whose model calls are routed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.constants import TAG_NOSTREAM
from langgraph.errors import GraphBubbleUp

from routenlp_plugins import (
    Answer,
    Call,
    Completion,
    Dispatcher,
    PortfolioError,
    Query,
    Release,
    Trace,
    call_settings,
)

from .messages import answer_of, query_of
from .place import TIER, Place
from .tiers import aerrors_of_tiers, errors_of_tiers

__all__ = ["RouterMiddleware"]

Request: TypeAlias = ModelRequest[Any]
Response: TypeAlias = ModelResponse[Any]


class RouterMiddleware(AgentMiddleware[Any, Any, Any]):
    """Each model call of an agent is answered by the cheapest tier that its release accepts.

    Each tier's call is a run of its own, so that usage is counted by the model that had it. Tokens of an attempt that
    may be rejected are not in message streams; its message comes whole if it is accepted. The decision is in
    ``response_metadata["routenlp"]`` of the answer. Middleware that this one wraps sees the model of each attempt: what
    belongs to one provider, such as its prompt cache, goes behind this one.

    Calls ask for ``tools``, and for ``structured output`` where the agent has a response format: tiers below the
    frontier answer where the task says that its calls require them.

    Args:
        tiers: name -> chat model; that of the frontier may be left out or None: it is the agent's own.
        release: a release, or the folder it was saved in.
        task: of every call; ``config["metadata"]["routenlp_task"]`` goes first.
        comparators, listeners: see `routenlp_plugins.Dispatcher`.

    Raises:
        PortfolioError: a tier is missing, unknown or no chat model, or the release does not know the task.
    """

    def __init__(
        self,
        tiers: Mapping[str, BaseChatModel | None],
        release: Release | str | Path,
        task: str | None = None,
        *,
        comparators: Mapping[str, Any] | None = None,
        listeners: tuple[Callable[[Trace], object], ...] = (),
    ) -> None:
        super().__init__()
        used = Release.given(release)
        frontier = used.portfolio.frontier
        for name, model in tiers.items():
            if not (isinstance(model, BaseChatModel) or (model is None and name == frontier)):
                raise PortfolioError(f"tiers: {name} must be a chat model, got {type(model).__name__}")
        used.check_task(task)
        named = {**tiers, frontier: tiers.get(frontier)}
        self.task = task
        self._dispatcher = Dispatcher(used, {n: _AgentTier(m) for n, m in named.items()}, comparators, listeners)

    def wrap_model_call(self, request: Request, handler: Callable[[Request], Response]) -> Response:
        """Answer a model call."""
        place = Place.around()
        with _passing(), errors_of_tiers(place):
            answer = self._dispatcher.run(self._query(request, handler))
        place.announce(answer.trace)
        return _response(answer)

    async def awrap_model_call(self, request: Request, handler: Callable[[Request], Awaitable[Response]]) -> Response:
        """As `wrap_model_call`, without blocking the event loop."""
        place = Place.around()
        with _passing():
            async with aerrors_of_tiers(place):
                answer = await self._dispatcher.arun(self._query(request, handler))
        await place.aannounce(answer.trace)
        return _response(answer)

    def _query(self, request: Request, handler: Callable[[Request], Any]) -> Query:
        messages: list[BaseMessage] = [*([request.system_message] if request.system_message else []), *request.messages]
        form, options = request.response_format, dict(request.model_settings)
        requires = {name for name, asked in (("tools", request.tools), ("structured output", form)) if asked}
        options["tools"] = [tool if isinstance(tool, dict) else convert_to_openai_tool(tool) for tool in request.tools]
        options["tool_choice"] = request.tool_choice
        if form is not None:
            options["response_format"] = [type(form).__name__, *_schemas(form)]
        task = (ensure_config().get("metadata") or {}).get("routenlp_task", self.task)
        return query_of(messages, task, frozenset(requires), call_settings(options), _AgentCall(request, handler))


@dataclass(frozen=True, slots=True)
class _AgentCall:
    """What the middleware was asked: the payload of its queries."""

    request: Request
    handler: Callable[[Request], Any]


@dataclass(frozen=True, slots=True)
class _AgentTier:
    """A chat model that answers by the agent's own way to call one; None is the agent's own."""

    model: BaseChatModel | None

    def __call__(self, call: Call) -> Completion:
        with _interrupts(), _attempt(call):
            return _completion(call.payload.handler(self._request(call)))

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        with _interrupts(), _attempt(call):
            return _completion(await call.payload.handler(self._request(call)))

    def _request(self, call: Call) -> Request:
        request: Request = call.payload.request
        return request if self.model is None else request.override(model=self.model)


@contextmanager
def _attempt(call: Call) -> Iterator[None]:
    """Runs within it are those of an attempt; of one that may be passed over message streams have no token."""
    config = ensure_config()
    tags = [*(config.get("tags") or ()), *([TAG_NOSTREAM] if call.may_be_passed_over else [])]
    metadata = {**(config.get("metadata") or {}), TIER: call.tier}
    token = var_child_runnable_config.set({**config, "tags": tags, "metadata": metadata})
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


class _Interrupted(BaseException):
    """An interrupt of the graph on its way through the core, which takes errors of tiers for attempts that failed."""

    def __init__(self, interrupt: GraphBubbleUp) -> None:
        super().__init__(interrupt)
        self.interrupt = interrupt


@contextmanager
def _interrupts() -> Iterator[None]:
    try:
        yield
    except GraphBubbleUp as interrupt:
        raise _Interrupted(interrupt) from interrupt


@contextmanager
def _passing() -> Iterator[None]:
    """Lets interrupts out of the core as they came in."""
    try:
        yield
    except _Interrupted as passing:
        raise passing.interrupt from None


def _completion(response: Response) -> Completion:
    message = next((one for one in reversed(response.result) if isinstance(one, AIMessage)), None)
    if message is None:
        raise TypeError("the model's answer is no AIMessage")
    completion = replace(answer_of(message), payload=response)
    # an agent tells the model of a structured answer that does not parse, and asks again
    if response.structured_response is None and any(isinstance(one, ToolMessage) for one in response.result):
        completion = replace(completion, scores={**completion.scores, "valid": 0.0})
    return completion


def _schemas(form: Any) -> list[Any]:
    """Of a response format, of one kind or of several."""
    if not isinstance(form, ToolStrategy | ProviderStrategy):
        form = ToolStrategy(getattr(form, "schema", form))
    specs = form.schema_specs if isinstance(form, ToolStrategy) else [form.schema_spec]
    return [spec.json_schema for spec in specs]


def _response(answer: Answer) -> Response:
    """The accepted answer, which tells the decision."""
    response: Response = answer.payload
    told = answer.trace.as_dict()
    last = max(place for place, one in enumerate(response.result) if isinstance(one, AIMessage))
    metadata = {**response.result[last].response_metadata, "routenlp": told}
    message = response.result[last].model_copy(update={"response_metadata": metadata})
    result = [message if place == last else one for place, one in enumerate(response.result)]
    return ModelResponse(result=result, structured_response=response.structured_response)
