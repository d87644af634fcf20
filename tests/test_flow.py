from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, policy
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import Call, Completion, DataError, Policy, PortfolioError, Query, TierError
from routenlp_plugins.flow import drive, route
from routenlp_plugins.policy import Confidence, Rung, Term


def answer_with(**confidences: float | Exception | None):
    def call(step: Call) -> Completion:
        value = confidences[step.tier]
        if isinstance(value, Exception):
            raise value
        return Completion(f"{step.tier} says", confidence=value, cost_usd=1.0)

    return call


LADDER = policy(gated(SMALL, 0.8, "confidence"), gated(MIDDLE, 0.6, "confidence"))


@pytest.mark.parametrize(
    ("small", "middle", "tier", "cost"),
    [(0.81, 0.0, SMALL, 1.0), (0.79, 0.61, MIDDLE, 2.0), (0.0, 0.59, FRONTIER, 3.0), (None, 0.9, MIDDLE, 2.0)],
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


def test_an_answer_that_is_not_valid_is_paid_for_and_passed_over():
    def call(step: Call) -> Completion:
        return Completion("x", 0.9, scores={"valid": 0.0 if step.tier == SMALL else 1.0}, cost_usd=1.0)

    for ladder in (LADDER, policy(Rung(SMALL), Rung(MIDDLE))):
        answer = drive(route(ladder, Query("x", "t")), call)
        assert (answer.tier, answer.trace.cost_usd) == (MIDDLE, 2.0)
    answer = drive(route(policy(Rung(SMALL)), Query("x", "t")), call)
    assert answer.trace.reason == "frontier: no cheaper answer was accepted; not valid: small"
    failing = answer_with(small=TierError("slow", SMALL), middle=0.1, frontier=None)
    reason = drive(route(LADDER, Query("x", "t")), failing).trace.reason
    assert reason == "frontier: no cheaper answer was accepted; failed: small"


def test_what_the_task_says_its_calls_have_is_covered():
    covered = replace(LADDER, requires={"t": ("tools",)})
    for requires, tier in (((), SMALL), (("tools",), SMALL), (("tools", "image"), FRONTIER)):
        query = Query("x", "t", requires=frozenset(requires))
        answer = drive(route(covered, query), answer_with(small=0.9, middle=0.9, frontier=None))
        assert answer.tier == tier
    assert answer.trace.reason == "frontier: the certificate does not cover calls that need image"


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
        rungs = (gated(SMALL, low), gated(MIDDLE, high))
        return order.index(drive(route(policy(*rungs), Query("x", "t")), call).tier)

    assert tier(0.1) >= tier(0.0)


TOGETHER = (
    Rung(SMALL, 1.0),
    Rung(
        MIDDLE,
        0.5,
        (
            Confidence(SMALL, (Term(1.0, SMALL, "confidence"), Term(2.0, SMALL, None, MIDDLE))),
            Confidence(MIDDLE, (Term(1.0, MIDDLE, "confidence"), Term(2.0, MIDDLE, None, SMALL))),
        ),
    ),
)


def saying(small: str, middle: str, confidence: tuple[float, float]):
    texts, given_ = {SMALL: small, MIDDLE: middle, FRONTIER: "x"}, dict(zip((SMALL, MIDDLE), confidence, strict=True))
    return lambda call: Completion(texts[call.tier], confidence=given_.get(call.tier), cost_usd=1.0)


@pytest.mark.parametrize(
    ("small", "middle", "confidence", "tier"),
    [
        ("Yes.", "yes", (0.7, 0.6), SMALL),
        ("Yes.", "yes", (0.6, 0.7), MIDDLE),
        ("yes", "no", (0.7, 0.6), FRONTIER),
        ("yes", "no", (0.2, 0.95), MIDDLE),
        ("yes", "", (0.99, 0.99), FRONTIER),
    ],
)
def test_the_best_answer_so_far_is_returned_and_agreement_counts(small, middle, confidence, tier):
    answer = drive(route(policy(*TOGETHER), Query("x", "t")), saying(small, middle, confidence))
    assert answer.tier == tier == answer.trace.as_dict()["tier"]
    assert [attempt.tier for attempt in answer.trace.attempts if attempt.accepted] == [tier]
    assert answer.trace.cost_usd == (3.0 if tier == FRONTIER else 2.0)


def test_the_comparator_is_the_one_of_the_task():
    numbers = Policy(FRONTIER, {"t": TOGETHER}, comparators={"t": "number"})
    call = saying("It is 7.", "so 7.0", (0.6, 0.6))
    assert drive(route(numbers, Query("x", "t")), call).tier == SMALL
    assert drive(route(policy(*TOGETHER), Query("x", "t")), call).tier == FRONTIER
    own = Policy(FRONTIER, {"t": TOGETHER}, comparators={"t": "mine"})
    assert drive(route(own, Query("x", "t"), {"mine": lambda a, b: 1.0}), saying("a", "b", (0.6, 0.6))).tier == SMALL
    with pytest.raises(DataError, match="comparator 'mine' is unknown; known: label, text, number"):
        drive(route(own, Query("x", "t")), call)


def test_an_answer_of_another_model_than_the_certified_one_is_never_returned():
    used = Policy(FRONTIER, {"t": (Rung(SMALL),)}, models={SMALL: ("m-1",)})
    for model, tier in (("m-1", SMALL), ("m-2", FRONTIER), (None, FRONTIER)):
        answer = drive(route(used, Query("x", "t")), lambda call, model=model: Completion("x", model=model))
        assert answer.tier == tier
    assert answer.trace.reason == "frontier: the certificate is void: small answered as None, certified was m-1"


def test_another_frontier_than_the_certified_one_is_told():
    used = Policy(FRONTIER, {"t": (Rung(SMALL, 1.0),), "u": ()}, models={FRONTIER: ("m-1",)})

    def reason(task: str, model: str) -> str:
        return drive(route(used, Query("x", task), None), lambda call: Completion("x", model=model)).trace.reason

    assert reason("t", "m-2") == "frontier: the certificate is void: frontier answered as 'm-2', certified was m-1"
    assert reason("t", "m-1").startswith("frontier: no cheaper answer was accepted")
    assert reason("u", "m-2") == "frontier: task 'u' stays on the frontier"


def test_an_answer_to_another_prompt_than_the_certified_one_is_never_returned():
    used = Policy(FRONTIER, {"t": (Rung(SMALL),)}, prompts={"t": ("abc",)})
    for prompt, tier in (("abc", SMALL), (None, SMALL), ("def", FRONTIER)):
        answer = drive(route(used, Query("x", "t")), lambda call, prompt=prompt: Completion("x", prompt=prompt))
        assert answer.tier == tier
    assert "prompt, form or options of this call of task 't' are not those it was certified with" in answer.trace.reason


def test_a_void_policy_answers_from_the_frontier_and_says_why():
    void = Policy(FRONTIER, {"t": (Rung(SMALL),)}, void="moved")
    answer = drive(route(void, Query("x", "t")), answer_with(frontier=None))
    assert (answer.tier, answer.trace.reason) == (FRONTIER, "frontier: the certificate is void: moved")


def test_missing_evidence_is_named():
    answer = drive(route(LADDER, Query("x", "t")), answer_with(small=None, middle=0.1, frontier=None))
    assert answer.trace.reason == (
        "frontier: no cheaper answer was accepted; small came without the evidence its confidence needs"
    )


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ((Rung(SMALL), Rung(SMALL)), "tier 'small' is called twice"),
        ((Rung(FRONTIER),), "tier 'frontier' is called twice"),
        ((Rung(SMALL, 0.5, (Confidence.plain(MIDDLE),)),), "rung 'small' looks at middle before it is called"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_an_error(rungs, message):
    with pytest.raises(PortfolioError, match=message):
        policy(*rungs)


@pytest.mark.parametrize("threshold", [0.5, float("nan"), True, 2])
def test_a_threshold_without_meaning_is_an_error(threshold):
    with pytest.raises(PortfolioError, match="rung 'small'"):
        Rung(SMALL, threshold)
