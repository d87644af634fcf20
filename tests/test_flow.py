from __future__ import annotations

from math import exp, log

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, policy
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import Call, Completion, Policy, Query, TierError
from routenlp_plugins.flow import drive, route, score
from routenlp_plugins.types import Rung


def answer_with(**confidences: float | Exception | None):
    def call(step: Call) -> Completion:
        value = confidences[step.tier]
        if isinstance(value, Exception):
            raise value
        return Completion(f"{step.tier} says", confidence=value, cost_usd=1.0)

    return call


LADDER = policy(Rung(SMALL, 0.8, "confidence"), Rung(MIDDLE, 0.6, "confidence"))


@pytest.mark.parametrize(
    ("small", "middle", "tier", "cost"),
    [(0.8, 0.0, SMALL, 1.0), (0.79, 0.6, MIDDLE, 2.0), (0.0, 0.59, FRONTIER, 3.0), (None, 0.9, MIDDLE, 2.0)],
)
def test_the_first_answer_that_reaches_its_threshold_is_returned(small, middle, tier, cost):
    answer = drive(route(LADDER, Query("x", "t")), answer_with(small=small, middle=middle, frontier=None))
    assert (answer.tier, answer.text, answer.trace.cost_usd) == (tier, f"{tier} says", cost)
    assert answer.trace.escalated == (tier != SMALL)
    assert [attempt.accepted for attempt in answer.trace.attempts][-1]


def test_a_rung_without_threshold_accepts_every_answer():
    answer = drive(route(policy(Rung(SMALL)), Query("x", "t")), answer_with(small=None))
    assert answer.tier == SMALL
    assert answer.trace.reason == "small: every answer is accepted for this task"


def test_a_cheap_tier_that_fails_is_passed_over():
    failing = answer_with(small=TierError("down", SMALL), middle=0.9)
    answer = drive(route(LADDER, Query("x", "t")), failing)
    assert answer.tier == MIDDLE
    assert answer.trace.attempts[0].error == "down"


def test_a_frontier_that_fails_raises_with_all_attempts():
    failing = answer_with(small=0.1, middle=TierError("slow", MIDDLE), frontier=TierError("down", FRONTIER))
    with pytest.raises(TierError, match=r"small: answer rejected; middle: slow; frontier: down") as caught:
        drive(route(LADDER, Query("x", "t")), failing)
    assert [attempt.tier for attempt in caught.value.attempts] == [SMALL, MIDDLE, FRONTIER]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (Query("x", "other"), "frontier: unknown task 'other'"),
        (Query("x"), "frontier: the query names no task; known tasks: t, u"),
        (Query("x", "u"), "frontier: task 'u' stays on the frontier"),
        (
            Query("x", "t", requires=frozenset({"tools"})),
            "frontier: the certificate does not cover calls that need tools",
        ),
    ],
)
def test_what_the_policy_does_not_cover_goes_to_the_frontier_and_says_why(query, reason):
    two = Policy(FRONTIER, {"t": LADDER.ladders["t"], "u": ()})
    answer = drive(route(two, query), answer_with(small=1.0, frontier=None))
    assert (answer.tier, answer.trace.reason) == (FRONTIER, reason)


def test_a_query_without_task_takes_the_only_task():
    answer = drive(route(LADDER, Query("x")), answer_with(small=0.9))
    assert (answer.tier, answer.trace.task) == (SMALL, "t")


def test_scores_of_a_completion():
    logprobs = (log(0.5), log(0.9))
    completion = Completion("x", confidence=0.3, token_logprobs=logprobs)
    assert score(completion, "confidence") == 0.3
    assert score(completion, "token_probability") == pytest.approx(0.7)
    assert score(completion, "mean_logprob") == pytest.approx(exp((log(0.5) + log(0.9)) / 2))
    assert score(Completion("x", mean_logprob=log(0.4)), "mean_logprob") == pytest.approx(0.4)


@pytest.mark.parametrize("kind", ["confidence", "token_probability", "mean_logprob"])
def test_missing_evidence_is_none(kind):
    assert score(Completion("x", token_logprobs=()), kind) is None


def test_a_trace_of_unknown_cost_has_no_cost():
    answer = drive(route(policy(Rung(SMALL)), Query("x", "t")), lambda call: Completion("x"))
    assert answer.trace.cost_usd is None
    assert answer.trace.as_dict()["cost_usd"] is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_raising_thresholds_never_returns_a_cheaper_answer(scores, thresholds):
    order = [SMALL, MIDDLE, FRONTIER]
    call = answer_with(small=scores[0], middle=scores[1], frontier=None)

    def tier(extra: float) -> int:
        low, high = (min(threshold + extra, 1) for threshold in thresholds)
        rungs = (Rung(SMALL, low, "confidence"), Rung(MIDDLE, high, "confidence"))
        return order.index(drive(route(policy(*rungs), Query("x", "t")), call).tier)

    assert tier(0.1) >= tier(0.0)
