"""What programs of all kinds do to a router around them: other models within, samples, copies, saving, odd inputs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import dspy
import numpy as np
import pytest
from dspy_world import Double, examples, fields, lm, number, right
from helpers import FRONTIER, SMALL, gated, release_beyond
from pydantic import BaseModel

from dspy_routenlp import RouterModule, RouterOptimizer, SignalCallback, decision_of
from routenlp_plugins import (
    DataError,
    Portfolio,
    PortfolioError,
    PTrueTier,
    Release,
    ScoredTier,
    SelfConsistentTier,
    Task,
    Tier,
    TraceStore,
)
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

PORTFOLIO = Portfolio((Tier(SMALL, 0.1, 0.1), Tier(FRONTIER, 10, 10)), FRONTIER, (Task("double"),))
SURE, ALWAYS = release_beyond(gated(SMALL, 0.5, "verifier")), release_beyond(Rung(SMALL))


class Point(BaseModel):
    x: int


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    """Right below five only."""
    with ScriptedServer(lambda request: fields(answer=number(request) * 2 if number(request) < 5 else 0)) as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: fields(answer=number(request) * 2)) as server:
        yield server


@pytest.fixture
def plain(small, frontier) -> dict[str, Any]:
    return {SMALL: lm(small, SMALL), FRONTIER: lm(frontier, FRONTIER)}


@pytest.fixture
def tiers(plain) -> dict[str, Any]:
    return {**plain, SMALL: ScoredTier(plain[SMALL], {"verifier": lambda query, answer: answer != "0"})}


def routed(tiers: dict[str, Any], used: Release = SURE, student: Any = None) -> RouterModule:
    return RouterModule(student or dspy.Predict(Double), tiers, used)


class TestOtherModels:
    def test_samples_of_dspys_own_modules_are_those_of_the_tiers(self, tiers, small):
        best = dspy.BestOfN(routed(tiers), N=2, reward_fn=lambda inputs, made: 0.0, threshold=1.0)
        found = best(question=3)
        assert decision_of(found).accepted.completion.model == SMALL
        assert [request["temperature"] for request in small.requests] == [1.0, 1.0]

    def test_what_is_drawn_is_not_what_was_certified(self, plain, tmp_path):
        made = RouterOptimizer(right, retention=0.9).compile(
            RouterModule(dspy.Predict(Double), {SMALL: plain[FRONTIER], FRONTIER: plain[FRONTIER]}, FRONTIER_ONLY),
            valset=examples(100, 220),
        )
        assert decision_of(made(question=150)).accepted.tier == SMALL
        made.set_lm(made.get_lm().copy(temperature=1.0))
        assert "certificate is void" in decision_of(made(question=150)).reason

    def test_a_program_that_does_not_ask_its_tier_is_told_of_once(self, plain, frontier, caplog):
        student = dspy.Predict(Double)
        student.set_lm(lm(frontier, "another"))
        module = routed(plain, ALWAYS, student)
        assert [module(question=n).answer for n in (6, 7)] == [12, 14]
        assert caplog.text.count("tier small was not asked, its program asked openai/another") == 1

    def test_another_model_is_no_tier(self, tiers, frontier):
        with pytest.raises(PortfolioError, match="openai/other is no tier's"):
            routed(tiers).set_lm(lm(frontier, "other"))
        with pytest.raises(PortfolioError, match="leave lm out"):
            routed(tiers)(question=3, lm=tiers[FRONTIER])

    def test_calls_of_other_models_within_are_never_priced_as_the_tiers(self, small, frontier, plain):
        class Two(dspy.Module):
            def __init__(self, other: dspy.LM) -> None:
                super().__init__()
                self.first, self.second = dspy.Predict(Double), dspy.Predict(Double)
                self.second.lm = other

            def forward(self, question: int) -> dspy.Prediction:
                return self.second(question=self.first(question=question).answer)

        one = decision_of(routed(plain, ALWAYS, dspy.Predict(Double))(question=2)).cost_usd
        unknown = routed(plain, ALWAYS, Two(lm(frontier, "nobody-knows")))
        assert decision_of(unknown(question=2)).cost_usd is None
        known = decision_of(routed(plain, ALWAYS, Two(lm(frontier, "gpt-4o")))(question=2)).cost_usd
        assert known > 5 * one

    def test_no_call_is_forgotten_however_short_dspys_memory(self, plain):
        class Twice(dspy.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = dspy.Predict(Double), dspy.Predict(Double)

            def forward(self, question: int) -> dspy.Prediction:
                return self.second(question=self.first(question=question).answer)

        with dspy.context(max_history_size=1):
            short = decision_of(routed(plain, ALWAYS, Twice())(question=2))
        assert short.cost_usd == decision_of(routed(plain, ALWAYS, Twice())(question=2)).cost_usd


class TestTiersThatScore:
    def test_samples_never_come_from_a_cache(self, frontier):
        count = itertools.count()
        with ScriptedServer(lambda request: fields(answer=next(count))) as server:
            unsure = SelfConsistentTier(lm(server, SMALL, temperature=1.0, cache=True), samples=3)
            program = routed(
                {SMALL: unsure, FRONTIER: lm(frontier, FRONTIER)}, release_beyond(gated(SMALL, 0.9, "self_consistency"))
            )
            assert decision_of(program(question=3)).accepted.tier == FRONTIER
            assert len(server.requests) == 3

    def test_a_tier_may_ask_itself_whether_it_is_right(self, frontier):
        with ScriptedServer(lambda request: fields(answer=6) if "##" in str(request["messages"]) else "Yes") as server:
            tiers = {SMALL: PTrueTier(lm(server, SMALL)), FRONTIER: lm(frontier, FRONTIER)}
            trace = decision_of(routed(tiers, release_beyond(gated(SMALL, 0.5, "p_true")))(question=3))
            assert trace.attempts[0].error is None
            assert trace.accepted.tier == SMALL


class Locked(dspy.Module):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict(Double)
        self.lock = threading.Lock()

    def forward(self, question: int) -> dspy.Prediction:
        return self.ask(question=question)


class Outer(dspy.Module):
    def __init__(self, used: Release, tiers: dict[str, Any]) -> None:
        super().__init__()
        self.route = routed(tiers, used)

    def forward(self, question: int) -> dspy.Prediction:
        return self.route(question=question)


class TestCopiesAndFiles:
    def test_a_copy_of_what_cannot_be_copied_is_one_all_the_same(self, tiers):
        student = Locked()
        student.ask.demos = [dspy.Example(question=1, answer=2)]
        copied = routed(tiers, student=student).reset_copy()
        assert len(student.ask.demos) == 1
        assert copied.students[SMALL].ask.demos == []
        assert copied(question=3).answer == 6

    def test_prompts_of_a_compiled_program_are_saved(self, plain, tiers, tmp_path):
        optimiser = dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=2, max_labeled_demos=0)
        with dspy.context(lm=plain[FRONTIER]):
            student = optimiser.compile(dspy.Predict(Double), trainset=examples(0, 4))
        routed(tiers, student=student).save(tmp_path / "program.json")
        other = routed(tiers)
        other.load(tmp_path / "program.json")
        assert len(other.students[SMALL].demos) == 2

    def test_nothing_depends_on_the_order_of_tiers_or_on_what_they_share(self, tiers):
        mine, shared = {name: dspy.Predict(Double) for name in tiers}, dspy.Predict(Double)
        mine[FRONTIER].demos = [dspy.Example(question=1, answer=2)]
        for state in (routed(tiers, student=mine).dump_state(), routed(tiers, student=shared).dump_state()):
            other = RouterModule(dspy.Predict(Double), dict(reversed(tiers.items())), SURE)
            other.load_state(state)
            assert len(other.students[SMALL].demos) == 0
        assert other.students[SMALL] is other.students[FRONTIER]
        with pytest.raises(PortfolioError, match="the state has the tiers frontier, small, the module frontier"):
            RouterModule(dspy.Predict(Double), {FRONTIER: tiers[FRONTIER]}, FRONTIER_ONLY).load_state(state)

    def test_a_router_within_a_program_is_saved_with_it(self, tiers, tmp_path):
        outer = Outer(SURE, tiers)
        outer.route.students[SMALL].demos = [dspy.Example(question=1, answer=2)]
        outer.save(tmp_path / "outer.json")
        other = Outer(Release.frontier_only(SURE.portfolio), tiers)
        other.load(tmp_path / "outer.json")
        assert other.route.release == SURE
        assert [demo["answer"] for demo in other.route.students[FRONTIER].demos] == [2]
        assert decision_of(other(question=3)).accepted.tier == SMALL

    def test_a_prompt_is_the_same_when_it_was_saved_and_loaded(self, tiers, frontier, tmp_path):
        student = dspy.Predict("point: dict -> answer: int")
        student.demos = [dspy.Example(point=Point(x=1), answer=1)]
        program = routed(tiers, ALWAYS, student)
        program.save(tmp_path / "program.json")
        other = routed(tiers, ALWAYS, dspy.Predict("point: dict -> answer: int"))
        other.load(tmp_path / "program.json")
        prompts = [decision_of(one(point={"x": 3})).accepted.completion.prompt for one in (program, other)]
        assert prompts[0] == prompts[1]


class TestInputsAndOutputs:
    def test_options_of_a_call_are_no_words_of_it(self, tiers):
        heard: list[Any] = []
        program = RouterModule(dspy.Predict(Double), tiers, SURE, listeners=(heard.append,))
        program(question=3)
        program(question=3, config={"temperature": 0.5})
        program(question=3, signature=Double.with_instructions("Twice."))
        assert {trace.query.text for trace in heard} == {"3"}
        assert len({trace.attempts[0].completion.prompt for trace in heard}) == 3

    def test_what_is_no_text_goes_to_the_frontier(self, tiers):
        program = routed(tiers, ALWAYS, dspy.Predict("picture: dspy.Image, question: int -> answer: int"))
        picture = dspy.Image("data:image/png;base64,iVBORw0KGgo=")
        trace = decision_of(program(picture=picture, question=3))
        assert (trace.accepted.tier, trace.query.requires) == (FRONTIER, {"image"})

    def test_the_answer_of_an_agent_is_not_how_it_came_to_it(self, plain):
        def look(words: str) -> str:
            """Look something up."""
            return "42"

        said = fields(next_thought="done", next_tool_name="finish", next_tool_args="{}", reasoning="so", answer=6)
        with ScriptedServer(lambda request: said) as server:
            agent = dspy.ReAct(Double, tools=[look])
            trace = decision_of(routed({**plain, SMALL: lm(server, SMALL)}, ALWAYS, agent)(question=3))
        assert trace.accepted.completion.text == "6"

    def test_a_program_that_fails_on_an_answer_is_passed_over_and_paid_for(self, plain):
        class Strict(dspy.Module):
            def __init__(self) -> None:
                super().__init__()
                self.ask = dspy.Predict(Double)

            def forward(self, question: int) -> dspy.Prediction:
                made = self.ask(question=question)
                if made.answer == 0:
                    raise ValueError("nothing doubles to 0")
                return made

        trace = decision_of(routed(plain, ALWAYS, Strict())(question=7))
        assert trace.accepted.tier == FRONTIER
        assert trace.attempts[0].completion.cost_usd > 0
        made = RouterOptimizer(right, retention=0.9).compile(
            RouterModule(Strict(), plain, FRONTIER_ONLY), valset=examples(100, 160)
        )
        assert decision_of(made(question=120)).accepted.tier == FRONTIER

    def test_what_is_no_prediction_is_named(self, plain):
        class Text(dspy.Module):
            def forward(self, question: int) -> str:
                return "six"

        with pytest.raises(DataError, match=r"Text returned a str; a program returns a dspy.Prediction"):
            routed(plain, ALWAYS, Text())(question=3)
        with pytest.raises(PortfolioError, match="student: big is no tier; tiers: small, frontier"):
            RouterModule({**dict.fromkeys(plain, dspy.Predict(Double)), "big": dspy.Predict(Double)}, plain, SURE)


FRONTIER_ONLY = Release.frontier_only(PORTFOLIO)


class TestOptimising:
    def test_another_metric_or_program_is_asked_anew(self, plain, tmp_path):
        file = tmp_path / "outcomes.jsonl"
        module = RouterModule(dspy.Predict(Double), plain, FRONTIER_ONLY)
        RouterOptimizer(lambda example, prediction: True, outcomes=file).compile(module, valset=examples(100, 130))
        with pytest.raises(DataError, match="other"):
            RouterOptimizer(right, outcomes=file).compile(module, valset=examples(100, 130))

    def test_examples_are_handed_over_as_they_are(self, frontier, plain):
        seen: set[type] = set()

        class Typed(dspy.Module):
            def __init__(self) -> None:
                super().__init__()
                self.ask = dspy.Predict("point: dict -> answer: int")

            def forward(self, point: Any) -> dspy.Prediction:
                seen.add(type(point))
                return self.ask(point=point.model_dump())

        valset = [dspy.Example(point=Point(x=n), answer=2).with_inputs("point") for n in range(40)]
        module = RouterModule(Typed(), plain, FRONTIER_ONLY)
        RouterOptimizer(lambda example, prediction: 1.0).compile(module, valset=valset)
        module(**valset[0].inputs())
        assert seen == {Point}

    def test_a_judge_runs_where_the_optimiser_was_called(self, plain):
        judge = dspy.Predict("question, answer -> score: float")

        def judged(example: Any, prediction: Any, trace: Any) -> float:
            assert trace is None
            return judge(question=str(example.question), answer=str(prediction.answer)).score

        with ScriptedServer(lambda request: fields(score=1.0)) as server, dspy.context(lm=lm(server, "judge")):
            module = RouterModule(dspy.Predict(Double), plain, FRONTIER_ONLY)
            made = RouterOptimizer(judged, retention=0.9).compile(module, valset=examples(100, 160))
            assert len(server.requests) == 120
        assert made.release.certificate.certified

    def test_teachers_stay_as_they_are(self, plain, frontier):
        shots = dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=1, max_labeled_demos=0)
        teacher = dspy.Predict(Double)
        teacher.set_lm(lm(frontier, "teacher"))
        module = RouterModule(dspy.Predict(Double), plain, FRONTIER_ONLY)
        optimiser = RouterOptimizer(right, prompts={SMALL: shots})
        optimiser.compile(module, trainset=examples(0, 8), valset=examples(100, 120), teacher=teacher)
        assert teacher.lm.model == "openai/teacher"
        assert "teacher" in {request["model"] for request in frontier.requests}
        with pytest.raises(PortfolioError, match="KNNFewShot compiles without a trainset"):
            knn = dspy.KNNFewShot(1, examples(0, 8), lambda texts: np.zeros((len(texts), 1)))
            RouterOptimizer(right, prompts=knn).compile(module, trainset=examples(0, 8), valset=examples(100, 120))

    def test_the_class_of_a_module_is_kept(self, plain):
        class Mine(RouterModule):
            pass

        module = Mine(dspy.Predict(Double), plain, FRONTIER_ONLY)
        made = RouterOptimizer(lambda example, prediction: 1.0, retention=0.9).compile(
            module, valset=examples(100, 160)
        )
        assert type(made) is Mine


def test_decisions_within_decisions_are_one_trace(plain, tiers, tmp_path):
    with TraceStore(tmp_path / "traces.db") as store:
        program = routed(plain, ALWAYS, routed(tiers))
        with dspy.context(callbacks=[SignalCallback(store)]):
            program(question=7)
        store.flush(10)
        assert len(list(store.traces())) == 1
