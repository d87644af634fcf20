"""Certificates watched while programs and models answer: what an audit asks, and who hears of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from dspy_world import Double, fields, lm, number
from helpers import FRONTIER, SMALL, kept, portfolio, row

from dspy_routenlp import RouterEngine, RouterModule, decision_of
from routenlp_plugins import AuditOptions, FitOptions, PortfolioError, Release, TraceStore, fit
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.testing import ScriptedServer

ALL = AuditOptions(share=1.0)


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    """Always wrong."""
    with ScriptedServer(lambda request: fields(answer=0)) as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: fields(answer=number(request) * 2)) as server:
        yield server


@pytest.fixture
def tiers(small, frontier) -> dict[str, Any]:
    return {SMALL: lm(small, SMALL), FRONTIER: lm(frontier, FRONTIER)}


@pytest.fixture(scope="module")
def fitted() -> Release:
    """On a small tier that was always right."""
    members = [row(f"q{n}", small=(1.0, None), frontier=(1.0, None)) for n in range(200)]
    return fit(members, portfolio(), alpha=0.1, options=FitOptions(unlike=0))


class Marked(dspy.ChatAdapter):
    """Another prompt."""

    def format_task_description(self, signature: Any) -> str:
        return "MARKED " + super().format_task_description(signature)


class Heard(BaseCallback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.calls.append(instance.model)


def until(condition: Callable[[], object]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come true")


async def test_a_program_is_audited_as_it_was_run_and_nobody_hears_of_it(small, frontier, tiers, fitted, tmp_path):
    def right(query: Any, completion: Any) -> float:
        return float(completion.payload.prediction.answer == 2 * query.payload.inputs["question"])

    module, heard, log = RouterModule(dspy.Predict(Double), tiers, fitted), Heard(), tmp_path / "audits.jsonl"
    own = dspy.context(callbacks=[heard], track_usage=True, adapter=Marked())
    with module.audited(right, log, ALL) as watched, own:
        for n in range(5, 35):
            made = watched(question=n) if n % 2 else await watched.acall(question=n)
            assert set(made.get_lm_usage()) == {f"openai/{decision_of(made).accepted.tier}"}
        until(lambda: watched.expired)
        assert "audits show that" in watched.expired["t"]
        after = watched(question=40)
        assert (after.answer, decision_of(after).accepted.tier) == (80, FRONTIER)
    assert module.expired == {}
    members = read_outcomes(log)
    assert len(members) == 31
    assert {(one.outcomes[SMALL].quality, one.outcomes[FRONTIER].quality) for one in members} == {(0.0, 1.0)}
    # one prompt, under the settings of each run
    assert len({outcome.completion.prompt for one in members for outcome in one.outcomes.values()}) == 1
    # every query was put to both tiers, in the prompt of its own settings; the tier that answered was heard of
    for server in (small, frontier):
        assert ["MARKED" in str(request["messages"]) for request in server.requests] == [True] * 31
    assert len(heard.calls) == len(watched.history) == 31


async def test_an_engine_is_audited_and_its_store_has_each_call_once(tiers, fitted, tmp_path):
    engine, log = RouterEngine(tiers, fitted), tmp_path / "audits.jsonl"
    store = TraceStore(tmp_path / "traces.db")
    with engine.audited(lambda query, completion: float("\n0\n" not in completion.text), log, ALL, store) as watched:
        program = dspy.Predict(Double)
        with dspy.context(lm=watched.lm()):
            for n in range(1, 31):
                assert (program(question=n) if n % 2 else await program.acall(question=n)).answer in (0, 2 * n)
            until(lambda: watched.expired)
            assert program(question=4).answer == 8
        with pytest.raises(PortfolioError, match="has no cache, which would outlive its certificate"):
            watched.lm(cache=True)
        assert copy.deepcopy(program).lm is None and copy.deepcopy(watched.lm()).engine.auditor is watched.auditor
    assert engine.expired == {}
    assert len(read_outcomes(log)) == 31
    found = kept(store)
    store.close()
    assert len(found) == 31
    assert {one.propensity for one in found} == {1.0}


def test_what_is_changed_while_it_is_watched_must_be_watched_by_itself(tiers, fitted, tmp_path):
    module = RouterModule(dspy.Predict(Double), tiers, fitted)
    with module.audited(lambda *_: 1.0, tmp_path / "audits.jsonl") as watched:
        other = watched.routed(Release.frontier_only(portfolio()))
        with pytest.raises(PortfolioError, match="other tiers or another release: audit it by itself"):
            other(question=1)
        assert watched.deepcopy()(question=3).answer == 0
        best = dspy.BestOfN(watched, N=2, reward_fn=lambda inputs, made: 1.0, threshold=1.0)
        assert best(question=3).answer in (0, 6)
