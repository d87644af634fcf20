"""What a store gives as a sample of its traffic really is one, or it says what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import FRONTIER, SMALL, portfolio
from typer.testing import CliRunner

from routenlp_plugins import (
    Attempt,
    Completion,
    DataError,
    FitOptions,
    LabelModel,
    Noise,
    Query,
    Release,
    Task,
    Trace,
    TraceStore,
    fit,
    ledger,
    replay,
)
from routenlp_plugins.cli import app
from routenlp_plugins.evaluate.outcomes import read_outcomes


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


def call(tier: str, words: str = "so", *, accepted: bool = False, **facts) -> Attempt:
    return Attempt(tier, accepted, completion=Completion(words, input_tokens=10, output_tokens=1, **facts))


def serve(store: TraceStore, name: str, text: str = "q", query_id: str | None = None, **facts) -> None:
    trace = Trace(Query(text, "t", query_id), "t", (call(FRONTIER, accepted=True),), "")
    store.record(trace, name, **facts)


def thumbs(opinion) -> float | None:
    return next((signal.value for signal in opinion.returned if signal.kind == "thumbs"), None)


def test_what_is_audited_is_drawn_by_chance_and_the_chance_is_kept(store):
    for i in range(400):
        serve(store, f"run-{i}", at=float(i))
    serve(store, "known", at=5.0, propensity=1.0)
    store.flush()
    drawn = {one.id for one in store.draw(0.2, until=300.0)}
    assert 30 < len(drawn) < 90
    assert {one.id for one in store.draw(0.2, until=300.0)} == drawn
    # another seed finds nothing that nobody has drawn from, a larger share finds more
    assert store.draw(0.2, until=300.0, seed=1) == []
    more = {one.id for one in store.draw(0.4, until=300.0)}
    assert drawn < more
    assert 80 < len(more) < 160
    chances = {one.id: (one.propensity, one.drawn) for one in store.traces()}
    assert (chances["known"], chances["run-399"]) == ((1.0, None), (None, None))
    assert all(chances[f"run-{i}"] == (0.4, f"run-{i}" in more) for i in range(300))
    for wrong in (0, 1.5, True, float("nan")):
        with pytest.raises(DataError, match=r"share must be in \(0, 1\]"):
            store.draw(wrong)


def test_audits_that_nobody_drew_are_no_sample(store):
    for i in range(20):
        serve(store, f"run-{i}")
        store.signal(f"run-{i}", "audit", float(i % 2))
        store.signal(f"run-{i}", "thumbs", float(i % 2))
    store.flush()
    with pytest.raises(DataError, match="it was audited, and nobody told with what probability"):
        list(store.outcomes(labelled=True))
    with pytest.raises(DataError, match="was audited, and nobody told with what probability"):
        LabelModel.learn(store.judged())
    assert store.design(0.5) == 20
    assert {row.propensity for row in store.outcomes(labelled=True)} == {0.5}


def test_a_draw_makes_no_sample_of_what_reviewers_picked(store):
    for i in range(200):
        serve(store, f"run-{i}")
        if i % 3 == 0:
            store.signal(f"run-{i}", "audit", 1)
    store.flush()
    drawn = {one.id for one in store.draw(0.3)}
    rows = {row.query.id: row for row in store.outcomes(labelled=True)}
    assert set(rows) == drawn
    # what was drawn and never audited has no quality, which counts as bad
    assert {name for name, row in rows.items() if row.outcomes[FRONTIER].quality is None} == {
        name for name in drawn if int(name[4:]) % 3
    }
    assert {one.unit for one in store.judged()} == {name for name in drawn if int(name[4:]) % 3 == 0}


def test_dialogues_are_drawn_whole_and_may_be_fitted(store):
    rng = np.random.default_rng(0)
    for i in range(600):
        for turn in range(1 + i % 2):
            good = rng.random() < 0.9
            name = f"{i}-{turn}"
            serve(store, name, text=f"question {name}", unit=f"dialogue-{i}")
            sure = float(rng.beta(8, 1) if good else rng.beta(1, 4))
            store.record_calls(name, "shadow", [call(SMALL, confidence=sure)])
    store.flush()
    drawn = store.draw(0.5)
    by_unit = {one.unit for one in drawn}
    assert {one.id for one in store.traces() if one.unit in by_unit} == {one.id for one in drawn}
    for one in drawn:
        store.signal(one.id, "audit", 1, tier=FRONTIER)
        sure = one.beside["shadow"][0].completion.confidence
        store.signal(one.id, "audit", float(sure > 0.5), tier=SMALL)
    store.flush()
    # a later turn of an audited dialogue is no part of the sample
    serve(store, "later", unit=drawn[0].unit)
    store.flush()
    rows = list(store.outcomes(labelled=True))
    assert {row.query.id for row in rows} == {one.id for one in drawn}
    assert {row.propensity for row in rows} == {0.5}
    assert fit(rows, portfolio(), alpha=0.1, options=FitOptions(router=None)).certificate.certified == ("t",)


def test_a_judge_of_the_same_model_takes_no_answers_place(store):
    serve(store, "run")
    store.record_calls("run", "shadow", [call(SMALL, "the answer")])
    store.record_calls("run", "judge", [call(SMALL, "yes")])
    store.flush()
    (row,) = store.outcomes(beside="shadow")
    assert row.outcomes[SMALL].completion.text == "the answer"


def test_what_was_certain_to_be_audited_has_nobody_to_speak_for_it(store):
    for i in range(40):
        hard = i % 4 == 0
        serve(store, f"run-{i}", propensity=1.0 if hard else 0.1)
        store.signal(f"run-{i}", "thumbs", 1)
        if hard:
            store.signal(f"run-{i}", "audit", 0)
    store.flush()
    with pytest.raises(DataError, match="10 traces were certain to be audited"):
        store.outcomes(thumbs, unaudited=True)


def test_unaudited_rows_tell_how_probable_they_were(store):
    for i in range(10):
        serve(store, f"run-{i}", propensity=0.25)
        serve(store, f"turn-{i}", propensity=0.5, unit=f"dialogue-{i // 2}")
        store.signal(f"run-{i}", "thumbs", 1)
    store.signal("run-0", "audit", 1)
    store.signal("turn-0", "audit", 1)
    store.flush()
    rows = {row.query.id: row for row in store.outcomes(thumbs, unaudited=True)}
    assert set(rows) == {f"run-{i}" for i in range(1, 10)} | {f"turn-{i}" for i in range(2, 10)}
    assert rows["run-5"].propensity == 0.75
    # a dialogue is drawn whole
    assert (rows["turn-4"].group, rows["turn-4"].propensity) == ("dialogue-2", 0.5)
    (audited,) = (row for row in store.outcomes(labelled=True) if row.group)
    assert audited.propensity == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "audit"}, "label must be a function of an Opinion, got 'audit'"),
        ({"label": thumbs, "labelled": True}, "rows with a label of your own are no sample"),
        ({"unaudited": True}, "what was not audited has no quality"),
        ({"label": thumbs, "without": {"a"}}, "for other labels give unaudited=True"),
        ({"labelled": True, "without": "a"}, "expected units, got a string"),
        ({"beside": "audit"}, "their calls are no sample"),
        ({"beside": "shadwo"}, "beside must be one of audit, shadow"),
        ({"since": "2026-01-01"}, "since must be seconds since 1970"),
    ],
)
def test_what_is_no_sample_is_refused(store, given, message):
    with pytest.raises(DataError, match=message):
        store.outcomes(**given)


@pytest.mark.parametrize("facts", [{"propensity": 0.0}, {"propensity": float("nan")}, {"at": 1.8e12}, {"unit": "a\0"}])
def test_a_trace_with_impossible_facts_is_refused_at_once(store, facts):
    with pytest.raises(DataError, match="record: "):
        serve(store, "run", **facts)


def test_a_group_is_the_same_in_every_window(store):
    for i in range(4):
        serve(store, f"run-{i}", at=float(i), unit="dialogue")
        serve(store, f"asked-{i}", at=float(i), query_id="q")
    store.flush()
    (late,) = (row for row in store.outcomes(since=3.0) if row.query.id == "run-3")
    assert late.group == "dialogue"
    assert {row.group for row in store.outcomes(since=3.0)} == {"dialogue", "query q"}


def test_an_audit_is_about_the_answer_that_had_been_given(store):
    serve(store, "first", query_id="q", at=1.0)
    serve(store, "second", query_id="q", at=10.0)
    store.signal("q", "audit", 0, at=2.0)
    store.signal("q", "thumbs", 1, at=11.0)
    store.flush()
    found = {row.query.id: row.outcomes[FRONTIER].quality for row in store.outcomes()}
    assert found == {"first": 0.0, "second": None}
    said = {row.query.id: row.outcomes[FRONTIER].quality for row in store.outcomes(thumbs)}
    assert said == {"first": None, "second": 1.0}


def test_a_correction_under_another_name_is_a_correction(store):
    serve(store, "run", runs={"root": None})
    store.signal("root", "audit", 0, at=1.0)
    store.signal("run", "audit", 1, at=2.0, tier=FRONTIER)
    store.flush()
    (row,) = store.outcomes()
    assert row.outcomes[FRONTIER].quality == 1.0


def test_the_answer_that_was_returned_is_the_one_that_is_judged(store):
    serve(store, "run")
    store.record_calls("run", "shadow", [call(FRONTIER, "another answer", confidence=0.1)])
    store.signal("run", "audit", 1)
    store.flush()
    (row,) = store.outcomes()
    assert (row.outcomes[FRONTIER].completion.text, row.outcomes[FRONTIER].quality) == ("so", 1.0)


def test_what_is_said_of_a_failed_call_is_not_said_of_the_answer(store):
    attempts = (Attempt(FRONTIER, False, error="gone"), call(FRONTIER, accepted=True))
    store.record(Trace(Query("q", "t"), "t", attempts, ""), "run", runs={"failed": 0})
    store.signal("failed", "audit", 0)
    store.flush()
    (row,) = store.outcomes()
    assert row.outcomes[FRONTIER].quality is None


def test_a_signal_about_a_tier_that_was_never_asked_is_counted(store):
    serve(store, "run", runs={"root": None})
    for run in ("run", "root"):
        store.signal(run, "audit", 1, "right", tier=FRONTIER)
        store.signal(run, "audit", 1, "wrong", tier="frontire")
    store.signal("nobody", "audit", 1, tier="frontire")
    store.flush()
    counts = store.counts()
    assert (counts.misplaced_signals, counts.unknown_signals) == (2, 1)


def test_calls_with_tools_are_no_rows(store):
    trace = Trace(Query("q", "t", requires=frozenset({"tools"})), "t", (call(FRONTIER, accepted=True),), "")
    store.record(trace, "run")
    store.flush()
    assert list(store.outcomes()) == []
    (found,) = store.traces()
    assert found.trace.query.requires == {"tools"}


def test_labels_certify_nothing_that_they_were_learned_from(store):
    rng = np.random.default_rng(0)
    for i in range(800):
        good = rng.random() < 0.8
        words = {FRONTIER: "right", SMALL: "right" if good else "wrong"}
        trace = Trace(Query(f"question {i}", "t"), "t", (call(FRONTIER, "right", accepted=True),), "")
        store.record(trace, f"run-{i}", propensity=0.5)
        sure = float(rng.beta(4, 2) if good else rng.beta(2, 4))
        store.record_calls(f"run-{i}", "shadow", [call(SMALL, words[SMALL], confidence=sure)])
        store.signal(f"run-{i}", "judge", float(rng.random() < (0.95 if good else 0.1)), tier=SMALL)
        if rng.random() < 0.5:
            store.signal(f"run-{i}", "audit", float(good), tier=SMALL)
            store.signal(f"run-{i}", "audit", 1)
    store.flush()
    model = LabelModel.learn(store.judged(), frontier=FRONTIER)
    audits, hints = list(store.outcomes(labelled=True)), list(store.outcomes(model))
    options = FitOptions(hints=hints, noise=model.expected, router=None)
    with pytest.raises(DataError, match="the labels were learned from its audit"):
        fit(audits, portfolio(), alpha=0.1, options=options)
    new = list(store.outcomes(labelled=True, without=model.learned_from))
    assert 0.65 < len(new) / len(audits) < 0.85
    assert fit(new, portfolio(), alpha=0.2, options=options).certificate.certified == ("t",)
    labelled = list(store.outcomes(model, unaudited=True))
    with pytest.raises(DataError, match=r"labels tell whether quality reaches 1, and tau of task 't' is 0.5"):
        floor = portfolio(Task("t", tau=0.5))
        fit(labelled, floor, alpha=0.2, options=FitOptions(noise=model.noise, router=None))
    elsewhere = Noise(0.9, 0.1, tasks=frozenset({"other"}))
    with pytest.raises(DataError, match="no answer of task 't' was audited"):
        fit(labelled, portfolio(), alpha=0.2, options=FitOptions(noise=elsewhere, router=None))
    with pytest.raises(DataError, match="noise: expected a Noise"):
        FitOptions(noise=(0.9, 0.1))


def test_unequal_propensities_weigh_what_is_replayed(store):
    for i in range(100):
        hard = i < 50
        serve(store, f"run-{i}", propensity=0.1 if hard else 1.0)
        if not hard or i < 5:
            store.signal(f"run-{i}", "audit", float(not hard))
    store.flush()
    told = replay(list(store.outcomes(labelled=True)), Release.frontier_only(portfolio(), ("t",)))
    assert told.quality == pytest.approx(0.5)


def test_the_interval_holds_with_unequal_propensities(tmp_path):
    rng = np.random.default_rng(0)
    held = 0
    for number in range(40):
        with TraceStore(tmp_path / f"{number}.db") as store:
            truth = 0.0
            for i in range(200):
                hard = rng.random() < 0.3
                chance, usd = (1.0, 3.0) if hard else (0.1, float(rng.choice([0.5, 1.0, 4.0])))
                truth += usd
                cheap = call(SMALL, accepted=True, cost_usd=0.0)
                store.record(Trace(Query("q", "t"), "t", (cheap,), ""), f"{i}", propensity=chance)
                if rng.random() < chance:
                    store.record_calls(f"{i}", "audit", [call(FRONTIER, cost_usd=usd)] * (2 if hard else 1))
            store.flush()
            bill = ledger(store, portfolio())
            held += bill.interval_usd[0] <= bill.saved_usd - bill.always_usd + truth <= bill.interval_usd[1]
    # few audits of a skewed cost: P(Binomial(40, 0.9) < 31) < 0.02
    assert held >= 31


def test_the_bill_knows_what_could_not_be_audited_and_what_was_asked_often(tmp_path):
    def routed(store, name, query_id, usd, **facts):
        trace = Trace(Query("q", "t", query_id), "t", (call(SMALL, accepted=True, cost_usd=0.0),), "")
        store.record(trace, name, **facts)
        if facts.get("drawn"):
            store.record_calls(name, "audit", [call(FRONTIER, cost_usd=usd)])

    with TraceStore(tmp_path / "often.db") as store:
        for i in range(100):
            routed(store, f"rare-{i}", f"rare-{i}", 10.0, propensity=0.5, drawn=i % 2 == 0)
            for k in range(10):
                routed(store, f"often-{i}-{k}", f"often-{i}", 0.1, propensity=0.5, drawn=i % 2 == 0 if k == 0 else None)
        store.flush()
        assert ledger(store, portfolio()).always_usd == pytest.approx(100 * 10 + 1000 * 0.1)
    with TraceStore(tmp_path / "part.db") as store:
        for i in range(20):
            routed(store, f"before-{i}", None, 1.0)
            routed(store, f"since-{i}", None, 50.0, propensity=0.5, drawn=i % 2 == 0)
        store.flush()
        bill = ledger(store, portfolio())
        assert (bill.saved_usd, bill.always_usd) == (None, None)
        assert "20 of 40 queries that were answered below the frontier could not have been audited" in bill.unknown


def test_reviewers_get_a_file_and_give_it_back(store, tmp_path):
    for i in range(60):
        serve(store, f"run-{i}", text=f"question {i}")
        store.record_calls(f"run-{i}", "shadow", [call(SMALL)])
    store.flush()
    file, url = tmp_path / "review.jsonl", f"sqlite:///{tmp_path / 'traces.db'}"
    (tmp_path / "p.yaml").write_text(json.dumps(portfolio().as_dict()))
    shown = CliRunner().invoke(app, ["draw", str(file), "--store", url, "--share", "0.5"])
    assert shown.exit_code == 0, shown.output
    drawn = read_outcomes(file)
    assert 15 < len(drawn) < 45
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        for outcome in line["outcomes"].values():
            outcome["quality"] = 1.0
    reviewed = tmp_path / "reviewed.jsonl"
    reviewed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--store", url, "--format", "outcomes", "--portfolio", str(tmp_path / "p.yaml")]
    done = CliRunner().invoke(app, ["import", str(reviewed), *options])
    assert done.exit_code == 0, done.output
    rows = list(store.outcomes(labelled=True))
    assert {row.query.id for row in rows} == {row.query.id for row in drawn}
    assert {row.propensity for row in rows} == {0.5}
    assert {outcome.quality for row in rows for outcome in row.outcomes.values()} == {1.0}
    assert store.counts().calls == 120
