"""`RouterOptimizer`: prompts that were compared on examples they had not seen, a release certified on others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy_world import Double, examples, fields, lm, number, right
from helpers import FRONTIER, SMALL

from dspy_routenlp import RouterModule, RouterOptimizer, decision_of
from routenlp_plugins import DataError, Portfolio, PortfolioError, Release, Task, Tier
from routenlp_plugins.testing import ScriptedServer

PORTFOLIO = Portfolio((Tier(SMALL, 0.1, 0.1), Tier(FRONTIER, 10, 10)), FRONTIER, (Task("double"),))
NOT_SHOWN = "one of its own"


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    """Doubles once it was shown how, and else adds one."""

    def reply(request: Any) -> str:
        asked = number(request)
        return fields(answer=asked * 2 if len(request["messages"]) > 2 else asked + 1)

    with ScriptedServer(reply) as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: fields(answer=number(request) * 2)) as server:
        yield server


TRAIN, VAL = examples(2, 14), examples(100, 400)


@pytest.fixture
def module(small, frontier) -> RouterModule:
    tiers = {SMALL: lm(small, SMALL), FRONTIER: lm(frontier, FRONTIER)}
    return RouterModule(dspy.Predict(Double), tiers, Release.frontier_only(PORTFOLIO))


def shots() -> dspy.BootstrapFewShot:
    return dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=2, max_labeled_demos=0)


def test_a_prompt_makes_the_cheap_tier_good_enough_and_the_release_says_so(module, tmp_path):
    optimiser = RouterOptimizer(right, retention=0.95, prompts=shots(), outcomes=tmp_path / "outcomes.jsonl")
    made = optimiser.compile(module, trainset=TRAIN, valset=VAL)
    assert (optimiser.searched[SMALL].plain, optimiser.searched[SMALL].optimised) == (0.0, 1.0)
    assert not optimiser.searched[FRONTIER].better
    assert (len(made.students[SMALL].demos), len(made.students[FRONTIER].demos)) == (2, 0)
    assert made.release.certificate.certified == ("double",)
    assert decision_of(made(question=250)).accepted.tier == SMALL
    assert made(question=250).answer == 500
    # what it was made of is as it was
    assert decision_of(module(question=7)).accepted.tier == FRONTIER
    assert module.students[SMALL].demos == []
    # other demonstrations are another prompt
    made.students[SMALL].demos = made.students[SMALL].demos[:1]
    assert "certificate is void" in decision_of(made(question=250)).reason


def test_without_prompts_the_frontier_answers_and_a_warning_says_why(module, caplog):
    with caplog.at_level(logging.WARNING, "dspy_routenlp"):
        made = RouterOptimizer(right, retention=0.95).compile(module, valset=VAL)
    assert decision_of(made(question=250)).accepted.tier == FRONTIER
    assert "the frontier answers everything" in caplog.text


def test_a_run_that_was_stopped_goes_on(module, small, frontier, tmp_path):
    file = tmp_path / "outcomes.jsonl"
    RouterOptimizer(right, outcomes=file).compile(module, valset=VAL[:60])
    asked = len(frontier.requests)
    RouterOptimizer(right, outcomes=file).compile(module, valset=VAL[:60])
    assert len(frontier.requests) == asked


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"valset": []}, DataError, "valset: empty"),
        ({"valset": VAL, "trainset": VAL[:3]}, DataError, "3 of its examples are in trainset too"),
        ({"valset": VAL, "trainset": TRAIN[:3]}, DataError, "trainset: 3 examples"),
    ],
)
def test_examples_that_will_not_do(module, more, error, message):
    with pytest.raises(error, match=message):
        RouterOptimizer(right, prompts=shots()).compile(module, **more)


def test_programs_and_tiers_that_will_not_do(module):
    with pytest.raises(PortfolioError, match="compile takes a RouterModule"):
        RouterOptimizer(right).compile(dspy.Predict(Double), valset=VAL)
    with pytest.raises(PortfolioError, match="prompts: big is no tier; tiers: small, frontier"):
        RouterOptimizer(right, prompts={"big": shots()}).compile(module, trainset=TRAIN, valset=VAL)


def test_a_metric_out_of_range_is_named(module):
    with pytest.raises(DataError, match=r"returned 7.0 for small; expected \[0, 1\]"):
        RouterOptimizer(lambda example, prediction: 7).compile(module, valset=VAL[:10])
