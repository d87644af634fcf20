"""`RouterModule` around programs: decisions, DSPy's trace, streams, errors, copies, saving, optimisers over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy_world import Double, examples, fields, lm, number, right
from helpers import FRONTIER, SMALL, gated, release_beyond

from dspy_routenlp import Reading, RouterModule, decision_of, tier_lm
from routenlp_plugins import Completion, PortfolioError, Release, ReleaseError, ScoredTier, TierError
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer, ScriptedTier

SURE = release_beyond(gated(SMALL, 0.5, "verifier"))
"""Accepts what the verifier of the small tier accepts: numbers below five."""


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
def tiers(small, frontier) -> dict[str, Any]:
    verified = ScoredTier(lm(small, SMALL), {"verifier": lambda query, answer: answer != "0"})
    return {SMALL: verified, FRONTIER: lm(frontier, FRONTIER)}


def routed(tiers: dict[str, Any], used: Release = SURE, **more: Any) -> RouterModule:
    return RouterModule(dspy.Predict(Double), tiers, used, **more)


EXAMPLES = examples(0, 8)


class TestDecisions:
    async def test_sync_async_and_batch_alike(self, tiers):
        program = routed(tiers)
        found = [program(question=n) for n in range(8)]
        assert [one.answer for one in found] == [2 * n for n in range(8)]
        # zero doubled is what the verifier takes for a failure
        assert [decision_of(one).accepted.tier for one in found] == [FRONTIER, *[SMALL] * 4, *[FRONTIER] * 3]
        told = [facts(one) for one in found]
        assert [facts(await program.acall(question=n)) for n in range(8)] == told
        batch = program.batch(EXAMPLES, num_threads=3, disable_progress_bar=True)
        assert [facts(one) for one in batch] == told

    def test_costs_and_evidence_are_of_all_calls_within(self, small, frontier):
        class Twice(dspy.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = dspy.Predict(Double), dspy.Predict(Double)

            def forward(self, question: int) -> dspy.Prediction:
                return self.second(question=self.first(question=question).answer)

        tiers = {SMALL: lm(small, SMALL), FRONTIER: lm(frontier, FRONTIER)}
        once = decision_of(RouterModule(dspy.Predict(Double), tiers, release_beyond(Rung(SMALL)))(question=1))
        twice = decision_of(RouterModule(Twice(), tiers, release_beyond(Rung(SMALL)))(question=1))
        one, two = once.accepted.completion, twice.accepted.completion
        assert two.output_tokens == 2 * one.output_tokens
        assert len(two.token_logprobs) == 2 * len(one.token_logprobs)
        assert twice.cost_usd > 1.9 * once.cost_usd
        assert (one.model, two.text) == (SMALL, "4")

    def test_an_answer_that_cannot_be_parsed_is_paid_for_and_passed_over(self, frontier):
        with ScriptedServer(lambda request: "no fields at all") as mumbling:
            tiers = {SMALL: lm(mumbling, SMALL), FRONTIER: lm(frontier, FRONTIER)}
            found = routed(tiers, release_beyond(Rung(SMALL)))(question=4)
        trace = decision_of(found)
        assert (found.answer, trace.accepted.tier) == (8, FRONTIER)
        assert not trace.attempts[0].completion.valid
        # DSPy asked it twice, the second time for JSON
        assert len(mumbling.requests) == 2
        assert trace.attempts[0].completion.output_tokens == 8
        assert "not valid: small" in trace.reason

    @pytest.mark.parametrize(("confidence", "tier"), [(0.9, SMALL), (0.1, FRONTIER)])
    def test_what_a_tier_of_the_core_knows_of_its_answer_counts(self, frontier, confidence, tier):
        said = Completion(fields(answer=6), confidence=confidence, scores={"margin": 0.25})
        tiers = {SMALL: tier_lm(ScriptedTier(default=said), SMALL), FRONTIER: lm(frontier, FRONTIER)}
        trace = decision_of(routed(tiers, release_beyond(gated(SMALL, 0.5, "confidence")))(question=3))
        assert trace.accepted.tier == tier
        told = trace.attempts[0].completion
        assert (told.confidence, told.scores, told.mean_logprob) == (confidence, {"margin": 0.25}, None)

    def test_usage_is_that_of_all_attempts(self, tiers):
        with dspy.context(track_usage=True):
            usage = routed(tiers)(question=7).get_lm_usage()
        assert {name.partition("/")[2] for name in usage} == {SMALL, FRONTIER}

    def test_the_words_of_query_and_answer_are_the_callers(self, tiers):
        heard: list[Any] = []
        reading = Reading(query=lambda inputs: f"double {inputs['question']}", answer=lambda made: f"={made.answer}")
        routed(tiers, reading=reading, listeners=(heard.append,))(question=3)
        assert (heard[0].query.text, heard[0].accepted.completion.text) == ("double 3", "=6")

    def test_other_instructions_or_demonstrations_are_another_prompt(self, tiers):
        program = routed(tiers)
        before = decision_of(program(question=3)).accepted.completion.prompt
        student = program.students[SMALL]
        student.demos = [dspy.Example(question=1, answer=2)]
        shown = decision_of(program(question=3)).accepted.completion.prompt
        student.demos = []
        student.signature = student.signature.with_instructions("Twice, please.")
        told = decision_of(program(question=3)).accepted.completion.prompt
        assert len({before, shown, told}) == 3
        # an empty option is none
        assert decision_of(program(question=3, config={})).accepted.completion.prompt == told

    def test_tasks(self, tiers):
        program = routed(
            tiers, release_beyond(gated(SMALL, 0.5, "verifier"), (), "t", "other"), reading=Reading(task="t")
        )
        assert decision_of(program(question=3)).task == "t"
        assert decision_of(program(question=3, routenlp_task="other")).accepted.tier == FRONTIER
        with dspy.context(routenlp_task="other"):
            assert decision_of(program(question=3)).task == "other"
        with pytest.raises(PortfolioError, match="'no' is unknown to the release"):
            routed(tiers, reading=Reading(task="no"))


def facts(prediction: dspy.Prediction) -> tuple[Any, ...]:
    trace = decision_of(prediction)
    return prediction.answer, trace.accepted.tier, len(trace.attempts), trace.cost_usd, trace.reason


class TestTrace:
    """Optimisers learn from DSPy's trace: nothing of a rejected attempt may be in it."""

    def test_only_the_accepted_attempt_is_in_it(self, tiers):
        with dspy.context(trace=[]):
            routed(tiers)(question=7)
            ((predictor, inputs, outputs),) = dspy.settings.trace
        assert (inputs, outputs.answer) == ({"question": 7}, 14)
        assert isinstance(predictor, dspy.Predict)

    def test_bootstrapping_over_it_learns_right_answers_only(self, tiers):
        optimiser = dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=8, max_labeled_demos=0)
        made = optimiser.compile(routed(tiers), trainset=EXAMPLES)
        (predictor,) = {id(student): student for student in made.students.values()}.values()
        assert [(demo["question"], demo["answer"]) for demo in predictor.demos] == [(n, 2 * n) for n in range(8)]
        assert made(question=6).answer == 12

    def test_evaluation(self, tiers):
        evaluate = dspy.Evaluate(devset=EXAMPLES, metric=right, num_threads=2, display_progress=False)
        assert evaluate(routed(tiers)).score == 100.0


class TestStreams:
    @pytest.mark.parametrize(("question", "pieces"), [(3, 0), (7, 1)])
    async def test_no_word_of_what_may_be_rejected(self, small, tiers, question, pieces):
        program = routed(tiers)
        stream = dspy.streamify(program)(question=question)
        parts = [part async for part in stream]
        words = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
        assert parts[-1].answer == question * 2
        assert words == (fields(answer=question * 2) if pieces else "")


class TestErrors:
    def test_what_a_failing_frontier_raises_is_known(self, small, frontier, tiers):
        frontier.fail(429, times=9)
        with pytest.raises(dspy.LMRateLimitError) as caught:
            routed(tiers)(question=7)
        assert "routenlp: no tier answered (small: answer rejected" in caught.value.__notes__[-1]

    def test_so_is_what_the_program_itself_raises(self, tiers):
        class Broken(dspy.Module):
            def forward(self, question: int) -> dspy.Prediction:
                raise KeyError("a bug of one's own")

        with pytest.raises(KeyError, match="a bug of one's own"):
            RouterModule(Broken(), tiers, SURE)(question=1)

    def test_without_history_there_is_no_evidence(self, tiers):
        with dspy.context(disable_history=True), pytest.raises((PortfolioError, TierError), match="disable_history"):
            routed(tiers)(question=1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({SMALL: ScriptedTier()}, "small must be a dspy.LM, got ScriptedTier; anything else answers inside"),
            ({SMALL: "gpt-4o"}, "small must be a dspy.LM"),
        ],
    )
    def test_tiers_that_are_none(self, tiers, change, message):
        with pytest.raises(PortfolioError, match=message):
            routed({**tiers, **change})

    def test_students_that_are_none(self, tiers):
        with pytest.raises(PortfolioError, match=r"tier frontier needs a dspy.Module, got NoneType"):
            RouterModule({SMALL: dspy.Predict(Double)}, tiers, SURE)


class TestSaving:
    def test_copies_share_tiers_and_keep_their_own_prompts(self, tiers):
        program = routed(tiers)
        other = program.deepcopy()
        other.students[SMALL].demos = [dspy.Example(question=1, answer=2)]
        assert program.students[SMALL].demos == []
        assert other.students[SMALL] is other.students[FRONTIER]
        assert other.tiers[SMALL] is program.tiers[SMALL]
        assert other.reset_copy()(question=3).answer == 6

    def test_state_is_prompts_and_release(self, tiers, tmp_path):
        program = routed(tiers)
        program.students[SMALL].demos = [dspy.Example(question=1, answer=2)]
        program.save(tmp_path / "program.json")
        other = routed(tiers, Release.frontier_only(SURE.portfolio))
        other.load(tmp_path / "program.json")
        assert other.release == SURE
        assert [demo["answer"] for demo in other.students[FRONTIER].demos] == [2]
        assert decision_of(other(question=3)).accepted.tier == SMALL

    def test_prompts_of_their_own_for_each_tier(self, tiers, tmp_path):
        program = RouterModule({name: dspy.Predict(Double) for name in tiers}, tiers, SURE)
        program.students[SMALL].demos = [dspy.Example(question=1, answer=2)]
        program.save(tmp_path / "program.json")
        other = routed(tiers)
        other.load(tmp_path / "program.json")
        assert (len(other.students[SMALL].demos), len(other.students[FRONTIER].demos)) == (1, 0)

    def test_an_edited_release_is_refused_and_nothing_changed(self, tiers, tmp_path):
        program = routed(tiers)
        state = program.dump_state()
        state["routenlp"]["release"]["release.json"] = state["routenlp"]["release"]["manifest.json"]
        other = routed(tiers, Release.frontier_only(SURE.portfolio))
        with pytest.raises(ReleaseError, match="truncated or edited"):
            other.load_state(state)
        with pytest.raises(PortfolioError, match="not that of a RouterModule"):
            other.load_state(dspy.Predict(Double).dump_state())
        assert decision_of(other(question=3)).accepted.tier == FRONTIER

    def test_a_whole_program_is_pickled_by_dspy(self, frontier, tmp_path):
        small = lm(frontier, SMALL)
        program = RouterModule(dspy.Predict("question -> answer"), {SMALL: small, FRONTIER: small}, ALL)
        program.save(tmp_path / "whole", save_program=True)
        loaded = dspy.load(str(tmp_path / "whole"), allow_pickle=True)
        assert decision_of(loaded(question="3")).accepted.tier == SMALL


ALL = release_beyond(Rung(SMALL))
