"""The gate: what must be shown, what harm it finds, how often it errs."""

from __future__ import annotations

import numpy as np
import pytest

from routenlp_plugins import DataError, GateOptions
from routenlp_plugins.distill.clusters import ELSEWHERE
from routenlp_plugins.distill.gate import Fresh, Verdict, _too_few, judge

NAMES = tuple(f"cluster {i}" for i in range(5))
TAUGHT = (0, 1)


def fresh(
    n: int, seed: int = 0, gain: float = 0.0, harm: float = 0.0, elsewhere: float = 0.0, graded: bool = False
) -> Fresh:
    """A student of quality .6; the new one gains where it was taught, loses in cluster 4 and on untaught queries."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(ELSEWHERE, 5, n)
    escalated = rng.random(n) < 0.5
    taught = np.isin(clusters, TAUGHT) & escalated
    mean = 0.6 + gain * taught - harm * (clusters == 4) - elsewhere * ~taught
    # both students answer the same queries, so that most answers are the same
    same = rng.random(n)
    old, new = (same < 0.6).astype(float), (same < mean).astype(float)
    if graded:
        old, new = 0.25 + old / 2, 0.25 + new / 2
    return Fresh(["t"] * n, clusters, escalated, [""] * n, old, new)


def test_a_student_that_learned_and_forgot_nothing_passes():
    verdict = judge(fresh(2000, gain=0.3), TAUGHT, NAMES)
    assert verdict.promoted and all(check.passed for check in verdict.checks)
    kinds = {check.kind: check for check in verdict.checks}
    assert kinds["better"].new > kinds["better"].old + 0.2
    assert Verdict.from_dict(verdict.as_dict()) == verdict


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gain": 0.0}, "not shown to be better where it was taught"),
        ({"gain": 0.3, "harm": 0.5}, "harm: cluster 4"),
        ({"gain": 0.3, "elsewhere": 0.15}, "what was not taught: not shown to be less than 0.03 worse"),
        ({"gain": -0.5}, "task 't': not shown to be less than 0.03 worse"),
    ],
)
def test_what_is_not_so_is_refused_with_the_reason(changes, reason):
    verdict = judge(fresh(2000, **changes), TAUGHT, NAMES)
    assert not verdict.promoted
    assert any(reason in why for why in verdict.refusals), verdict.refusals


def test_graded_quality_is_judged_too():
    assert judge(fresh(3000, gain=0.3, graded=True), TAUGHT, NAMES).promoted
    assert not judge(fresh(3000, gain=0.0, graded=True), TAUGHT, NAMES).promoted


def test_too_few_queries_show_nothing_and_say_how_many_would():
    verdict = judge(fresh(100, gain=0.3), TAUGHT, NAMES)
    assert not verdict.promoted and any("would do" in why for why in verdict.refusals)
    assert "at least 30 are needed" in judge(fresh(10), TAUGHT, NAMES).refusals[0]
    assert not judge(fresh(0), TAUGHT, NAMES).promoted


def test_harm_to_one_answer_is_found_wherever_it_lies():
    seen = fresh(1000, gain=0.3)
    answers = ["victim" if i % 10 == 0 else f"other {i % 7}" for i in range(1000)]
    new = np.where([a == "victim" for a in answers], 0.0, seen.new)
    old = np.where([a == "victim" for a in answers], 1.0, seen.old)
    verdict = judge(Fresh(seen.tasks, seen.clusters, seen.escalated, answers, old, new), TAUGHT, NAMES)
    assert any("harm: answer 'victim'" in why for why in verdict.refusals)


def test_what_harm_it_could_have_found_is_told():
    harms = [check for check in judge(fresh(2000, gain=0.3), TAUGHT, NAMES).checks if check.kind == "harm"]
    assert harms and all(0 < (check.detectable or 0) <= 1 for check in harms)
    fewer = [check for check in judge(fresh(400, gain=0.3), TAUGHT, NAMES).checks if check.kind == "harm"]
    assert np.mean([c.detectable for c in fewer]) > np.mean([c.detectable for c in harms])


def test_where_all_was_taught_nothing_untaught_has_to_be_shown():
    seen = fresh(2000, gain=0.3)
    everything = np.ones(2000, dtype=bool)
    clusters = np.zeros(2000, dtype=np.intp)
    verdict = judge(Fresh(seen.tasks, clusters, everything, seen.answers, seen.old, seen.new), TAUGHT, NAMES)
    assert "untaught" not in {check.about for check in verdict.checks}


def test_a_few_untaught_queries_are_judged_by_what_they_cost_all_traffic():
    seen = fresh(1000, gain=0.3)
    places = np.arange(1000)
    few = places < 60
    clusters = np.where(few, 4, 0)
    everything = np.ones(1000, dtype=bool)

    def verdict(lost: int) -> Verdict:
        new = np.where(few, np.where(places < lost, 0.0, seen.old), np.maximum(seen.old, places % 2))
        old = np.where(few & (places < lost), 1.0, seen.old)
        return judge(Fresh(seen.tasks, clusters, everything, seen.answers, old, new), TAUGHT, NAMES)

    (kept,) = [check for check in verdict(0).checks if check.about == "untaught"]
    assert kept.passed and kept.n == 60
    (lost,) = [check for check in verdict(60).checks if check.about == "untaught"]
    assert not lost.passed


def test_whether_few_are_too_few_does_not_depend_on_their_answers():
    # nor does a p-value just miss what it aims at: results that are all alike show it from some number on for good
    shown = [n for n in range(1, 400) if not _too_few(n, GateOptions())]
    assert shown and shown == list(range(shown[0], 400))


def test_bad_arguments_are_told():
    with pytest.raises(DataError, match="margin must be"):
        GateOptions(margin=0)
    with pytest.raises(DataError, match="a quality must be in"):
        Fresh(["t"], np.zeros(1, dtype=np.intp), np.ones(1, dtype=bool), [""], np.array([2.0]), np.array([0.0]))
    with pytest.raises(DataError, match="expected n tasks"):
        Fresh(["t"], np.zeros(2, dtype=np.intp), np.ones(1, dtype=bool), [""], np.zeros(1), np.zeros(1))


def error_rate(draws: int, n: int, **changes: float) -> float:
    return float(np.mean([judge(fresh(n, seed, **changes), TAUGHT, NAMES).promoted for seed in range(draws)]))


def test_a_student_on_the_margin_is_rarely_promoted():
    # where it was not taught it is worse by exactly the margin
    assert error_rate(100, 600, gain=0.3, elsewhere=0.03) <= 0.12


@pytest.mark.long
def test_the_chance_of_promoting_what_should_not_be_is_at_most_the_level():
    level, draws = 0.05, 1000
    # two standard deviations above
    most = level + 2 * (level * (1 - level) / draws) ** 0.5
    for changes in ({"gain": 0.3, "elsewhere": 0.03}, {"gain": 0.0}):
        assert error_rate(draws, 800, **changes) <= most
    # the false alarm of harm, where there is none
    alarms = [
        any(
            check.kind == "harm" and not check.passed
            for check in judge(fresh(800, seed, gain=0.0), TAUGHT, NAMES).checks
        )
        for seed in range(draws)
    ]
    assert np.mean(alarms) <= most


@pytest.mark.long
def test_a_good_student_is_promoted():
    assert error_rate(100, 2000, gain=0.3) >= 0.9
