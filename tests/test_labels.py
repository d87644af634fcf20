"""Labels learned from what was said of audited answers, and bounds of their errors."""

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
    Query,
    Signal,
    Trace,
    TraceStore,
    edit_similarity,
    fit,
    replay,
)
from routenlp_plugins.cli import app
from routenlp_plugins.signals.opinions import Judged, Opinion


def opinion(**said: float) -> Opinion:
    """Of an answer that was returned; what `user` said as thumbs, and so on."""
    kinds = {"thumbs": "user", "judge": "model", "retry": "asked again", "stars": "user"}
    signals = tuple(Signal("run", kind, value, kinds[kind]) for kind, value in said.items())
    return Opinion(signals, signals, 1.0, is_returned=True)


def judged(n: int, seed: int = 0, good: float = 0.8, up: tuple[float, float] = (0.9, 0.2), heard: float = 1.0):
    """Answers that are good or bad, thumbs that are up on 90 % of the good and 20 % of the bad, and noise as stars."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        is_good = rng.random() < good
        said = {"stars": float(rng.integers(0, 5) / 4)}
        if rng.random() < heard:
            said["thumbs"] = float(rng.random() < up[0 if is_good else 1])
        found.append(Judged(opinion(**said), float(is_good), FRONTIER, f"unit-{i}", 1.0))
    return found


def test_what_tells_nothing_is_left_out_and_the_rest_is_weighed():
    model = LabelModel.learn(judged(2000))
    reports = {report.kind: report for report in model.sources}
    assert (reports["thumbs"].used, reports["stars"].used) == (True, False)
    assert reports["thumbs"].on_good == pytest.approx(0.9, abs=0.05)
    assert reports["thumbs"].on_bad == pytest.approx(0.2, abs=0.07)
    assert model(opinion(thumbs=1.0)) > model(opinion()) > model(opinion(thumbs=0.0))
    # P(good | thumbs down) = .8 * .1 / (.8 * .1 + .2 * .8)
    assert model(opinion(thumbs=0.0)) == pytest.approx(1 / 3, abs=0.08)
    assert model(opinion(thumbs=1.0, stars=0.0)) == model(opinion(thumbs=1.0, stars=1.0))


def test_the_bounds_are_above_the_mean_labels_and_not_far_above():
    above = 0
    for seed in range(20):
        model = LabelModel.learn(judged(1500, seed), delta=0.1)
        fresh = judged(4000, 1000 + seed)
        labels = np.array([model(one.opinion) for one in fresh])
        good = np.array([one.quality == 1 for one in fresh])
        above += model.noise.on_good >= labels[good].mean() and model.noise.on_bad >= labels[~good].mean()
        assert model.noise.on_good <= labels[good].mean() + 0.08
        assert model.noise.on_bad <= labels[~good].mean() + 0.15
        assert model.noise.delta == 0.1
        assert model.expected.on_good == pytest.approx(labels[good].mean(), abs=0.05)
        assert model.expected.on_bad == pytest.approx(labels[~good].mean(), abs=0.1)
    # P(Binomial(20, 0.9) < 15) < 0.02, and the means of fresh answers have errors too
    assert above >= 15


def test_the_worst_tier_sets_the_bounds():
    kind = judged(1500)
    harsh = [Judged(one.opinion, one.quality, SMALL, one.unit, 1.0) for one in judged(1500, 1, up=(0.99, 0.6))]
    assert LabelModel.learn([*kind, *harsh]).noise.on_bad > LabelModel.learn(kind).noise.on_bad + 0.1


def test_an_answer_that_was_not_returned_is_labelled_by_its_agreement():
    model = LabelModel.learn(judged(1500))
    said = opinion(thumbs=1.0).signals
    same, other = (Opinion((), said, agreement, is_returned=False) for agreement in (1.0, 0.0))
    assert model(same) == model(opinion(thumbs=1.0))
    assert model(other) is None
    assert model(Opinion((), said, None, is_returned=False)) is None


def test_what_agreement_is_worth_is_learned_where_others_were_audited():
    """An answer like the returned one is good in nine of ten, another one in three of ten."""
    rng = np.random.default_rng(0)
    others = []
    for i in range(2000):
        same = rng.random() < 0.7
        mine = Opinion((), opinion(thumbs=1.0).signals if rng.random() < 0.5 else (), float(same), is_returned=False)
        good = float(rng.random() < (0.9 if same else 0.3))
        others.append(Judged(mine, good, SMALL, f"other-{i}", 1.0))
    model = LabelModel.learn([*judged(1500), *others], frontier=FRONTIER)
    assert model(Opinion((), (), 0.0, is_returned=False)) == pytest.approx(0.3, abs=0.08)
    assert model(Opinion((), (), 1.0, is_returned=False)) == pytest.approx(0.9, abs=0.08)
    assert 1400 < model.audited[0] + model.audited[1] < 1600


def test_audits_with_other_chances_need_their_smallest():
    some = judged(1500)
    mixed = [Judged(one.opinion, one.quality, one.tier, one.unit, 2.0 if i % 2 else 10.0) for i, one in enumerate(some)]
    with pytest.raises(DataError, match="give smallest_propensity"):
        LabelModel.learn(mixed)
    with pytest.raises(DataError, match=r"propensity below the smallest, 0\.2"):
        LabelModel.learn(mixed, smallest_propensity=0.2)
    weighted = LabelModel.learn(mixed, smallest_propensity=0.1)
    assert weighted.noise.on_good == pytest.approx(LabelModel.learn(some).noise.on_good, abs=0.06)


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ([], "of 0 audited answers"),
        (judged(300, good=1.0), "both are needed, so audit more"),
        (judged(400, up=(0.5, 0.5)), "no signal tells good answers from bad ones better than chance"),
        (judged(300, up=(0.75, 0.45), heard=0.7, good=0.9), "audit more, or find better signals|better than chance"),
    ],
)
def test_what_cannot_be_learned_says_why(some, message):
    with pytest.raises(DataError, match=message):
        LabelModel.learn(some)


def test_a_release_is_fitted_from_thumbs_and_a_few_audits(tmp_path):
    """The frontier serves and is right in nine of ten; the small tier runs in its shadow; users give thumbs."""
    rng = np.random.default_rng(0)

    def answer(tier: str, good: bool, number: int, accepted: bool, confidence: float | None = None) -> Attempt:
        text = f"right {number}" if good else f"{tier} wrong {number}"
        done = Completion(text, confidence=confidence, input_tokens=10, output_tokens=10)
        return Attempt(tier, accepted, completion=done)

    with TraceStore(tmp_path / "traces.db") as store:
        for i in range(6000):
            sure = rng.beta(4, 1)
            good = {FRONTIER: rng.random() < 0.9, SMALL: rng.random() < sure}
            trace = Trace(Query("q", "t", f"q{i}"), "t", (answer(FRONTIER, good[FRONTIER], i, True),), "collected")
            store.record(trace, f"run-{i}", propensity=0.25)
            store.record_calls(f"run-{i}", "shadow", [answer(SMALL, good[SMALL], i, False, float(sure))])
            store.signal(f"run-{i}", "thumbs", float(rng.random() < (0.95 if good[FRONTIER] else 0.1)))
            if rng.random() < 0.25:
                for tier in good:
                    store.signal(f"run-{i}", "audit", float(good[tier]), "reviewer", tier=tier)
        store.flush()
        model = LabelModel.learn(store.judged(), delta=0.05, frontier=FRONTIER)
        labelled = list(store.outcomes(model, unaudited=True))
        truth = list(store.outcomes(labelled=True))
    assert {row.propensity for row in truth} == {0.25}
    assert {row.propensity for row in labelled} == {0.75}
    assert 1300 < len(truth) < 1700
    assert {f"query {row.query.id}" for row in truth} > model.learned_from
    assert not {row.query.id for row in labelled} & {row.query.id for row in truth}
    options = FitOptions(noise=model.noise, router=None)
    release = fit(labelled, portfolio(), alpha=0.1, options=options)
    told = replay(truth, release)
    assert release.certificate.certified == ("t",)
    assert told.cost_ratio < 0.8
    assert told.violation_rate <= 0.1


def test_what_is_said_of_another_answer_tells_of_one_that_differs_from_it():
    """Thumbs on the answer of the frontier tell where the small tier, which differs from it, is right."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(3000):
        same, frontier_right = rng.random() < 0.8, rng.random() < 0.7
        up = Signal("run", "thumbs", float(rng.random() < (0.95 if frontier_right else 0.1)))
        good = frontier_right if same else not frontier_right
        found.append(Judged(Opinion((), (up,), float(same), is_returned=False), float(good), SMALL, f"unit-{i}", 1.0))
    model = LabelModel.learn(found)

    def label(agreement: float, thumb: float) -> float | None:
        return model(Opinion((), (Signal("run", "thumbs", thumb),), agreement, is_returned=False))

    assert label(0.0, 0.0) > 0.8 > 0.2 > label(0.0, 1.0)
    assert label(1.0, 1.0) > 0.8 > 0.2 > label(1.0, 0.0)


def test_an_edit_says_how_much_was_kept():
    assert edit_similarity("the card is on its way", "the card is on its way") == 1
    assert edit_similarity("four", "five") == pytest.approx(0.25)
    assert edit_similarity("", "") == 1
    assert edit_similarity("a", "") == 0


def test_the_command_line_tells_what_signals_are_worth(tmp_path):
    rng = np.random.default_rng(3)
    with TraceStore(tmp_path / "traces.db") as store:
        for i in range(600):
            good = rng.random() < 0.7
            done = Completion("right" if good else "wrong", input_tokens=1, output_tokens=1)
            mine = Trace(Query("q", "t"), "t", (Attempt(FRONTIER, True, completion=done),), "")
            store.record(mine, f"run-{i}", propensity=0.5)
            store.signal(f"run-{i}", "thumbs", float(rng.random() < (0.9 if good else 0.1)))
            store.signal(f"run-{i}", "judge", float(rng.random()), "coin")
            store.signal(f"run-{i}", "audit", float(good), "reviewer")
    url = ["labels", "--store", f"sqlite:///{tmp_path / 'traces.db'}"]
    shown = CliRunner().invoke(app, url)
    assert shown.exit_code == 0, shown.output
    assert "no better" in shown.output
    assert "Labels of good answers are" in shown.output
    told = json.loads(CliRunner().invoke(app, [*url, "--json"]).output)
    assert {(one["kind"], one["source"], one["used"]) for one in told["sources"]} == {
        ("thumbs", "user", True),
        ("judge", "coin", False),
    }
    assert told["noise"]["on_bad"] < told["noise"]["on_good"]
    refused = CliRunner().invoke(app, [*url, "--delta", "2"])
    assert refused.exit_code == 2
    assert "delta must be strictly between 0 and 1" in refused.output
