"""What listeners of a dispatcher are told, and OpenTelemetry among them: real SDK, kept in memory."""

from __future__ import annotations

import sys

import pytest
from helpers import FRONTIER, SMALL, gated, release
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from routenlp_plugins import Completion, Dispatcher, MissingExtraError, Query, Telemetry, TierError, TraceStore

SECRET = "my account is 4711-0815"


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exporter.provider = provider
    yield exporter
    provider.shutdown()


def tiers(**facts):
    unsure = Completion("a guess", confidence=0.2, input_tokens=10, output_tokens=2, cached_tokens=4, model="small-1")
    sure = Completion(f"about {SECRET}", input_tokens=12, output_tokens=3, model="big-1", latency_ms=20.0)
    return {SMALL: lambda call: unsure, FRONTIER: lambda call: sure, **facts}


def failing(call):
    raise ConnectionError(f"lost {SECRET}")


def test_a_query_is_a_span_with_its_decision_and_each_call_one_below_it(spans):
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader])
    telemetry = Telemetry(spans.provider, meters, {FRONTIER: "openai"})
    router = Dispatcher(release(gated(SMALL, 0.9)), tiers(), listeners=[telemetry])
    with spans.provider.get_tracer("mine").start_as_current_span("request"):
        router.run(Query(SECRET, "t", "q1"))
    cheap, dear, root, request = spans.get_finished_spans()
    assert [span.name for span in (cheap, dear, root)] == ["chat small-1", "chat big-1", "route t"]
    assert root.parent.span_id == request.context.span_id
    assert cheap.parent.span_id == dear.parent.span_id == root.context.span_id
    assert dear.kind == SpanKind.CLIENT
    assert root.attributes["routenlp.tier"] == FRONTIER
    assert root.attributes["routenlp.reason"] == "frontier: no cheaper answer was accepted"
    assert root.attributes["routenlp.escalated"] is True
    assert root.attributes["routenlp.cost_usd"] > 0
    assert dict(cheap.attributes) | {"routenlp.cost_usd": 0} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "_OTHER",
        "gen_ai.request.model": SMALL,
        "gen_ai.response.model": "small-1",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "routenlp.accepted": False,
        "routenlp.confidence": pytest.approx(0.2),
        "routenlp.threshold": 0.9,
        "routenlp.cost_usd": 0,
    }
    assert dear.attributes["gen_ai.provider.name"] == "openai"
    assert dear.end_time - dear.start_time == 20_000_000
    assert root.start_time <= cheap.start_time <= cheap.end_time <= dear.start_time <= dear.end_time <= root.end_time
    (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
    sums = {metric.name: list(metric.data.data_points) for metric in scope.metrics}
    assert {name: len(points) for name, points in sums.items()} == {
        "gen_ai.client.token.usage": 4,
        "gen_ai.client.operation.duration": 2,
        "routenlp.queries": 1,
        "routenlp.cost": 2,
    }
    assert sums["routenlp.queries"][0].attributes == {"routenlp.task": "t", "routenlp.tier": FRONTIER}
    meters.shutdown()


@pytest.mark.parametrize("content", [False, True])
def test_texts_are_told_only_where_that_is_wanted(spans, content):
    telemetry = Telemetry(spans.provider, content=content)
    router = Dispatcher(release(gated(SMALL, 0.9)), tiers(small=failing), listeners=[telemetry])
    router.run(Query(SECRET, "t"))
    told = " ".join(span.to_json() for span in spans.get_finished_spans())
    assert (SECRET in told) is content
    (failed, _, _) = spans.get_finished_spans()
    assert failed.attributes["error.type"] == "ConnectionError"
    assert failed.status.status_code == StatusCode.ERROR


def test_a_query_that_nobody_answered_is_told_too(spans):
    told = []
    router = Dispatcher(release(), tiers(frontier=failing), listeners=[told.append, Telemetry(spans.provider)])
    with pytest.raises(TierError):
        router.run(Query(SECRET, "t"))
    assert [attempt.error is not None for attempt in told[0].attempts] == [True]
    assert SECRET not in " ".join(span.to_json() for span in spans.get_finished_spans())
    assert spans.get_finished_spans()[-1].status.status_code == StatusCode.ERROR


async def test_a_store_may_listen_and_a_listener_that_fails_harms_nothing(tmp_path, caplog):
    def broken(trace):
        raise ValueError(SECRET)

    with TraceStore(tmp_path / "traces.db") as store:
        router = Dispatcher(release(gated(SMALL, 0.9)), tiers(), listeners=[broken, store.record])
        answer = router.run(Query("q", "t"))
        again = await router.arun(Query("q", "t"))
        router.pinned(SMALL).run(Query("q", "t"))
        store.flush()
        found = list(store.traces())
    assert (answer.tier, again.tier) == (FRONTIER, FRONTIER)
    assert [recorded.trace.accepted.tier for recorded in found] == [FRONTIER, FRONTIER, SMALL]
    assert "a listener failed with ValueError" in caplog.text
    assert SECRET not in caplog.text


def test_without_opentelemetry_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'routenlp-plugins\[otel\]'"):
        Telemetry()
