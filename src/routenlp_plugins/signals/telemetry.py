"""Traces as OpenTelemetry spans and metrics, by the semantic conventions for generative AI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from time import time_ns
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..types import Attempt, Query, Trace
from .redaction import Redaction

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["Telemetry"]

NO_TEXT = Redaction("drop")
OTHER = "_OTHER"
"""What the conventions call a value that none of theirs fits."""
DURATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
"""Bounds of the buckets, as the conventions advise."""


class Telemetry:
    """A listener of a dispatcher: ``Dispatcher(release, tiers, listeners=[Telemetry()])``.

    A query is a span ``route TASK``, a child of the span it was asked in, with the decision in attributes
    ``routenlp.*``; each call of a tier is a client span ``chat MODEL`` below it. Spans are made when the answer is
    there, their times from the latencies of the calls. Metrics are ``gen_ai.client.token.usage``,
    ``gen_ai.client.operation.duration``, ``routenlp.queries`` and ``routenlp.cost`` (USD).

    Args:
        tracers, meters: providers; None takes those that are set globally.
        providers: tier -> who serves it, as ``gen_ai.provider.name`` knows them, such as ``openai``.
        content: whether texts of queries and answers are told too.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """

    def __init__(
        self,
        tracers: TracerProvider | None = None,
        meters: MeterProvider | None = None,
        providers: Mapping[str, str] | None = None,
        *,
        content: bool = False,
    ) -> None:
        try:
            from opentelemetry import metrics, trace
        except ImportError:
            raise MissingExtraError("opentelemetry is not installed: pip install 'routenlp-plugins[otel]'") from None
        self._trace = trace
        self._tracer = trace.get_tracer("routenlp_plugins", tracer_provider=tracers)
        meter = metrics.get_meter("routenlp_plugins", meter_provider=meters)
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "Duration of the calls of tiers",
            explicit_bucket_boundaries_advisory=DURATIONS,
        )
        self._queries = meter.create_counter("routenlp.queries", "{query}", "Queries by task and answering tier")
        self._cost = meter.create_counter("routenlp.cost", "USD", "Known cost of the calls of tiers")
        self.providers = dict(providers or {})
        self.content = content

    def __call__(self, trace: Trace) -> None:
        """Tell of a query that was just answered, or was not."""
        end = time_ns()
        spent = [_nanoseconds(attempt) for attempt in trace.attempts]
        at = end - sum(spent)
        root = self._tracer.start_span(f"route {trace.task or 'unknown'}", start_time=at, attributes=_decision(trace))
        if self.content:
            root.set_attribute("gen_ai.input.messages", _messages(trace.query))
        within = self._trace.set_span_in_context(root)
        for attempt, took in zip(trace.attempts, spent, strict=True):
            self._call(attempt, trace.query, within, at, took)
            at += took
        answered = any(attempt.accepted for attempt in trace.attempts)
        tier = trace.accepted.tier if answered else "none"
        self._queries.add(1, {"routenlp.task": trace.task or "unknown", "routenlp.tier": tier})
        if not answered:
            root.set_status(self._trace.StatusCode.ERROR, "no tier answered")
        root.end(end)

    def _call(self, attempt: Attempt, query: Query, within: Any, at: int, took: int) -> None:
        done = attempt.completion
        named: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self.providers.get(attempt.tier, OTHER),
            "gen_ai.request.model": attempt.tier,
        }
        known: dict[str, Any] = {**named, "routenlp.accepted": attempt.accepted}
        if done is not None:
            usage = {"input": done.input_tokens, "output": done.output_tokens}
            known |= _without_none(
                {
                    "gen_ai.response.model": done.model,
                    "gen_ai.usage.input_tokens": done.input_tokens,
                    "gen_ai.usage.output_tokens": done.output_tokens,
                    "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
                    "routenlp.cost_usd": done.cost_usd,
                    "routenlp.confidence": attempt.confidence,
                    "routenlp.threshold": attempt.threshold,
                }
            )
            for kind, tokens in usage.items():
                if tokens is not None:
                    self._tokens.record(tokens, {**named, "gen_ai.token.type": kind})
            if done.cost_usd is not None:
                self._cost.add(done.cost_usd, {"routenlp.tier": attempt.tier})
            if self.content:
                known["gen_ai.input.messages"] = _messages(query)
                known["gen_ai.output.messages"] = _message("assistant", done.text)
        wrong: dict[str, Any] = {} if attempt.error is None else {"error.type": NO_TEXT.error(attempt.error)}
        name = (done.model if done is not None else None) or attempt.tier
        span = self._tracer.start_span(
            f"chat {name}", within, self._trace.SpanKind.CLIENT, attributes={**known, **wrong}, start_time=at
        )
        if attempt.error is not None:
            span.set_status(self._trace.StatusCode.ERROR, attempt.error if self.content else wrong["error.type"])
        span.end(at + took)
        if done is None or done.latency_ms is not None:
            self._duration.record(took / 1e9, {**named, **wrong})


def _nanoseconds(attempt: Attempt) -> int:
    done = attempt.completion
    return 0 if done is None or done.latency_ms is None else int(done.latency_ms * 1e6)


def _decision(trace: Trace) -> dict[str, Any]:
    answered = any(attempt.accepted for attempt in trace.attempts)
    return _without_none(
        {
            "routenlp.task": trace.task,
            "routenlp.tier": trace.accepted.tier if answered else None,
            "routenlp.reason": NO_TEXT.reason(trace.reason),
            "routenlp.escalated": trace.escalated,
            "routenlp.cost_usd": trace.cost_usd,
            "routenlp.query_id": trace.query.id,
        }
    )


def _without_none(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _messages(query: Query) -> str:
    return json.dumps(
        [
            {"role": message.get("role"), "parts": [{"type": "text", "content": str(message.get("content"))}]}
            for message in query.chat
        ]
    )


def _message(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}], "finish_reason": "stop"}])
