"""Streams: no token of a rejected attempt, none twice, none lost; task, decision and usage as without one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import httpx
import pytest
from helpers import FRONTIER, PRICES, SMALL, gated
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler, get_usage_metadata_callback
from langchain_core.messages import AIMessageChunk
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from langchain_routenlp import RouterChatModel, SignalCallbackHandler
from routenlp_plugins import Policy, Portfolio, Release, Task, Tier, TraceStore
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

SAID = "the frontier says so"
WORDS = [SAID[i : i + 4] for i in range(0, len(SAID), 4)]


def release(rung: Rung, *tasks: str) -> Release:
    tiers = tuple(Tier(name, PRICES[name], PRICES[name]) for name in (SMALL, FRONTIER))
    names = tasks or ("t",)
    portfolio = Portfolio(tiers, FRONTIER, tuple(Task(name) for name in names))
    return Release(portfolio, Policy(FRONTIER, {**dict.fromkeys(names, ()), names[0]: (rung,)}))


GATED, ALWAYS = release(gated(SMALL, 0.5, "token_probability")), release(Rung(SMALL))
TWO = release(Rung(SMALL), "easy", "hard")


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: {"content": "a small guess"}) as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: {"content": SAID}) as server:
        yield server


def router(small: ScriptedServer, frontier: ScriptedServer, used: Release, **more: Any) -> RouterChatModel:
    common = {"api_key": "none", "stream_usage": True, "max_retries": 0, **more}
    tiers = {
        SMALL: ChatOpenAI(model="small-model", base_url=small.url, **common),
        FRONTIER: ChatOpenAI(model="frontier-model", base_url=frontier.url, **common),
    }
    return RouterChatModel(tiers=tiers, release=used)


class Heard(BaseCallbackHandler):
    """What a handler is told, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **_: Any) -> None:
        self.events.append("start")

    def on_llm_new_token(self, token: str, *, run_id: Any, **_: Any) -> None:
        if token:
            self.events.append(token)

    def on_custom_event(self, name: str, data: Any, *, run_id: Any, **_: Any) -> None:
        self.events.append((name, data["trace"].accepted.tier))

    def on_llm_end(self, response: Any, *, run_id: Any, **_: Any) -> None:
        self.events.append("end")

    def on_llm_error(self, error: BaseException, *, run_id: Any, **_: Any) -> None:
        self.events.append(type(error).__name__)


def said(chunks: list[AIMessageChunk]) -> list[str]:
    return [chunk.text for chunk in chunks if chunk.text]


class TestTokens:
    def test_the_frontier_s_word_by_word_and_none_of_the_rejected_tier(self, small, frontier):
        heard, usage = Heard(), UsageMetadataCallbackHandler()
        with get_usage_metadata_callback() as context:
            chunks = list(router(small, frontier, GATED).stream("hi", {"callbacks": [heard, usage]}))
        assert said(chunks) == WORDS
        assert heard.events == ["start", *WORDS, ("routenlp_decision", FRONTIER), "end"]
        whole = reduce(add, chunks)
        attempts = whole.response_metadata["routenlp"]["attempts"]
        assert [attempt["tier"] for attempt in attempts] == [SMALL, FRONTIER]
        total = sum(attempt["input_tokens"] + attempt["output_tokens"] for attempt in attempts)
        assert whole.usage_metadata["total_tokens"] == total
        assert whole.response_metadata["model_name"] == "frontier-model" and chunks[-1].chunk_position == "last"
        for counted in (usage.usage_metadata, context.usage_metadata):
            assert {name: of["total_tokens"] for name, of in counted.items()} == {"frontier-model": total}

    async def test_async_streams_are_the_same(self, small, frontier):
        heard = Heard()
        async with httpx.AsyncClient() as client:
            model = router(small, frontier, GATED, http_async_client=client)
            chunks = [chunk async for chunk in model.astream("hi", {"callbacks": [heard]})]
        assert said(chunks) == WORDS
        assert heard.events == ["start", *WORDS, ("routenlp_decision", FRONTIER), "end"]

    def test_an_accepted_answer_that_was_judged_comes_in_one_piece(self, small, frontier):
        model = router(small, frontier, GATED, logprobs=True)
        chunks = list(model.stream("hi"))
        assert said(chunks) == ["a small guess"] and not frontier.requests
        whole = reduce(add, chunks)
        assert whole.response_metadata["routenlp"]["tier"] == SMALL
        assert len(whole.response_metadata["logprobs"]["content"]) == 4

    def test_the_message_is_that_of_invoke(self, small, frontier):
        for used in (GATED, ALWAYS):
            model = router(small, frontier, used)
            streamed, invoked = reduce(add, model.stream("hi")), model.invoke("hi")
            assert (streamed.text, streamed.usage_metadata) == (invoked.text, invoked.usage_metadata)
            told = [{**m.response_metadata["routenlp"], "id": "", "attempts": []} for m in (streamed, invoked)]
            assert told[0] == told[1]

    def test_a_rate_limiter_of_a_tier_is_asked(self, small, frontier):
        limiter = InMemoryRateLimiter(requests_per_second=1000, check_every_n_seconds=0.001)
        acquired = []
        original = limiter.acquire
        limiter.acquire = lambda *, blocking=True: acquired.append(1) or original(blocking=blocking)
        assert said(list(router(small, frontier, ALWAYS, rate_limiter=limiter).stream("hi")))
        assert acquired == [1]


class TestPlace:
    @pytest.mark.parametrize(("task", "tier"), [("easy", SMALL), ("hard", FRONTIER)])
    def test_the_task_in_the_metadata_counts(self, small, frontier, task, tier):
        model = router(small, frontier, TWO)
        config = {"metadata": {"routenlp_task": task}}
        chain = ChatPromptTemplate.from_template("{x}") | model
        for chunks in (model.stream("hi", config), chain.stream({"x": "hi"}, config)):
            assert reduce(add, chunks).response_metadata["routenlp"]["tier"] == tier

    def test_a_store_hears_of_a_stream_once(self, small, frontier, tmp_path):
        with TraceStore(tmp_path / "s.db") as store:
            handler = SignalCallbackHandler(store, portfolio=GATED.portfolio, task="t")
            list(router(small, frontier, GATED).stream("hi", {"callbacks": [handler]}))
            store.flush()
            (recorded,) = store.traces()
        assert [attempt.tier for attempt in recorded.trace.attempts] == [SMALL, FRONTIER]
        assert recorded.trace.accepted.completion.text == SAID

    async def test_events_of_version_2_carry_the_tokens(self, small, frontier):
        async with httpx.AsyncClient() as client:
            model = router(small, frontier, GATED, http_async_client=client)
            events = [event async for event in model.astream_events("hi", version="v2")]
        tokens = [e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream"]
        assert [token for token in tokens if token] == WORDS
        assert [e["name"] for e in events if e["event"] == "on_custom_event"] == ["routenlp_decision"]


class TestFailures:
    def test_a_stream_that_breaks_off_is_an_error_and_nobody_else_is_asked(self, small, frontier):
        small.break_off(after=2)
        heard, chunks = Heard(), []
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            chunks.extend(router(small, frontier, ALWAYS).stream("hi", {"callbacks": [heard]}))
        told = ["start", "a sm", "all ", ("routenlp_decision", SMALL), "RemoteProtocolError"]
        assert heard.events == told and not frontier.requests
        assert "small: RemoteProtocolError" in caught.value.__notes__[0]

    def test_before_its_first_word_the_next_tier_answers(self, small, frontier):
        small.break_off(after=0)
        assert said(list(router(small, frontier, ALWAYS).stream("hi"))) == WORDS
        small.fail(500)
        assert said(list(router(small, frontier, ALWAYS).stream("hi"))) == WORDS

    def test_a_stream_that_is_closed_closes_the_tier_s(self, small, frontier):
        heard = Heard()
        stream = router(small, frontier, ALWAYS).stream("hi", {"callbacks": [heard]})
        assert next(stream).text == "a sm"
        stream.close()
        assert heard.events == ["start", "a sm", "GeneratorExit"] and not frontier.requests


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def calling(request: Any) -> Any:
    """Calls the tool, then says what it heard."""
    if request["messages"][-1]["role"] == "tool":
        return {"content": "It is sunny there."}
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    return {"content": "let me see", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


class TestAgents:
    def test_messages_of_an_agent_are_streamed_once(self, small):
        with ScriptedServer(calling) as frontier:
            agent = create_agent(router(small, frontier, GATED), tools=[weather])
            messages = agent.stream({"messages": [("user", "weather in Oslo?")]}, stream_mode="messages")
            told = [message for message, _ in messages]
        tokens = [message.text for message in told if isinstance(message, AIMessageChunk) and message.text]
        assert "".join(tokens) == "let me seeIt is sunny there." and len(tokens) > 4
        assert not small.requests
        calls = reduce(add, [m for m in told if isinstance(m, AIMessageChunk) and m.id == told[0].id]).tool_calls
        assert [(call["name"], call["args"]) for call in calls] == [("weather", {"city": "Oslo"})]
