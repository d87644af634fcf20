"""Listens to a chain that runs already, and keeps what it did."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ValidationError

from routenlp_plugins import (
    Attempt,
    Call,
    Completion,
    Portfolio,
    PortfolioError,
    Query,
    Shadow,
    Tier,
    TierError,
    Trace,
    TraceStore,
    beyond_text,
    call_settings,
    received,
)

from .messages import completion_of, query_of
from .place import DECISION
from .runs import Failure, Run, Runs, key
from .tiers import LangChainTier, ModelCall

__all__ = ["SignalCallbackHandler", "shadow_tiers"]

logger = logging.getLogger(__name__)

_NO_SIGN = {"StrOutputParser"}
"""Parsers that take anything."""


class SignalCallbackHandler(BaseCallbackHandler):
    """Keeps every call of a model in a trace store, and what the chain itself tells of its quality.

    Attach it to any chain: ``chain.invoke(input, {"callbacks": [handler]})``. Nothing is routed, and no request waits.
    Each call of a model is a trace, with failed attempts at the same messages before it; it is found by the run id
    of the call and by those of all runs around it: ``store.signal(run_id, "thumbs", 1)``. What parsers, validators,
    tools and repeated questions say becomes signals by itself. Behind a `RouterChatModel` the whole decision is kept.

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
        self.store = store
        self.shadow = shadow
        self.portfolio = portfolio
        self.tiers = dict(tiers or {})
        if portfolio is not None:
            for name in self.tiers.values():
                portfolio.tier(name)
        self.task = task or (portfolio.tasks[0].name if portfolio and len(portfolio.tasks) == 1 else "default")
        self._runs = Runs()
        self._strange: set[str] = set()
        self._tasks = {self.task, *(one.name for one in portfolio.tasks)} if portfolio is not None else set[str]()

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
        run = self._runs.begin(run_id, parent_run_id, _name(serialized, facts), metadata)
        run.parses = facts.get("run_type") == "parser" and run.name not in _NO_SIGN

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """A parser that could read the answer says so; so do structured outputs that keep the raw answer."""
        with self._ending(run_id) as run:
            if run is not None:
                if run.parses:
                    self._says(run, "parser", 1.0, f"parser:{run.name}")
                elif isinstance(outputs, dict) and {"raw", "parsed", "parsing_error"} <= outputs.keys():
                    self._says(run, "parser", float(outputs["parsing_error"] is None), "parser:structured output")

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """An answer that could not be read, or was not valid, speaks against it."""
        with self._ending(run_id) as run:
            if run is not None and not any(known is error for known in run.root.errors):
                run.root.errors.append(error)
                if isinstance(error, OutputParserException):
                    self._says(run, "parser", 0.0, f"parser:{run.name}")
                elif isinstance(error, ValidationError):
                    self._says(run, "validator", 0.0, f"validator:{error.title}")

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
        self._runs.begin(run_id, parent_run_id, _name(serialized, facts), metadata)

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """A tool that worked speaks for the answer that called it, and one whose message is an error against it."""
        with self._ending(run_id) as run:
            if run is not None:
                self._says(run, "tool", float(getattr(output, "status", "success") != "error"), f"tool:{run.name}")

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """A tool that failed speaks against the answer that called it."""
        with self._ending(run_id) as run:
            if run is not None and type(error).__name__ not in ("GraphInterrupt", "GraphBubbleUp", "ParentCommand"):
                self._says(run, "tool", 0.0, f"tool:{run.name}")

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
        self._runs.begin(run_id, parent_run_id, _name(serialized, facts), metadata)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **_: Any) -> None:
        """Forget the run."""
        self._end(self._runs.get(run_id))

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Forget the run."""
        self._end(self._runs.get(run_id))

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
        run = self._runs.begin(run_id, parent_run_id, _name(serialized, facts), metadata)
        told = {**_beyond(invocation_params or {}), **(options or {})}
        call = ModelCall(list(messages[0]), told.get("stop"), *_tools(told))
        self._asked(run, query_of(messages[0], self._task(run), beyond_text(told), call_settings(told), call))

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
        run = self._runs.begin(run_id, parent_run_id, _name(serialized, facts), metadata)
        self._asked(run, Query(prompts[0] if prompts else "", task=self._task(run)))

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **_: Any) -> None:
        """Keep the decision of a router."""
        run = self._runs.get(run_id)
        if run is not None and name == DECISION and isinstance(data, dict) and isinstance(data.get("trace"), Trace):
            run.decided = data["trace"]

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        """Record the trace of the call."""
        with self._ending(run_id) as run:
            if run is not None and run.query is not None:
                self._heard(run, run.query, _completion(response))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Keep the failure; it belongs to the next attempt at the same messages."""
        with self._ending(run_id) as run:
            if run is not None and run.query is not None:
                failure = error if isinstance(error, Exception) else TierError(type(error).__name__, "")
                self._failed(run, run.query, self._attempt(run, run.query, failure, accepted=False))

    # what is made of it

    def _heard(self, run: Run, query: Query, answer: Completion | None) -> None:
        if run.decided is not None:
            self._record(run, query, run.decided.attempts)
        elif answer is not None:
            self._record(run, query, (self._attempt(run, query, answer, accepted=True),))
        else:
            self._failed(run, query, Attempt(self._tier(run, None).name, False, error="no answer"))

    @contextmanager
    def _ending(self, run_id: UUID) -> Iterator[Run | None]:
        """The run, which is forgotten whatever becomes of what is kept of it."""
        run = self._runs.get(run_id)
        try:
            yield run
        finally:
            self._end(run)

    def _end(self, run: Run | None) -> None:
        if run is None:
            return
        for failures in self._runs.end(run.id):
            last, query, _ = failures[-1]
            attempts = tuple(attempt for *_, attempt in failures)
            trace = Trace(query, query.task, attempts, "every call of the model failed")
            self._write(str(last), run, trace, failures[:-1])

    def _asked(self, run: Run, query: Query) -> None:
        run.query = query
        before = run.root.answered.get(key(query))
        if before is not None:
            # what is asked again was not answered well
            self.store.signal(before, "retry", 0.0, "asked again")

    def _attempt(self, run: Run, query: Query, answer: Completion | Exception, *, accepted: bool) -> Attempt:
        tier = self._tier(run, answer.model if isinstance(answer, Completion) else None)
        try:
            if isinstance(answer, Completion):
                answer = replace(answer, latency_ms=(perf_counter() - run.began) * 1e3)
            completion = received(tier, Call(tier.name, query), answer)
        except TierError as error:
            return Attempt(tier.name, False, error=str(error))
        return Attempt(tier.name, accepted, completion=completion)

    def _tier(self, run: Run, model: str | None) -> Tier:
        known = [
            name for name in (model, run.metadata.get("ls_model_name"), run.name) if isinstance(name, str) and name
        ]
        name = next((self.tiers[one] for one in known if one in self.tiers), None)
        if self.portfolio is None:
            return Tier(name or next(iter(known), "model"))
        if name is not None:
            return self.portfolio.tier(name)
        found = self.portfolio.tier_of_model(*known)
        if found is None and known and known[0] not in self._strange:
            self._strange.add(known[0])
            logger.warning("%s is taken for %s; name its tier in tiers=", known[0], self.portfolio.frontier)
        return found or self.portfolio.tier(self.portfolio.frontier)

    def _failed(self, run: Run, query: Query, attempt: Attempt) -> None:
        with self._runs.lock:
            run.root.failed.setdefault(key(query), []).append((run.id, replace(query, payload=None), attempt))

    def _record(self, run: Run, query: Query, attempts: Sequence[Attempt]) -> None:
        with self._runs.lock:
            failures = run.root.failed.pop(key(query), [])
            run.root.answered[key(query)] = run.root.last = run.last = str(run.id)
        whole = (*(attempt for *_, attempt in failures), *attempts)
        if run.decided is not None:
            decided = replace(run.decided, query=replace(run.decided.query, payload=None), attempts=whole)
            # under its own name: whoever else keeps the decision does so too
            self._write(decided.id, run, decided, failures, "served")
            return
        self._write(str(run.id), run, Trace(replace(query, payload=None), query.task, whole, "collected"), failures)
        # what needs more than its task has is not what a release is fitted for, and of a response format nobody knows
        # how another model would be asked for it
        covered = () if self.portfolio is None else self.portfolio.task(query.task or "").requires
        if self.shadow is not None and query.requires <= {"tools"}.intersection(covered):
            self.shadow.offer(str(run.id), query, {attempt.tier for attempt in whole if attempt.error is None})

    def _write(self, name: str, run: Run, trace: Trace, failures: Sequence[Failure], origin: str = "collected") -> None:
        known: dict[str, int | None] = {str(one): place for place, (one, *_) in enumerate(failures)}
        known |= {str(one): None for one in (run.id, *self._runs.above(run)) if str(one) != name}
        self.store.record(trace, name, runs=known, unit=run.unit, origin=origin, at=run.at)

    def _says(self, run: Run, kind: str, value: float, source: str) -> None:
        about = self._runs.answered_before(run)
        if about is None:
            return
        # an answer may call one tool twice: that one call failed speaks against it whatever the other did
        key = (about, kind, source[:256])
        worst = run.root.worst[key] = min(value, run.root.worst.get(key, 1.0))
        self.store.signal(*key[:2], worst, key[2])

    def _task(self, run: Run) -> str:
        task = run.metadata.get("routenlp_task", self.task)
        if not isinstance(task, str) or not task:
            raise PortfolioError(f"routenlp_task must be the name of a task, got {task!r}")
        if self.portfolio is not None and task not in self._tasks:
            self._tasks.add(task)
            logger.warning("task %r is none of the portfolio's: no release will be fitted for it", task)
        return task


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
    return {name: params[name] for name in (*sorted(asked), "tool_choice") if name in params}


def _tools(told: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Tools of a call in no provider's form, so that other models can bind them in theirs; without any ({}, None)."""
    tools = told.get("tools")
    if not isinstance(tools, list) or not tools:
        return {}, None
    choice = {} if told.get("tool_choice") is None else {"tool_choice": told["tool_choice"]}
    return {"tools": [convert_to_openai_tool(tool) for tool in tools], **choice}, {}


def _completion(response: LLMResult) -> Completion | None:
    """The first answer, if there is one; what calls tools instead of saying something is one too."""
    generation = next((one for some in response.generations for one in some), None)
    if generation is None:
        return None
    message = generation.message if isinstance(generation, ChatGeneration) else None
    if isinstance(message, AIMessage):
        return replace(completion_of(message), payload=None)
    return Completion(generation.text)
