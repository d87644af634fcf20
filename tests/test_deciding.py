"""Decisions for code that makes its own calls."""

from __future__ import annotations

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, release

from routenlp_plugins import (
    Answer,
    Call,
    Completion,
    ConformalCascade,
    DataError,
    Dispatcher,
    PortfolioError,
    Query,
    TierError,
)
from routenlp_plugins.deciding import Before
from routenlp_plugins.testing import ScriptedTier

RELEASE = release(gated(SMALL, 0.5, "confidence"), gated(MIDDLE, 0.5, "confidence"))
SAID = {
    SMALL: Completion("small", 0.1, input_tokens=10, output_tokens=1),
    MIDDLE: Completion("middle", 0.9, input_tokens=10, output_tokens=1),
    FRONTIER: Completion("frontier", input_tokens=10, output_tokens=1),
}


def stepped(answers):
    """All calls that are asked for, and the answer."""
    cascade, given, calls = ConformalCascade(RELEASE), {}, []
    while isinstance(found := cascade.step("x", given), Call):
        calls.append(found.tier)
        given[found.tier] = answers[found.tier]
    return calls, found


@pytest.mark.parametrize(
    ("changed", "calls"),
    [
        ({}, [SMALL, MIDDLE]),
        ({SMALL: Completion("sure", 0.8, input_tokens=10, output_tokens=1)}, [SMALL]),
        ({MIDDLE: TierError("down", MIDDLE)}, [SMALL, MIDDLE, FRONTIER]),
    ],
)
def test_steps_are_those_of_the_dispatcher(changed, calls):
    answers = {**SAID, **changed}
    made, found = stepped(answers)
    own = Dispatcher(RELEASE, {tier: ScriptedTier(default=answer) for tier, answer in answers.items()}).run("x")
    assert made == calls == [attempt.tier for attempt in own.trace.attempts]
    assert (found.text, found.tier, found.trace.reason) == (own.text, own.tier, own.trace.reason)
    assert found.trace.cost_usd == own.trace.cost_usd > 0


def test_a_latency_that_nobody_measured_stays_unknown():
    _, found = stepped(SAID)
    assert isinstance(found, Answer)
    assert {attempt.completion.latency_ms for attempt in found.trace.attempts} == {None}


def test_an_answer_nobody_asked_for_is_named():
    cascade = ConformalCascade(RELEASE)
    with pytest.raises(DataError, match="answers: middle was not asked for, with the other answers small is to be"):
        cascade.step("x", {MIDDLE: SAID[MIDDLE]})
    sure = {SMALL: Completion("sure", 0.8), FRONTIER: SAID[FRONTIER]}
    with pytest.raises(DataError, match="answers: frontier was not asked for, with the other answers small was acc"):
        cascade.step(Query("x"), sure)


def test_a_failed_frontier_and_an_impossible_value_are_told():
    cascade = ConformalCascade(RELEASE)
    failed = {**SAID, MIDDLE: Completion("x", confidence=7.0), FRONTIER: TierError("down", FRONTIER)}
    with pytest.raises(TierError, match=r"middle: confidence must be a number in \[0, 1\], got 7.0; frontier: down"):
        cascade.step("x", failed)


def test_what_was_decided_before_can_be_kept():
    cascade = ConformalCascade(RELEASE)
    before = cascade.before("x")
    assert (before.difficulty, before.stay) == (None, None)
    assert cascade.step("x", {}, before) == cascade.step("x")
    stays = cascade.step("x", {}, Before(None, "told to"))
    assert stays.tier == FRONTIER
    assert cascade.step("x", {FRONTIER: SAID[FRONTIER]}, Before(None, "told to")).trace.reason == "frontier: told to"


def test_any_exception_is_a_failure_and_nothing_else_is_an_answer():
    cascade = ConformalCascade(RELEASE)
    assert cascade.step("x", {SMALL: ValueError("bad")}).tier == MIDDLE
    with pytest.raises(PortfolioError, match="returned str; a tier is called with a Call and returns a Completion"):
        cascade.step("x", {SMALL: "yes"})
