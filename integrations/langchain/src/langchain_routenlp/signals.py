"""Listens to a chain that runs already, and keeps what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ValidationError

from routenlp_plugins import (
    Completion,
    Portfolio,
    Query,
    Recorder,
    Shadow,
    Trace,
    TraceStore,
    beyond_text,
    call_settings,
)

from .messages import completion_of, query_of
from .place import DECISION, TIER
from .tiers import LangChainTier, ModelCall

__all__ = ["SignalCallbackHandler", "shadow_tiers"]

_NO_SIGN = {"StrOutputParser"}
"""Parsers that take anything."""


class SignalCallbackHandler(BaseCallbackHandler):
    """Keeps every call of a model in a trace store, and what the chain itself tells of its quality.

    Attach it to any chain: ``chain.invoke(input, {"callbacks": [handler]})``. Nothing is routed, and no request waits.
    Each call of a model is a trace, with failed attempts at the same messages before it; it is found by the run id
    of the call and by those of all runs around it: ``store.signal(run_id, "thumbs", 1)``. What parsers, validators,
    tools and repeated questions say becomes signals by itself. Behind a router the whole decision is kept, and what is
    said within an attempt says nothing.

    The task is ``config["metadata"]["routenlp_task"]``, else `task`. Calls under one root run belong together, and so
    do those of one ``thread_id`` or ``session_id`` in the metadata.

    LangChain tells handlers of ``stop`` and ``response_format``, not of other options that are bound to a model, such
    as ``temperature``: outcomes of such a chain certify another prompt than the router meets, which stays on the
    frontier and says so. Set them on the model itself.

    Args:
        store: what keeps it; flushing and closing it is the caller's.
        portfolio: prices the calls; without one their cost is unknown.
        tiers: name of a model, as its provider knows it -> name of the tier. Other models are the tiers of their own
            names, dated versions included, else the portfolio's frontier.
        task: of all calls that name none.
        shadow: puts a share of what was answered to other tiers too, in the background; its tiers are those of
            `shadow_tiers`.

    Raises:
        PortfolioError: `tiers` names one that the portfolio does not have.
    """

    run_inline = True

    def __init__(
        self,
        store: TraceStore,
        *,
        portfolio: Portfolio | None = None,
        tiers: Mapping[str, str] | None = None,
        task: str | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self._recorder = Recorder(store, portfolio, tiers, task, shadow)

    # runs of any kind

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Remember where the run belongs."""
        run = self._recorder.begin(run_id, parent_run_id, _name(serialized, facts), metadata)
        run.parses = facts.get("run_type") == "parser" and run.name not in _NO_SIGN

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """A parser that could read the answer says so; so do structured outputs that keep the raw answer."""
        with self._recorder.ending(run_id) as run:
            if run is not None:
                if run.parses:
                    self._recorder.says(run, "parser", 1.0, f"parser:{run.name}")
                elif isinstance(outputs, dict) and {"raw", "parsed", "parsing_error"} <= outputs.keys():
                    self._recorder.says(
                        run, "parser", float(outputs["parsing_error"] is None), "parser:structured output"
                    )

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """An answer that could not be read, or was not valid, speaks against it."""
        with self._recorder.ending(run_id) as run:
            if run is not None and not any(known is error for known in run.root.errors):
                run.root.errors.append(error)
                if isinstance(error, OutputParserException):
                    self._recorder.says(run, "parser", 0.0, f"parser:{run.name}")
                elif isinstance(error, ValidationError):
                    self._recorder.says(run, "validator", 0.0, f"validator:{error.title}")

    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Remember where the run belongs."""
        self._recorder.begin(run_id, parent_run_id, _name(serialized, facts), metadata)

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """A tool that worked speaks for the answer that called it, and one whose message is an error against it."""
        with self._recorder.ending(run_id) as run:
            if run is not None:
                self._recorder.says(
                    run, "tool", float(getattr(output, "status", "success") != "error"), f"tool:{run.name}"
                )

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """A tool that failed speaks against the answer that called it."""
        with self._recorder.ending(run_id) as run:
            if run is not None and type(error).__name__ not in ("GraphInterrupt", "GraphBubbleUp", "ParentCommand"):
                self._recorder.says(run, "tool", 0.0, f"tool:{run.name}")

    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Remember where the run belongs."""
        self._recorder.begin(run_id, parent_run_id, _name(serialized, facts), metadata)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **_: Any) -> None:
        """Forget the run."""
        with self._recorder.ending(run_id):
            pass

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Forget the run."""
        with self._recorder.ending(run_id):
            pass

    # calls of models

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        invocation_params: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Keep what was asked."""
        run = self._recorder.begin(run_id, parent_run_id, _name(serialized, facts), metadata)
        if TIER in run.metadata:
            # an attempt is part of a decision
            return
        told = {**_beyond(invocation_params or {}), **(options or {})}
        call = ModelCall(list(messages[0]), told.get("stop"), *_tools(told))
        task = self._recorder.task_of(run)
        self._recorder.asked(run, query_of(messages[0], task, beyond_text(told), call_settings(told), call))

    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Keep what was asked of a model that completes text."""
        run = self._recorder.begin(run_id, parent_run_id, _name(serialized, facts), metadata)
        if TIER not in run.metadata:
            self._recorder.asked(run, Query(prompts[0] if prompts else "", task=self._recorder.task_of(run)))

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **_: Any) -> None:
        """Keep the decision of a router."""
        run = self._recorder.get(run_id)
        trace = data.get("trace") if name == DECISION and isinstance(data, dict) else None
        if run is None or TIER in run.metadata or not isinstance(trace, Trace):
            return
        if run.query is None or run.decided is not None:
            # of a router over whole chains, or of an agent's, which may be asked several times
            self._recorder.decided(run, trace)
        else:
            run.decided = trace

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        """Record the trace of the call."""
        with self._recorder.ending(run_id) as run:
            if run is None:
                return
            if run.decided is None and _cached(response):
                # it was kept when it was made, which what is said of it is about
                self._recorder.known(run, _decision(response))
            else:
                self._recorder.heard(run, _completion(response))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Keep the failure; it belongs to the next attempt at the same messages."""
        with self._recorder.ending(run_id) as run:
            if run is None:
                return
            if run.decided is None:
                self._recorder.failed(run, error)
            else:
                # who gave up on a router is known to it, with the tiers that were asked
                self._recorder.heard(run, None)


def shadow_tiers(models: Mapping[str, Any]) -> dict[str, Any]:
    """Chat models, or bindings of them, as the tiers of a `routenlp_plugins.Shadow`.

    Raises:
        PortfolioError: one is no chat model and no callable ``Call -> Completion``.
    """
    return {name: LangChainTier.of(name, model) for name, model in models.items()}


def _name(serialized: dict[str, Any] | None, facts: Mapping[str, Any]) -> str:
    return str(facts.get("name") or (serialized or {}).get("name") or "run")


def _beyond(params: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for beyond text: LangChain tells it among the model's own parameters only."""
    asked = {name for name, value in params.items() if beyond_text({name: value})} - {"model", "model_name"}
    return {name: params[name] for name in (*sorted(asked), "tool_choice", "parallel_tool_calls") if name in params}


def _tools(told: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Tools of a call in no provider's form, so that other models can bind them in theirs; without any ({}, None)."""
    tools = told.get("tools")
    if not isinstance(tools, list) or not tools:
        return {}, None
    choice = {} if told.get("tool_choice") is None else {"tool_choice": told["tool_choice"]}
    return {"tools": [convert_to_openai_tool(tool) for tool in tools], **choice}, {}


def _message(response: LLMResult) -> AIMessage | None:
    generation = next((one for some in response.generations for one in some), None)
    message = generation.message if isinstance(generation, ChatGeneration) else None
    return message if isinstance(message, AIMessage) else None


def _cached(response: LLMResult) -> bool:
    """Whether it is from a cache: LangChain says of such answers that they cost nothing."""
    message = _message(response)
    usage: Any = None if message is None else message.usage_metadata
    return bool(usage) and usage.get("total_cost") == 0


def _decision(response: LLMResult) -> str | None:
    """Id of the decision that made it, if a router did."""
    message = _message(response)
    told = None if message is None else message.response_metadata.get("routenlp")
    return told.get("id") if isinstance(told, dict) else None


def _completion(response: LLMResult) -> Completion | None:
    """The first answer, if there is one; what calls tools instead of saying something is one too."""
    generation = next((one for some in response.generations for one in some), None)
    if generation is None:
        return None
    message = generation.message if isinstance(generation, ChatGeneration) else None
    if isinstance(message, AIMessage):
        return replace(completion_of(message), payload=None)
    return Completion(generation.text)
