"""`SignalCallback`: what programs of DSPy do becomes traces and signals; behind a router it is the decision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from dspy_world import ALWAYS, NEVER, fields, lm
from helpers import FRONTIER, SMALL, kept, signals

from dspy_routenlp import RouterEngine, RouterModule, SignalCallback, decision_of, shadow_tiers
from routenlp_plugins import Portfolio, PortfolioError, Shadow, ShadowOptions, Task, Tier, TraceStore
from routenlp_plugins.testing import ScriptedServer

QA = "question -> answer"
PORTFOLIO = Portfolio((Tier(SMALL, 1, 1), Tier(FRONTIER, 10, 10)), FRONTIER, (Task("qa"), Task("other")))


@pytest.fixture
def store(tmp_path) -> Iterator[TraceStore]:
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    def reply(request: Any) -> str:
        (asked,) = re.findall(r"\[\[ ## question ## \]\]\s*(.+)", request["messages"][-1]["content"])[-1:]
        return "mumbling" if "mumble" in asked else fields(answer=f"{request['model']} on {asked}")

    with ScriptedServer(reply) as running:
        yield running


def test_calls_become_traces_found_by_all_calls_around_them(store, server):
    callback = SignalCallback(store, portfolio=PORTFOLIO, task="qa")
    ids = Ids()
    with dspy.context(lm=lm(server, FRONTIER), callbacks=[callback, ids]):
        dspy.Predict(QA)(question="where is it?")
    (found,) = kept(store)
    (attempt,) = found.trace.attempts
    assert (attempt.tier, attempt.accepted, found.trace.task, found.origin) == (FRONTIER, True, "qa", "collected")
    assert attempt.completion.model == FRONTIER
    assert attempt.completion.token_logprobs
    assert attempt.completion.cost_usd == pytest.approx(
        (attempt.completion.input_tokens + attempt.completion.output_tokens) * 10 / 1e6
    )
    assert "where is it?" in found.trace.query.text
    assert [one[1:] for one in signals(store)] == [("parser", "parser:ChatAdapter", 1.0)]
    assert set(ids.modules) <= set(found.runs)
    assert len(callback._recorder.runs) == 0


async def test_awaited_and_streamed_ones_too(store, server):
    callback = SignalCallback(store, portfolio=PORTFOLIO)
    program = dspy.Predict(QA)
    with dspy.context(lm=lm(server, FRONTIER), callbacks=[callback]):
        await program.acall(question="where?")
        [part async for part in dspy.streamify(program)(question="where?")]
        program.batch([dspy.Example(question=str(n)).with_inputs("question") for n in range(4)], num_threads=2)
    found = kept(store)
    assert len(found) == 6
    assert len({one.unit for one in found}) == 6
    assert all(one.trace.accepted.completion.output_tokens for one in found)


def test_what_cannot_be_parsed_speaks_against_itself(store, server):
    with (
        dspy.context(lm=lm(server, FRONTIER), callbacks=[SignalCallback(store)]),
        pytest.raises(dspy.AdapterParseError),
    ):
        dspy.Predict(QA)(question="mumble")
    found = kept(store)
    # DSPy asks again, for JSON
    assert len(found) == 2
    assert {one[2:] for one in signals(store)} == {("parser:ChatAdapter", 0.0), ("parser:JSONAdapter", 0.0)}
    assert {one[0] for one in signals(store)} == {one.id for one in found}


def test_a_tool_that_fails_speaks_against_the_answer_that_called_it(store, server):
    def broken(words: str) -> str:
        """Look something up."""
        raise RuntimeError("out of order")

    class Agent(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask, self.tool = dspy.Predict(QA), dspy.Tool(broken)

        def forward(self, question: str) -> Any:
            answer = self.ask(question=question)
            with pytest.raises(RuntimeError):
                self.tool(words=answer.answer)
            return answer

    with dspy.context(lm=lm(server, FRONTIER), callbacks=[SignalCallback(store)]):
        Agent()(question="where?")
    assert ("tool", "tool:broken", 0.0) in [one[1:] for one in signals(store)]


def test_what_is_asked_again_was_not_answered_well(store, server):
    class Again(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict(QA)

        def forward(self, question: str) -> Any:
            self.ask(question=question)
            return self.ask(question=question)

    with dspy.context(lm=lm(server, FRONTIER), callbacks=[SignalCallback(store)]):
        Again()(question="where?")
    first, _ = kept(store)
    assert (first.id, "retry", "asked again", 0.0) in signals(store)


def test_failures_belong_to_the_next_attempt(store, server):
    server.fail(500, times=1)
    model = lm(server, FRONTIER)

    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict(QA)

        def forward(self, question: str) -> Any:
            try:
                return self.ask(question=question)
            except dspy.LMServerError:
                return self.ask(question=question)

    with dspy.context(lm=model, callbacks=[SignalCallback(store, portfolio=PORTFOLIO)]):
        Twice()(question="where?")
    (found,) = kept(store)
    assert [(attempt.accepted, attempt.error is None) for attempt in found.trace.attempts] == [
        (False, False),
        (True, True),
    ]


def test_behind_an_engine_the_whole_decision_is_kept_once(store, server):
    tiers = {SMALL: lm(server, SMALL), FRONTIER: lm(server, FRONTIER)}
    engine = RouterEngine(tiers, NEVER, listeners=(store.record,))
    with dspy.context(lm=engine.lm(), callbacks=[SignalCallback(store, portfolio=PORTFOLIO)]):
        dspy.Predict(QA)(question="where?")
    (found,) = kept(store)
    assert [attempt.tier for attempt in found.trace.attempts] == [SMALL, FRONTIER]
    assert signals(store) == [(found.id, "parser", "parser:ChatAdapter", 1.0)]


def test_what_a_cache_answers_was_kept_before(store, server):
    model = RouterEngine({SMALL: lm(server, SMALL), FRONTIER: lm(server, FRONTIER)}, ALWAYS).lm(cache=True)
    with dspy.context(lm=model, callbacks=[SignalCallback(store)]):
        for _ in range(2):
            dspy.Predict(QA)(question="once and again?")
    assert len(kept(store)) == 1


async def test_behind_a_module_too(store):
    with ScriptedServer(lambda request: fields(reasoning="so", answer="there")) as other:
        tiers = {SMALL: lm(other, SMALL), FRONTIER: lm(other, FRONTIER)}
        program = RouterModule(dspy.ChainOfThought(QA), tiers, NEVER, listeners=(store.record,))
        with dspy.context(callbacks=[SignalCallback(store, portfolio=PORTFOLIO)]):
            told = [decision_of(program(question="where?")), decision_of(await program.acall(question="where?"))]
    found = kept(store)
    assert [one.trace.id for one in found] == [one.id for one in told] == [one.id for one in found]
    assert [attempt.tier for attempt in found[0].trace.attempts] == [SMALL, FRONTIER]


@pytest.mark.parametrize("demonstrations", [True, False])
def test_the_prompt_is_known_as_the_router_will_know_it(store, server, demonstrations):
    program = dspy.Predict(QA)
    program.demos = [dspy.Example(question="1", answer="2")]
    callback = SignalCallback(store, portfolio=PORTFOLIO, task="t", demonstrations=demonstrations)
    tiers = {SMALL: lm(server, SMALL), FRONTIER: lm(server, FRONTIER, temperature=0.5)}
    for model in (tiers[FRONTIER], RouterEngine(tiers, ALWAYS, demonstrations=demonstrations).lm()):
        with dspy.context(lm=model, callbacks=[callback]):
            program(question="where?")
    collected, served = kept(store)
    assert collected.trace.accepted.completion.prompt == served.trace.accepted.completion.prompt != "none"


def test_what_an_evaluation_calls_does_not_belong_together(store, server):
    examples = [dspy.Example(question=str(n)).with_inputs("question") for n in range(4)]
    evaluate = dspy.Evaluate(devset=examples, metric=lambda *_: 1.0, num_threads=2, display_progress=False)
    with dspy.context(lm=lm(server, FRONTIER), callbacks=[SignalCallback(store)]):
        evaluate(dspy.Predict(QA))
    assert len({one.unit for one in kept(store)}) == 4


def test_tasks_and_dialogues_come_from_the_context(store, server):
    callback = SignalCallback(store, portfolio=PORTFOLIO, task="qa")
    with dspy.context(lm=lm(server, FRONTIER), callbacks=[callback], routenlp_task="other", thread_id="dialogue-7"):
        dspy.Predict(QA)(question="where?")
    (found,) = kept(store)
    assert (found.trace.task, found.unit) == ("other", "dialogue-7")


def test_a_share_goes_to_other_tiers_too(store, server):
    tiers = shadow_tiers({SMALL: lm(server, SMALL)})
    with Shadow(store, PORTFOLIO, tiers, ShadowOptions(share=1.0)) as shadow:
        callback = SignalCallback(store, portfolio=PORTFOLIO, task="qa", shadow=shadow)
        with dspy.context(lm=lm(server, FRONTIER), callbacks=[callback]):
            dspy.Predict(QA)(question="where?")
        shadow.close()
    assert {request["model"] for request in server.requests} == {SMALL, FRONTIER}
    one, two = (request["messages"] for request in server.requests)
    assert one == two


def test_a_tier_that_there_is_not(store):
    with pytest.raises(PortfolioError, match="'big'"):
        SignalCallback(store, portfolio=PORTFOLIO, tiers={"gpt-4o": "big"})
    with pytest.raises(PortfolioError, match=r"small must be a dspy.LM"):
        shadow_tiers({SMALL: "gpt-4o-mini"})


class Ids(BaseCallback):
    """Remembers the ids of modules."""

    def __init__(self) -> None:
        self.modules: list[str] = []

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.modules.append(call_id)
