"""`RouterChatModel`: a chat model that is several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from routenlp_plugins import (
    Answer,
    Auditable,
    Auditor,
    Dispatcher,
    PortfolioError,
    Query,
    Release,
    WrappingTier,
    beyond_text,
    call_settings,
)

from .chunks import Chunks
from .messages import answer_message, query_of
from .place import Place, PlacedChatModel
from .profile import intersection
from .structured import Structured, parsed
from .tiers import LangChainTier, ModelCall, aerrors_of_tiers, errors_of_tiers

__all__ = ["RouterChatModel"]

_SAMPLING = ("temperature", "max_tokens")
_OF_THE_TIERS = {"timeout", "max_retries", "api_key", "streaming"}
_STRUCTURED, _TOOL_OPTIONS = "routenlp_structured", "routenlp_tool_options"
"""Comes with tools that were bound to the router and are in no provider's form yet: what else they were bound with."""


class RouterChatModel(Auditable, PlacedChatModel):
    """Answers each query with the cheapest tier its release accepts.

    The whole cascade is one run: handlers see one start and one end, and usage is the sum of all attempts. The
    decision is in ``response_metadata["routenlp"]``. Streams come word by word where nothing can reject the answer any
    more, and else in one piece: see `routenlp_plugins.Dispatcher.stream`.

    Args:
        tiers: name -> chat model (or a binding of one), a `ScoredTier` or the like around one, or any core tier
            ``Call -> Completion``.
        release: a release, or the folder it was saved in.
        comparators: your own, by the names that tasks of the portfolio give them.
        listeners: see `routenlp_plugins.Dispatcher`.
        task: the task of every call; a call's own ``config["metadata"]["routenlp_task"]`` goes first. May be left
            out if the release knows one task only.
        auditor: what watches it, see `audited`; None.
        temperature, max_tokens, stop: passed on to the tiers that are LangChain models; None leaves them as they are.

    ``timeout``, ``max_retries``, ``api_key`` and ``streaming``, which other chat models take, belong to the tiers and
    do nothing here.

    Raises:
        PortfolioError: a tier is missing or unknown, or the release does not know the task.
        ReleaseError: the release cannot be used.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    tiers: Mapping[str, Any] = Field(exclude=True)
    release: Any = Field(exclude=True)  # a Release: pydantic cannot describe a dataclass of arrays
    comparators: Mapping[str, Any] | None = Field(default=None, exclude=True)
    listeners: tuple[Any, ...] = Field(default=(), exclude=True)
    task: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    auditor: Any = Field(default=None, exclude=True, repr=False)
    _built: tuple[tuple[Any, ...], Dispatcher] | None = PrivateAttr(None)
    _digested: tuple[Any, str] | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(values) - set(cls.model_fields) - _OF_THE_TIERS)
        if unknown:
            raise ValueError(f"unknown argument {', '.join(unknown)}; known: {', '.join(cls.model_fields)}")
        return values

    @field_validator("release", mode="before")
    @classmethod
    def _load(cls, release: object) -> Release:
        if isinstance(release, Release):
            return release
        if isinstance(release, str | Path):
            return Release.load(release)
        raise ValueError(f"expected a Release or the path of its folder, got {type(release).__name__}")

    def model_post_init(self, context: Any, /) -> None:
        """Check the tiers against the release now, not at the first call."""
        super().model_post_init(context)
        self._dispatcher  # noqa: B018
        self.release.check_task(self.task)

    @property
    def _dispatcher(self) -> Dispatcher:
        # made again for a copy with other tiers or another release
        given = (self.release, self.tiers, self.comparators, self.listeners)
        if self._built is None or any(one is not before for one, before in zip(given, self._built[0], strict=True)):
            tiers = {name: LangChainTier.of(name, tier) for name, tier in self.tiers.items()}
            self._built = (given, Dispatcher(self.release, tiers, self.comparators, self.listeners))
        return self._built[1]

    def get_token_ids(self, text: str) -> list[int]:
        """As the frontier counts, where it is a LangChain model."""
        model = self._frontier_model
        return super().get_token_ids(text) if model is None else model.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """As the frontier counts, where it is a LangChain model."""
        model = self._frontier_model
        return super().get_num_tokens(text) if model is None else model.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """As the frontier counts, where it is a LangChain model."""
        model = self._frontier_model
        if model is None:
            return super().get_num_tokens_from_messages(messages, tools)
        return model.get_num_tokens_from_messages(messages, tools)

    @property
    def _frontier_model(self) -> BaseChatModel | None:
        return self._models[self.release.portfolio.frontier]

    @property
    def _models(self) -> dict[str, BaseChatModel | None]:
        """Tier -> its chat model; None for one that is a plain callable."""
        inner = {name: WrappingTier.innermost(tier) for name, tier in self._dispatcher.tiers.items()}
        return {name: tier.model if isinstance(tier, LangChainTier) else None for name, tier in inner.items()}

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What all tiers can do; nothing is known of a plain callable."""
        profiles = [dict(model.profile or {}) if model else {} for model in self._models.values()]
        return cast("ModelProfile", intersection(profiles)) or None

    @property
    def _llm_type(self) -> str:
        return "routenlp-router"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"tiers": list(self.tiers), "task": self.task, "release": self._digest}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of caches: what an answer depends on beside the messages, such as task and release."""
        own = ("temperature", "max_tokens", "stop")
        told = {
            "task": self._place.metadata.get("routenlp_task", self.task),
            "expired": sorted(self.expired),
            "options": {name: getattr(self, name) for name in own},
            "comparators": sorted(self.comparators or ()),
            "tiers": {name: _tier_string(tier) for name, tier in self._dispatcher.tiers.items()},
        }
        return f"{told} {super()._get_llm_string(stop, **kwargs)}"

    @property
    def _digest(self) -> str:
        """Of the release; that of one object is always the same."""
        if self._digested is None or self._digested[0] is not self.release:
            self._digested = self.release, self.release.digest
        return self._digested[1]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="routenlp",
            ls_model_name=kwargs.get("model") or "routenlp-router",
            ls_model_type="chat",
        )
        for name in _SAMPLING:
            value = kwargs.get(name, getattr(self, name))
            if value is not None:
                params[f"ls_{name}"] = value  # type: ignore[literal-required]
        if stop or self.stop:
            params["ls_stop"] = stop or self.stop
        return params

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools, which each tier binds in its own way.

        Tiers below the frontier answer where the task says that its calls require ``tools``.
        """
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        neutral = [convert_to_openai_tool(tool, strict=kwargs.get("strict")) for tool in tools]
        tracing = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("ls_")}
        return self.bind(tools=neutral, **{_TOOL_OPTIONS: kwargs}, **choice, **tracing)

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """The answer as an instance of a schema, for which each tier asks in its own way.

        Tiers below the frontier answer where the task says that its calls require ``structured output``, and an answer
        of theirs that does not parse is not returned.

        Args:
            include_raw, kwargs: as the tiers' own method takes them, such as ``method`` and ``strict``.

        Raises:
            PortfolioError: the frontier is no LangChain model.
        """
        structured = Structured.of(self._models, self.release.portfolio.frontier, schema, kwargs)
        told = {"kwargs": kwargs, "schema": schema}
        bound = self.bind(**{_STRUCTURED: structured}, ls_structured_output_format=told)
        return parsed(bound, structured, include_raw=include_raw)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        place = Place.of(run_manager)
        query, dispatcher = self._prepare(messages, stop, place, kwargs)
        with errors_of_tiers(place, dispatcher):
            answer = self._answered_by(dispatcher).run(query)
        place.announce(answer.trace)
        return _result(answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        place = Place.of(run_manager)
        query, dispatcher = self._prepare(messages, stop, place, kwargs)
        async with aerrors_of_tiers(place, dispatcher):
            answer = await self._answered_by(dispatcher).arun(query)
        await place.aannounce(answer.trace)
        return _result(answer)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        place = Place.of(run_manager) if run_manager else self._place
        query, dispatcher = self._prepare(messages, stop, place, kwargs)
        chunks = Chunks()
        with errors_of_tiers(place, dispatcher), closing(self._answered_by(dispatcher).stream(query)) as parts:
            for part in parts:
                if isinstance(part, Answer):
                    place.announce(part.trace)
                    yield chunks.last(part)
                else:
                    yield chunks.of(part)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        place = Place.of(run_manager) if run_manager else self._place
        query, dispatcher = self._prepare(messages, stop, place, kwargs)
        chunks = Chunks()
        answering = self._answered_by(dispatcher)
        async with aerrors_of_tiers(place, dispatcher), aclosing(answering.astream(query)) as parts:
            async for part in parts:
                if isinstance(part, Answer):
                    await place.aannounce(part.trace)
                    yield chunks.last(part)
                else:
                    yield chunks.of(part)

    def _answered_by(self, dispatcher: Dispatcher) -> Dispatcher | Auditor:
        # what is pinned to a tier says nothing about the policy
        return self._answering if dispatcher is self._dispatcher else dispatcher

    def _prepare(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        place: Place,
        kwargs: dict[str, Any],
    ) -> tuple[Query, Dispatcher]:
        """The query of a call, and who answers it: ``model=NAME`` pins a tier, or is the frontier's to understand."""
        pinned: str | None = kwargs.get("model")
        options = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        options |= {name: value for name, value in kwargs.items() if name != "model" or pinned not in self.tiers}
        tool_options, structured = options.pop(_TOOL_OPTIONS, None), options.pop(_STRUCTURED, None)
        if not options.get("tools"):
            options = {name: value for name, value in options.items() if name not in ("tools", "tool_choice")}
            tool_options = None
        asked = {} if structured is None else {"response_format": structured.schema}
        requires = beyond_text({**options, **asked})
        task = place.metadata.get("routenlp_task", self.task)
        call = ModelCall(messages, self.stop if stop is None else stop, options, tool_options, structured)
        settings = call_settings({**options, **(tool_options or {}), **asked, "stop": call.stop})
        query = query_of(messages, task, requires, settings, call)
        dispatcher = self._dispatcher
        if pinned is not None and pinned in self.tiers:
            dispatcher = dispatcher.pinned(pinned)
            pinned = None
        frontier = dispatcher.release.portfolio.frontier
        if isinstance(WrappingTier.innermost(dispatcher.tiers[frontier]), LangChainTier):
            return query, dispatcher
        if pinned is not None:
            raise PortfolioError(f"model={pinned!r} is not a tier; tiers: {', '.join(self.tiers)}")
        if query.requires:
            raise PortfolioError(
                f"tier {frontier!r} is a plain callable, and the call needs {', '.join(sorted(query.requires))}: "
                "give a chat model for it"
            )
        return query, dispatcher


def _tier_string(tier: Any) -> str:
    """What a tier's answers depend on, as far as it says: a plain callable is known by its name."""
    if isinstance(tier, WrappingTier):
        return f"{type(tier).__name__} {_tier_string(tier.tier)}"
    if isinstance(tier, LangChainTier):
        return tier.model._get_llm_string(**tier.options)
    return f"{type(tier).__module__}.{getattr(tier, '__qualname__', type(tier).__qualname__)}"


def _result(answer: Answer) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=answer_message(answer))])
