"""The bill: every call of every purpose, and a saving that is known only as well as the audits tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, portfolio
from typer.testing import CliRunner

from routenlp_plugins import (
    Attempt,
    Completion,
    Dispatcher,
    Judgement,
    Portfolio,
    Query,
    Release,
    ScoredTier,
    Tier,
    Trace,
    TraceStore,
    ledger,
)
from routenlp_plugins.cli import app


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


def call(tier: str, accepted: bool, cost: float | None = None, **facts) -> Attempt:
    return Attempt(tier, accepted, completion=Completion("so", cost_usd=cost, **facts))


def serve(store: TraceStore, name: str, *attempts: Attempt, **facts) -> None:
    store.record(Trace(Query("q", "t"), "t", attempts, "because"), name, **facts)


def test_everything_that_was_spent_is_on_the_bill(store):
    serve(store, "a", call(SMALL, True, 0.1))
    serve(store, "b", call(SMALL, False, 0.1), Attempt(MIDDLE, False, error="gone"), call(FRONTIER, True, 2.0))
    serve(store, "c", call(SMALL, True, 0.1))
    store.record_calls("a", "audit", [call(MIDDLE, False, 0.5), call(FRONTIER, False, 3.0)])
    store.record_calls("c", "audit", [call(FRONTIER, False, 1.0)])
    store.record_calls("b", "judge", [call("judge", False, 0.25)])
    store.flush()
    bill = ledger(store, portfolio())
    spent = {(line.purpose, line.tier): (line.calls, line.returned, line.failed, line.usd) for line in bill.lines}
    assert spent == {
        ("answer", SMALL): (3, 2, 0, pytest.approx(0.3)),
        ("answer", MIDDLE): (1, 0, 1, 0.0),
        ("answer", FRONTIER): (1, 1, 0, 2.0),
        ("audit", MIDDLE): (1, 0, 0, 0.5),
        ("audit", FRONTIER): (2, 0, 0, 4.0),
        ("judge", "judge"): (1, 0, 0, 0.25),
    }
    assert (bill.traces, bill.audited, bill.unknown) == (3, 2, "")
    assert bill.answers_usd == pytest.approx(2.3)
    assert bill.beside_usd == pytest.approx(4.75)
    assert bill.always_usd == pytest.approx(2.0 + 2 * 2.0)
    assert bill.saved_usd == pytest.approx(6.0 - 2.3 - 4.75)
    # all answers below the frontier were audited: nothing is estimated
    assert bill.interval_usd == (pytest.approx(bill.saved_usd), pytest.approx(bill.saved_usd))
    assert bill.break_even == 4  # 4.75 at 3.7 / 3 a query


def test_what_judges_cost_is_part_of_the_call_and_told(store):
    def judge(query, answer):
        return Judgement(0.9, 0.02)

    tier = ScoredTier(lambda call: Completion("no", input_tokens=1_000_000, output_tokens=0), {"judge": judge})
    dispatcher = Dispatcher(Release.frontier_only(portfolio()), {FRONTIER: tier}, listeners=[store.record])
    dispatcher.run(Query("q", "t"))
    store.flush()
    (line,) = ledger(store, portfolio()).lines
    price = portfolio().tier(FRONTIER).cost(1_000_000, 0, None)
    assert (line.usd, line.judges_usd) == (pytest.approx(price + 0.02), 0.02)


def test_the_interval_covers_the_saving_in_95_of_100_streams(tmp_path):
    """What the frontier would have cost is known here, of all queries; a tenth is audited."""
    rng = np.random.default_rng(0)
    covered = 0
    for stream in range(60):
        with TraceStore(tmp_path / f"{stream}.db") as store:
            frontier = rng.exponential(1.0, 400)
            for i, cost in enumerate(frontier):
                cheap = rng.random() < 0.7
                serve(store, f"{i}", call(SMALL, True, 0.1) if cheap else call(FRONTIER, True, cost), propensity=0.1)
                if cheap and rng.random() < 0.1:
                    store.record_calls(f"{i}", "audit", [call(FRONTIER, False, cost)])
            store.flush()
            bill = ledger(store, portfolio())
        low, high = bill.interval_usd
        covered += low <= frontier.sum() - bill.answers_usd - bill.beside_usd <= high
    # the sample of audits is small and skewed: 28 exponential costs
    assert covered >= 50


def test_audits_that_were_drawn_with_other_chances_are_weighted(store):
    for i in range(90):
        serve(store, f"short-{i}", call(SMALL, True, 0.0), propensity=0.1)
        serve(store, f"long-{i}", call(SMALL, True, 0.0), propensity=0.5)
    for i in range(9):
        store.record_calls(f"short-{i}", "audit", [call(FRONTIER, False, 1.0)])
    for i in range(45):
        store.record_calls(f"long-{i}", "audit", [call(FRONTIER, False, 3.0)])
    store.flush()
    assert ledger(store, portfolio()).always_usd == pytest.approx(180 * 2.0)


def test_a_tier_without_a_price_makes_the_saving_unknown_and_not_zero(store):
    serve(store, "a", call("local", True))
    serve(store, "b", call(FRONTIER, True, input_tokens=1000, output_tokens=100))
    store.flush()
    known = Portfolio((Tier("local"), Tier(FRONTIER, 10, 20)), FRONTIER)
    bill = ledger(store, known)
    assert (bill.answers_usd, bill.saved_usd, bill.interval_usd) == (None, None, None)
    assert bill.unknown.startswith("1 calls of local have no known cost")
    assert {line.tier: line.usd for line in bill.lines}[FRONTIER] == pytest.approx(0.012)


def test_calls_without_a_cost_are_priced_by_the_portfolio_cache_and_hours_included(store):
    serve(store, "a", call("cached", True, input_tokens=1000, output_tokens=10, cached_tokens=800))
    serve(store, "b", call("hourly", True, latency_ms=3600.0))
    serve(store, "c", call("cached", True, input_tokens=1000, output_tokens=10))
    store.flush()
    known = Portfolio(
        (Tier("hourly", usd_per_hour=1.0), Tier("cached", 2, 10, cached_input_usd_per_mtok=0.5)), "cached"
    )
    usd = {line.tier: line.usd for line in ledger(store, known).lines}
    assert usd["cached"] == pytest.approx((200 * 2 + 800 * 0.5 + 1000 * 2 + 2 * 10 * 10) / 1e6)
    assert usd["hourly"] == pytest.approx(0.001)


def test_without_audits_the_saving_is_unknown(store):
    serve(store, "a", call(SMALL, True, 0.1))
    store.flush()
    bill = ledger(store, portfolio())
    assert bill.saved_usd is None
    assert "for none of them an audit asked the frontier too" in bill.unknown


def test_a_window_of_time_is_a_bill_of_its_own(store):
    serve(store, "old", call(FRONTIER, True, 1.0), at=10.0)
    serve(store, "new", call(FRONTIER, True, 2.0), at=100.0)
    store.flush()
    assert ledger(store, portfolio(), since=50.0).answers_usd == 2.0
    assert ledger(store, portfolio(), until=50.0).answers_usd == 1.0
    empty = ledger(store, portfolio(), since=500.0)
    assert (empty.traces, empty.answers_usd, empty.saved_usd) == (0, 0, 0)


def test_the_report_shows_the_bill(store, tmp_path):
    serve(store, "a", call(SMALL, True, 0.1))
    store.record_calls("a", "audit", [call(FRONTIER, False, 3.0)])
    store.signal("nobody", "thumbs", 1)
    store.flush()
    (tmp_path / "portfolio.yaml").write_text(
        "frontier: frontier\ntiers:\n  - {name: small, input_usd_per_mtok: 1, output_usd_per_mtok: 1}\n"
        "  - {name: frontier, input_usd_per_mtok: 10, output_usd_per_mtok: 10}\n"
    )
    options = ["--store", f"sqlite:///{tmp_path}/traces.db", "--portfolio", str(tmp_path / "portfolio.yaml")]
    shown = CliRunner().invoke(app, ["report", *options])
    assert shown.exit_code == 0, shown.output
    assert "Saved: USD -0.1000" in " ".join(shown.output.split())
    assert "1 about unknown runs" in " ".join(shown.output.split())
    told = json.loads(CliRunner().invoke(app, ["report", *options, "--json"]).output)
    assert told["counts"]["traces"] == 1
    assert told["ledger"]["saved_usd"] == pytest.approx(3.0 - 0.1 - 3.0)
    missing = CliRunner().invoke(app, ["report", "--store", f"sqlite:///{tmp_path}/none.db", *options[2:]])
    assert missing.exit_code == 2
    assert "there is no such store" in missing.output
    assert not (tmp_path / "none.db").exists()
