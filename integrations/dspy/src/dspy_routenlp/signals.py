"""Listens to programs that run already, and keeps what they did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
from dspy.lm15 import LM15Error, Request, Response, request_from_openai_chat
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback

from routenlp_plugins import (
    Completion,
    Portfolio,
    Query,
    Recorder,
    Shadow,
    TraceStore,
    call_settings,
    chat_query,
)

from .engine import RouterEngine
from .messages import TASK, completion_of, query_of
from .module import RouterModule
from .programs import completion_of_entry
from .telling import told
from .tiers import OUTER, LMTier, provider_of

__all__ = ["SignalCallback", "shadow_tiers"]

_METADATA = (TASK, "routenlp_unit", "thread_id", "session_id")


class SignalCallback(BaseCallback):  # type: ignore[misc]
    """Keeps every call of a language model in a trace store, and what the program tells of its quality.

    ``dspy.configure(callbacks=[SignalCallback(store)])``. Nothing is routed, and no request waits. Each call is a
    trace, found by DSPy's ids of the call and of all calls around it. What adapters could parse, which tools failed and
    what was asked again becomes signals by itself. Behind a `RouterEngine` or `RouterModule` the whole decision is
    kept, and the calls within it are no traces of their own.

    The task is ``dspy.context(routenlp_task=...)``, else `task`. Calls under one outermost module belong together, and
    so do those under one ``routenlp_unit``, ``thread_id`` or ``session_id`` of the context.

    Tokens, models and log-probabilities are those of DSPy's history: with ``disable_history=True`` they are unknown.

    Args:
        store: what keeps it; flushing and closing it is the caller's.
        portfolio: prices the calls; without one their cost is unknown.
        tiers: name of a model, without its provider -> name of the tier; see `routenlp_plugins.Recorder`.
        task: of all calls that name none.
        shadow: puts a share of what was answered to other tiers too, in the background; its tiers are those of
            `shadow_tiers`.
        demonstrations: as the `RouterEngine` will have it, for which outcomes are collected.

    Raises:
        PortfolioError: `tiers` names one that the portfolio does not have.
    """

    def __init__(
        self,
        store: TraceStore,
        *,
        portfolio: Portfolio | None = None,
        tiers: Mapping[str, str] | None = None,
        task: str | None = None,
        shadow: Shadow | None = None,
        demonstrations: bool = True,
    ) -> None:
        self.demonstrations = demonstrations
        self._recorder = Recorder(store, portfolio, tiers, task, shadow)
        self._models: dict[str, dspy.BaseLM] = {}
        self._routed: set[str] = set()
        self._many: set[str] = set()

    # programs

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember where the call belongs."""
        run = self._begin(call_id, instance)
        if isinstance(instance, RouterModule) and not self._within_routed(run):
            self._routed.add(call_id)
            told()

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Keep the decision of a router over programs."""
        with self._recorder.ending(call_id) as run:
            if call_id in self._routed:
                self._routed.discard(call_id)
                if run is not None and (trace := told()) is not None:
                    self._recorder.decided(run, trace)

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """What an evaluation calls does not belong together."""
        self._many.add(call_id)

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Forget it."""
        self._many.discard(call_id)

    def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """What an optimiser calls does not belong together."""
        self._many.add(call_id)

    def on_compile_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Forget it."""
        self._many.discard(call_id)

    # language models

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Keep what was asked."""
        run = self._begin(call_id, instance, instance.model.partition("/")[2] or instance.model)
        if self._within_routed(run):
            return
        self._models[call_id] = instance
        told()
        self._recorder.asked(run, _query(instance, inputs, self._recorder.task_of(run), self.demonstrations))

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Record the trace of the call."""
        lm = self._models.pop(call_id, None)
        with self._recorder.ending(call_id) as run:
            if run is None or lm is None:
                return
            routed = isinstance(getattr(lm, "engine", None), RouterEngine)
            run.decided = told() if routed else None
            if run.decided is not None:
                self._recorder.heard(run, None)
            elif exception is not None:
                self._recorder.failed(run, exception)
            elif not routed:
                self._recorder.heard(run, _completion(lm, outputs))
            # else it is from a cache, and was kept when it was made

    # what tells of their answers

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember where the call belongs."""
        self._begin(call_id, instance)

    def on_adapter_parse_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """An answer that could be read says so, and one that could not speaks against itself."""
        with self._recorder.ending(call_id) as run:
            if run is not None:
                self._recorder.says(run, "parser", float(exception is None), f"parser:{run.name}")

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember where the call belongs."""
        self._begin(call_id, instance, getattr(instance, "name", None))

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """A tool that failed speaks against the answer that called it."""
        with self._recorder.ending(call_id) as run:
            if run is not None:
                self._recorder.says(run, "tool", float(exception is None), f"tool:{run.name}")

    def _within_routed(self, run: Any) -> bool:
        return any(above in self._routed for above in self._recorder.runs.above(run))

    def _begin(self, call_id: str, instance: Any, name: str | None = None) -> Any:
        parent = ACTIVE_CALL_ID.get()
        settings = dspy.settings
        metadata = {key: value for key in _METADATA if (value := settings.get(key)) is not None}
        return self._recorder.begin(
            call_id, None if parent in self._many else parent, name or type(instance).__name__, metadata
        )


def shadow_tiers(models: Mapping[str, Any]) -> dict[str, Any]:
    """Language models as the tiers of a `routenlp_plugins.Shadow`.

    Raises:
        PortfolioError: one is no `dspy.LM` and no callable ``Call -> Completion``.
    """
    return {name: LMTier.of(name, model) for name, model in models.items()}


def _query(lm: dspy.BaseLM, inputs: Mapping[str, Any], task: str, demonstrations: bool) -> Query:
    """As a `RouterEngine` in the place of the model would see it."""
    asked, messages, options = inputs.get("prompt"), inputs.get("messages"), dict(inputs.get("kwargs") or {})
    request = options.pop("request", asked)
    if isinstance(request, Request):
        return query_of(request, task, demonstrations=demonstrations)
    messages = messages or [{"role": "user", "content": str(asked)}]
    body = {name: value for name, value in options.items() if value is not None and name not in OUTER}
    try:
        request = request_from_openai_chat({"model": lm.model, "messages": messages, **body})
    except (LM15Error, TypeError, ValueError):
        # what DSPy would send another way than by its own engine
        return chat_query(tuple(messages), task, settings=call_settings(body))
    return query_of(request, task, demonstrations=demonstrations)


def _completion(lm: dspy.BaseLM, outputs: Any) -> Completion | None:
    """Of what a call returned; DSPy's history knows more of it."""
    if isinstance(outputs, Response):
        return completion_of(outputs, provider_of(lm))
    if not outputs:
        return None
    entry = next((one for one in reversed(lm.history) if one["outputs"] is outputs), None)
    return completion_of_entry(entry or {"response": None, "outputs": outputs, "usage": {}}, provider_of(lm))
