"""Shadow runs: a random sample, under a budget, and nobody waits for them."""

from __future__ import annotations

import json
import threading
import time

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, portfolio
from typer.testing import CliRunner

from routenlp_plugins import (
    Attempt,
    Completion,
    DataError,
    PortfolioError,
    Query,
    Release,
    Shadow,
    ShadowOptions,
    Task,
    Trace,
    TraceStore,
    replay,
)
from routenlp_plugins.cli import app
from routenlp_plugins.testing import ScriptedTier


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


def says(words: str = "so", **facts):
    return lambda call: Completion(words, input_tokens=1000, output_tokens=0, **facts)


def serve(store: TraceStore, shadow: Shadow, n: int, start: int = 0) -> None:
    for i in range(start, start + n):
        query = Query(f"question {i}", "t", f"q{i}")
        answer = Attempt(
            FRONTIER, True, completion=Completion("yes", input_tokens=1000, output_tokens=0, cost_usd=0.01)
        )
        store.record(Trace(query, "t", (answer,), "frontier"), f"run-{i}")
        shadow.offer(f"run-{i}", query)


def test_what_runs_is_a_random_sample_with_outcomes_of_every_tier(store):
    tiers = {SMALL: says(confidence=0.5), MIDDLE: says("no")}
    with Shadow(store, portfolio(), tiers, ShadowOptions(share=0.3, workers=2)) as shadow:
        serve(store, shadow, 400)
    store.flush()
    rows = list(store.outcomes(beside="shadow"))
    assert 80 < len(rows) < 160
    assert all(list(row.outcomes) == [FRONTIER, SMALL, MIDDLE] for row in rows)
    counts = shadow.counts()
    assert (counts.run, counts.left_out, counts.beyond_budget) == (len(rows), 0, 0)
    assert counts.spent_usd == pytest.approx(len(rows) * 1000 * (0.1 + 1.0) / 1e6)


def test_what_a_release_would_have_done_is_replayed_on_it(store):
    with Shadow(store, portfolio(), {SMALL: says()}, ShadowOptions(share=1.0)) as shadow:
        serve(store, shadow, 20)
    for i in range(20):
        store.signal(f"run-{i}", "audit", 1.0)
        store.signal(f"run-{i}", "audit", 1.0, tier=SMALL)
    store.flush()
    result = replay(list(store.outcomes(beside="shadow")), Release.frontier_only(portfolio(), ("t",)))
    assert (result.queries, result.quality, result.cost_ratio) == (20, 1.0, 1.0)


def test_the_command_line_tells_what_a_release_would_have_done(store, tmp_path):
    kept = Release.frontier_only(portfolio(), ("t",))
    kept.save(tmp_path / "release")
    options = ["would-have", "--store", str(tmp_path / "traces.db"), "--release", str(tmp_path / "release")]
    nothing = CliRunner().invoke(app, options)
    assert (nothing.exit_code, "no query ran in the shadow" in nothing.output) == (2, True)
    with Shadow(store, portfolio(), {SMALL: says()}, ShadowOptions(share=1.0)) as shadow:
        serve(store, shadow, 10)
    store.flush()
    shown = " ".join(CliRunner().invoke(app, options).output.split())
    assert "10 queries ran in the shadow: USD 0.01 a query, 1.000 of the frontier alone" in shown
    assert "What would have been kept is not known: none of them was audited on every tier" in shown
    store.signal("run-1", "audit", 1.0)
    store.signal("run-1", "audit", 0.0, tier=SMALL)
    store.flush()
    told = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert (told["audited"], "nobody told with what probability" in told["unknown"]) == (None, True)
    store.design(0.1)
    told = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert (told["shadow"]["queries"], told["audited"]["queries"], told["audited"]["quality"]) == (10, 1, 1.0)


def test_a_budget_holds_over_restarts(store):
    options = ShadowOptions(share=1.0, budget_usd=0.00101)
    for start in (0, 50):
        with Shadow(store, portfolio(), {SMALL: says()}, options) as shadow:
            serve(store, shadow, 50, start)
        store.flush()
    assert 0.00101 <= store.spent_usd("shadow") <= 0.00101 + 0.0001
    assert shadow.counts().run == 0
    assert shadow.counts().beyond_budget == 50


def test_a_budget_that_cannot_be_kept_ends_the_shadow(store, caplog):
    tiers = {SMALL: lambda call: Completion("so")}
    with Shadow(store, portfolio(), tiers, ShadowOptions(share=1.0, budget_usd=1.0)) as shadow:
        serve(store, shadow, 1)
        time.sleep(0.2)
        serve(store, shadow, 5, start=1)
    assert "a call of small has no known cost" in caplog.text
    assert (shadow.counts().run, shadow.counts().beyond_budget) == (1, 5)


def test_nobody_waits_for_a_slow_tier_and_what_is_left_out_is_counted(store):
    hold = threading.Event()

    def slow(call):
        hold.wait(10)
        return Completion("so", input_tokens=1, output_tokens=1)

    with Shadow(store, portfolio(), {SMALL: slow}, ShadowOptions(share=1.0, waiting=5)) as shadow:
        start = time.perf_counter()
        serve(store, shadow, 20)
        assert time.perf_counter() - start < 2
        assert shadow.counts().left_out == 15
        hold.set()
    assert shadow.counts().run == 5


def test_a_tier_that_fails_is_an_outcome(store):
    def broken(call):
        raise ConnectionError("gone")

    with Shadow(store, portfolio(), {SMALL: broken, MIDDLE: says()}, ShadowOptions(share=1.0)) as shadow:
        serve(store, shadow, 1)
    store.flush()
    (row,) = store.outcomes()
    assert row.outcomes[SMALL].error == "ConnectionError: gone"
    assert row.outcomes[MIDDLE].completion.text == "so"


def test_tiers_that_may_not_serve_a_task_are_not_called(store):
    tiers = {SMALL: ScriptedTier(default="so"), MIDDLE: ScriptedTier(default="so")}
    used = portfolio(Task("t", tiers=(MIDDLE,)))
    with Shadow(store, used, tiers, ShadowOptions(share=1.0)) as shadow:
        serve(store, shadow, 3)
    assert (len(tiers[SMALL].calls), len(tiers[MIDDLE].calls)) == (0, 3)


async def asynchronous(call):
    return Completion("so")


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({FRONTIER: says()}, "frontier is the frontier, which answers already"),
        ({"nobody": says()}, "unknown"),
        ({SMALL: asynchronous}, "async only; shadow runs need a sync form"),
        ({}, "none is given"),
    ],
)
def test_tiers_that_cannot_run_are_refused(store, tiers, message):
    with pytest.raises(PortfolioError, match=message):
        Shadow(store, portfolio(), tiers)


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 2}, {"budget_usd": -1}, {"workers": 0}, {"waiting": True}])
def test_options_that_are_none_are_refused(options):
    with pytest.raises(DataError, match=next(iter(options))):
        ShadowOptions(**options)
