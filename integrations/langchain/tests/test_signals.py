"""A handler on a chain that exists without us: what it keeps, and what the chain tells of its own quality."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, kept, portfolio, release, rows, signals
from helpers import QUESTION as QUESTION_SEEN
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from langchain_routenlp import RouterChatModel, RouterRunnable, SignalCallbackHandler, shadow_tiers
from routenlp_plugins import (
    AuditOptions,
    Completion,
    Portfolio,
    PortfolioError,
    Release,
    Shadow,
    ShadowOptions,
    Task,
    Tier,
    TraceStore,
    fit,
)
from routenlp_plugins.testing import ScriptedServer

PROMPT = ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{text}")])
QUESTION = {"text": "where is my card?"}


class Reply(BaseModel):
    """A structured reply."""

    text: str


class Script:
    """What the server answers next, once each; the last again and again."""

    def __init__(self) -> None:
        self.answers: list[str] = ["an answer"]

    def __call__(self, request: Any) -> str:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def server(script):
    with ScriptedServer(script) as running:
        yield running


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


def chat(server: ScriptedServer, name: str = "big-model", **facts: Any) -> ChatOpenAI:
    headers = {"Connection": "close"}
    return ChatOpenAI(model=name, base_url=server.url, api_key="none", max_retries=0, default_headers=headers, **facts)


def test_a_chain_leaves_a_trace_with_all_that_its_model_said(server, store):
    handler = SignalCallbackHandler(store, portfolio=portfolio(), tiers={"big-model": FRONTIER}, task="t")
    chain = PROMPT | chat(server, logprobs=True) | StrOutputParser()
    assert chain.invoke(QUESTION, {"callbacks": [handler]}) == "an answer"
    (found,) = kept(store)
    (attempt,) = found.trace.attempts
    completion = attempt.completion
    assert (found.origin, found.trace.task, found.trace.query.text) == ("collected", "t", QUESTION["text"])
    assert found.trace.query.messages[0] == {"role": "system", "content": "Be kind."}
    assert (attempt.tier, attempt.accepted, completion.text) == (FRONTIER, True, "an answer")
    assert completion.model == "big-model"
    assert completion.input_tokens > 0
    assert completion.token_logprobs
    assert completion.latency_ms > 0
    assert completion.cost_usd == pytest.approx((completion.input_tokens + completion.output_tokens) * 10 / 1e6)


def test_the_prompt_is_known_as_the_router_will_know_it(server, store):
    """Outcomes that are made of such traces certify the prompt that the router meets in the same chain."""
    handler = SignalCallbackHandler(store, portfolio=portfolio(), task="t")
    chain = PROMPT | chat(server, temperature=0.5).bind(stop=["\n"]) | StrOutputParser()
    chain.invoke(QUESTION, {"callbacks": [handler]})
    routed = RouterRunnable.from_chain(chain, tiers={SMALL: lambda call: Completion("no")}, release=release(), task="t")
    routed.invoke(QUESTION, {"callbacks": [handler]})
    collected, served = kept(store)
    assert collected.trace.accepted.completion.prompt == served.trace.accepted.completion.prompt != "none"


async def test_a_chain_that_is_awaited_or_streamed_leaves_the_same(server, store):
    handler = SignalCallbackHandler(store)
    chain = PROMPT | chat(server) | StrOutputParser()
    config = {"callbacks": [handler]}
    chain.invoke(QUESTION, config)
    await chain.ainvoke(QUESTION, config)
    list(chain.stream(QUESTION, config))
    assert [chunk async for chunk in chain.astream(QUESTION, config)]
    chain.batch([QUESTION, QUESTION], config)
    await asyncio.gather(*(chain.ainvoke(QUESTION, config) for _ in range(3)))
    found = kept(store)
    assert len(found) == 9
    assert {recorded.trace.attempts[0].completion.text for recorded in found} == {"an answer"}
    assert len({recorded.unit for recorded in found}) == 9
    assert signals(store) == []
    assert len(handler._recorder.runs) == 0


def test_feedback_to_the_run_of_the_user_finds_its_trace(server, store):
    handler = SignalCallbackHandler(store)
    chain = PROMPT | chat(server) | StrOutputParser()
    mine = uuid4()
    chain.invoke(QUESTION, {"callbacks": [handler], "run_id": mine})
    store.signal(mine, "thumbs", 1)
    assert str(mine) in kept(store)[0].runs
    assert store.counts().unknown_signals == 0


def test_an_answer_that_the_parser_cannot_read_is_a_signal(server, store, script):
    handler = SignalCallbackHandler(store)
    chain = PROMPT | chat(server) | JsonOutputParser()
    script.answers = ["no json", '{"a": 1}']
    with pytest.raises(ValueError, match="Invalid json output"):
        chain.invoke(QUESTION, {"callbacks": [handler]})
    chain.invoke(QUESTION, {"callbacks": [handler]})
    bad, good = kept(store)
    assert signals(store) == [
        (bad.id, "parser", "parser:JsonOutputParser", 0.0),
        (good.id, "parser", "parser:JsonOutputParser", 1.0),
    ]


def test_structured_output_tells_whether_it_is_valid(server, store, script):
    handler = SignalCallbackHandler(store)
    script.answers = ["nothing of the kind", '{"text": "yes"}']
    model = chat(server).with_structured_output(Reply, method="json_mode", include_raw=True)
    for _ in range(2):
        (PROMPT | model).invoke(QUESTION, {"callbacks": [handler]})
    said = [(kind, source, value) for _, kind, source, value in signals(store) if "structured" in source]
    assert said == [("parser", "parser:structured output", 0.0), ("parser", "parser:structured output", 1.0)]


def test_a_validator_behind_the_model_is_a_signal(server, store, script):
    handler = SignalCallbackHandler(store)
    script.answers = ['{"wrong": 1}']
    strict = RunnableLambda(lambda message: Reply.model_validate_json(message.content))
    with pytest.raises(ValueError, match="Reply"):
        (PROMPT | chat(server) | strict).invoke(QUESTION, {"callbacks": [handler]})
    (found,) = kept(store)
    assert signals(store) == [(found.id, "validator", "validator:Reply", 0.0)]


def test_a_question_that_is_asked_again_was_not_answered_well(server, store, script):
    handler = SignalCallbackHandler(store)
    script.answers = ["no json", '{"text": "yes"}']
    chain = (PROMPT | chat(server) | PydanticOutputParser(pydantic_object=Reply)).with_retry(stop_after_attempt=2)
    chain.invoke(QUESTION, {"callbacks": [handler]})
    first, second = kept(store)
    assert (first.id, "retry", "asked again", 0.0) in signals(store)
    assert not [one for one in signals(store) if one[0] == second.id and one[3] == 0]
    assert first.unit == second.unit


def test_failed_attempts_belong_to_the_trace_of_the_answer(server, store):
    handler = SignalCallbackHandler(store)
    server.fail(500, times=1)
    model = chat(server).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    (PROMPT | model | StrOutputParser()).invoke(QUESTION, {"callbacks": [handler]})
    (found,) = kept(store)
    assert [attempt.completion is None for attempt in found.trace.attempts] == [True, False]
    assert "Error code: 500" in found.trace.attempts[0].error
    assert 0 in found.runs.values()


def test_a_model_that_never_answers_leaves_its_failures(server, store):
    handler = SignalCallbackHandler(store)
    server.fail(500, times=5)
    with pytest.raises(Exception, match="scripted"):
        (PROMPT | chat(server)).invoke(QUESTION, {"callbacks": [handler]})
    (found,) = kept(store)
    assert [attempt.accepted for attempt in found.trace.attempts] == [False]
    assert found.trace.reason == "every call of the model failed"


def test_tools_tell_of_the_call_that_asked_for_them(server, store):
    @tool
    def balance(account: str) -> str:
        """The balance of an account."""
        if account == "none":
            raise ValueError("no such account")
        return "5"

    def agent(account: str) -> Any:
        def run(_: Any, config: Any) -> Any:
            (PROMPT | chat(server)).invoke(QUESTION, config)
            return balance.invoke({"account": account}, config)

        return RunnableLambda(run)

    handler = SignalCallbackHandler(store)
    agent("mine").invoke(QUESTION, {"callbacks": [handler]})
    with pytest.raises(ValueError, match="no such account"):
        agent("none").invoke(QUESTION, {"callbacks": [handler]})
    good, bad = kept(store)
    assert signals(store) == [(good.id, "tool", "tool:balance", 1.0), (bad.id, "tool", "tool:balance", 0.0)]


def test_calls_of_one_thread_belong_together(server, store):
    handler = SignalCallbackHandler(store)
    chain = PROMPT | chat(server)
    for _ in range(2):
        chain.invoke(QUESTION, {"callbacks": [handler], "metadata": {"thread_id": "dialogue"}})
    assert [found.unit for found in kept(store)] == ["dialogue", "dialogue"]


def test_behind_a_router_the_whole_decision_is_kept(server, store):
    handler = SignalCallbackHandler(store)
    tiers = {SMALL: lambda call: Completion("a guess", confidence=0.2, input_tokens=3, output_tokens=1)}
    chain = PROMPT | chat(server) | StrOutputParser()
    routed = RouterRunnable.from_chain(chain, tiers=tiers, release=release(gated(SMALL, 0.9)), task="t")
    mine = uuid4()
    routed.invoke(QUESTION, {"callbacks": [handler], "run_id": mine})
    asyncio.run(routed.ainvoke(QUESTION, {"callbacks": [handler]}))
    first, second = kept(store)
    assert first.trace.attempts[0].completion.text == "a guess"
    assert [attempt.tier for attempt in first.trace.attempts] == [SMALL, FRONTIER]
    assert first.trace.attempts[0].confidence == pytest.approx(0.2)
    assert (first.origin, first.trace.reason) == ("served", "frontier: no cheaper answer was accepted")
    assert str(mine) in first.runs
    assert len(second.trace.attempts) == 2
    assert json.dumps(AIMessage("x").model_dump())


def test_an_audited_chain_with_a_handler_is_kept_once_with_its_run_ids_and_audits(server, store, tmp_path):
    fitted = fit(rows(600), portfolio(), alpha=0.2)

    def sure(call):
        return Completion("right", confidence=1.0, input_tokens=10, output_tokens=1, prompt="p")

    model = RouterChatModel(tiers={SMALL: sure, MIDDLE: sure, FRONTIER: chat(server)}, release=fitted, task="t")
    handler, mine = SignalCallbackHandler(store), uuid4()
    with model.audited(lambda *_: 0.5, tmp_path / "log.jsonl", AuditOptions(share=1.0), store) as watched:
        (PROMPT | watched).invoke({"text": QUESTION_SEEN}, {"callbacks": [handler], "run_id": mine})
    store.signal(str(mine), "thumbs", 1)
    (found,) = kept(store)
    assert str(mine) in found.runs
    assert (found.propensity, found.origin) == (1.0, "served")
    called = [*found.trace.attempts, *found.beside["audit"]]
    assert sorted(attempt.tier for attempt in called) == sorted([SMALL, MIDDLE, FRONTIER])
    (row,) = store.outcomes()
    assert {one.quality for one in row.outcomes.values()} == {0.5}
    assert store.counts().unknown_signals == 0


def test_what_was_cancelled_is_forgotten_with_its_root(server, store, script):
    handler = SignalCallbackHandler(store)

    async def slow(_):
        await asyncio.sleep(30)

    async def cancelled():
        task = asyncio.ensure_future((RunnableLambda(slow) | PROMPT).ainvoke("x", {"callbacks": [handler]}))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    (PROMPT | chat(server)).invoke(QUESTION, {"callbacks": [handler]})
    assert len(handler._recorder.runs) == 0


def test_a_store_that_is_closed_keeps_no_run_open(server, tmp_path, caplog):
    closed = TraceStore(tmp_path / "closed.db")
    handler = SignalCallbackHandler(closed)
    closed.close()
    answer = (PROMPT | chat(server)).invoke(QUESTION, {"callbacks": [handler]})
    assert answer.content == "an answer"
    assert "the trace store is closed" in caplog.text
    assert len(handler._recorder.runs) == 0


def test_a_long_session_id_loses_no_trace(server, store):
    handler = SignalCallbackHandler(store)
    for _ in range(2):
        (PROMPT | chat(server)).invoke(QUESTION, {"callbacks": [handler], "metadata": {"session_id": "s" * 1000}})
    first, second = kept(store)
    assert first.unit == second.unit
    assert len(first.unit) == 64


def test_of_two_calls_of_a_tool_the_one_that_failed_is_kept(server, store):
    @tool
    def look(what: str) -> str:
        """Look."""
        if what == "bad":
            raise ValueError(what)
        return what

    handler = SignalCallbackHandler(store)

    def both(message):
        for what in ("bad", "good"):
            with suppress(ValueError):
                look.invoke({"what": what})
        return message

    (PROMPT | chat(server) | RunnableLambda(both)).invoke(QUESTION, {"callbacks": [handler]})
    assert [(kind, source, value) for _, kind, source, value in signals(store)] == [("tool", "tool:look", 0.0)]


def test_a_model_is_the_tier_of_its_name(server, store, caplog):
    tiers = Portfolio((Tier("gpt-4o-mini", 0.15, 0.6), Tier("gpt-4o", 2.5, 10)), "gpt-4o")
    handler = SignalCallbackHandler(store, portfolio=tiers)
    for name in ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", "gpt-4o", "some-model"):
        (PROMPT | chat(server, name)).invoke(QUESTION, {"callbacks": [handler]})
    assert [one.trace.attempts[0].tier for one in kept(store)] == ["gpt-4o-mini", "gpt-4o-mini", "gpt-4o", "gpt-4o"]
    assert "some-model is taken for gpt-4o" in caplog.text


def test_a_task_that_is_none_or_a_tier_that_is_unknown_is_refused(server, store):
    with pytest.raises(PortfolioError, match="unknown"):
        SignalCallbackHandler(store, portfolio=portfolio(), tiers={"big-model": "nobody"})
    handler = SignalCallbackHandler(store)
    (PROMPT | chat(server)).invoke(QUESTION, {"callbacks": [handler], "metadata": {"routenlp_task": "billing"}})
    assert kept(store)[0].trace.task == "billing"


def test_a_share_of_what_was_answered_runs_on_other_models_too(server, store):
    """Two models of the same server: what the cheap one says is kept beside the answer, and no user sees it."""
    cheap = chat(server, "small-model")
    with Shadow(store, portfolio(), shadow_tiers({SMALL: cheap}), ShadowOptions(share=0.5)) as shadow:
        handler = SignalCallbackHandler(store, portfolio=portfolio(), task="t", shadow=shadow)
        chain = PROMPT | chat(server).bind(stop=["\n"]) | StrOutputParser()
        for i in range(30):
            chain.invoke({"text": f"question {i}"}, {"callbacks": [handler]})
    found = kept(store)
    ran = [recorded for recorded in found if recorded.beside]
    assert len(found) == 30
    assert {recorded.id for recorded in ran} == {recorded.id for recorded in found if shadow.drawn(recorded.id)}
    assert 5 < len(ran) < 25
    for recorded in ran:
        (attempt,) = recorded.beside["shadow"]
        assert (attempt.tier, attempt.completion.model) == (SMALL, "small-model")
        assert attempt.completion.prompt == recorded.trace.accepted.completion.prompt
        assert attempt.completion.cost_usd > 0
    rows = list(store.outcomes(beside="shadow"))
    assert [set(row.outcomes) for row in rows] == [{FRONTIER, SMALL}] * len(ran)


def test_calls_with_tools_run_in_the_shadow_where_the_task_has_them(store):
    """Each model calls the tool for a city of its own; what becomes of it are outcomes of the task."""

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return city

    def calling(request: Any) -> Any:
        assert request["tools"][0]["function"]["name"] == "weather" and request["tool_choice"] == "required"
        function = {"name": "weather", "arguments": json.dumps({"city": request["model"]})}
        return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}

    tiers = tuple(replace(tier, supports=("tools",)) for tier in portfolio().tiers)
    one = Portfolio((Tier(FRONTIER),), FRONTIER, (Task("t"),))
    for requires, beside in ((("tools",), 1), ((), 0)):
        used = replace(portfolio(Task("t", requires=requires)), tiers=tiers)
        with (
            ScriptedServer(calling) as server,
            Shadow(store, used, shadow_tiers({SMALL: chat(server, SMALL)}), ShadowOptions(share=1.0)) as shadow,
        ):
            handler = SignalCallbackHandler(store, portfolio=used, task="t", shadow=shadow)
            bound = chat(server, FRONTIER).bind_tools([weather], tool_choice="any")
            bound.invoke("weather?", {"callbacks": [handler]})
            # as a router in its place asks
            told = RouterChatModel(tiers={FRONTIER: chat(server, FRONTIER)}, release=Release.frontier_only(one))
            routed = told.bind_tools([weather], tool_choice="any").invoke("weather?").response_metadata["routenlp"]
        found = kept(store)[-1]
        assert found.trace.attempts[0].completion.prompt == routed["attempts"][0]["prompt"]
        assert [a.completion.text for a in found.beside.get("shadow", ())] == [
            f'[{{"args": {{"city": "{SMALL}"}}, "name": "weather"}}]'
        ] * beside
        assert not list(store.outcomes(beside="shadow"))
        assert shadow.counts().unable == 1 - beside
    (row,) = store.outcomes(beside="shadow", requires={"t": ("tools",)})
    assert set(row.outcomes) == {SMALL, FRONTIER}


def test_calls_of_no_task_are_told_and_not_shadowed(server, store, caplog):
    used = portfolio(Task("one"), Task("other"))
    with Shadow(store, used, shadow_tiers({SMALL: chat(server, SMALL)}), ShadowOptions(share=1.0)) as shadow:
        handler = SignalCallbackHandler(store, portfolio=used, shadow=shadow)
        for _ in range(2):
            chat(server, FRONTIER).invoke(QUESTION_SEEN, {"callbacks": [handler]})
    assert (shadow.counts().unable, shadow.counts().run) == (2, 0)
    assert caplog.text.count("task 'default' is none of the portfolio's (one, other)") == 1
    assert caplog.text.count("is not shadowed") == 1
