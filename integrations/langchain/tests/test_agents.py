"""Agents whose calls are routed: usage by model, no token of a rejected attempt, interrupts and errors untouched."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from helpers import BEYOND, FRONTIER, SMALL, gated, release_beyond
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest
from langchain.agents.structured_output import ToolStrategy
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt
from pydantic import BaseModel

import langchain_routenlp
from langchain_routenlp import RouterMiddleware
from routenlp_plugins import MissingExtraError, PortfolioError, Release
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer


def release(rung: Rung, requires: tuple[str, ...] = BEYOND) -> Release:
    return release_beyond(rung, requires)


ALWAYS, NEVER = release(Rung(SMALL)), release(gated(SMALL, 1.0, "confidence"))


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def agent_of(city: str) -> Any:
    """A model that calls the tool for a city, then says what it heard."""

    def reply(request: Any) -> Any:
        last = request["messages"][-1]
        if last["role"] == "tool":
            return {"content": f"It is {last['content']}."}
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}

    return reply


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    with ScriptedServer(agent_of("Oslo")) as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(agent_of("Rome")) as server:
        yield server


def chat(server: ScriptedServer, name: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=name, base_url=server.url, api_key="none", stream_usage=True, max_retries=0, tags=["own"], **more
    )


def agent(small: ScriptedServer, frontier: ScriptedServer, used: Release, *more: AgentMiddleware, **how: Any) -> Any:
    middleware = [RouterMiddleware({SMALL: chat(small, SMALL)}, used), *more]
    return create_agent(chat(frontier, FRONTIER), tools=[weather], middleware=middleware, **how)


ASKED = {"messages": [("user", "weather?")]}


class TestAgents:
    def test_the_small_tier_does_it_where_its_answers_are_accepted(self, small, frontier):
        usage = UsageMetadataCallbackHandler()
        messages = agent(small, frontier, ALWAYS).invoke(ASKED, {"callbacks": [usage]})["messages"]
        assert messages[-1].text == "It is sunny in Oslo." and not frontier.requests
        decisions = [m.response_metadata["routenlp"] for m in messages if isinstance(m, AIMessage)]
        assert [decision["tier"] for decision in decisions] == [SMALL, SMALL]
        assert set(usage.usage_metadata) == {SMALL}

    async def test_rejected_answers_are_paid_for_and_seen_by_nobody(self, small, frontier):
        usage = UsageMetadataCallbackHandler()
        async with httpx.AsyncClient() as client:
            tiers = {SMALL: chat(small, SMALL, http_async_client=client)}
            made = create_agent(
                chat(frontier, FRONTIER, http_async_client=client),
                tools=[weather],
                middleware=[RouterMiddleware(tiers, NEVER)],
            )
            messages = (await made.ainvoke(ASKED, {"callbacks": [usage]}))["messages"]
        assert messages[-1].text == "It is sunny in Rome."
        assert len(small.requests) == len(frontier.requests) == 2
        # each model's own runs, each once
        told = [attempt for m in messages if isinstance(m, AIMessage) for attempt in _attempts(m)]
        for name in (SMALL, FRONTIER):
            spent = sum(a["input_tokens"] + a["output_tokens"] for a in told if a["tier"] == name)
            assert usage.usage_metadata[name]["total_tokens"] == spent

    @pytest.mark.parametrize(("used", "city", "whole"), [(ALWAYS, "Oslo", True), (NEVER, "Rome", False)])
    def test_message_streams_have_each_answer_once(self, small, frontier, used, city, whole):
        told = [m for m, _ in agent(small, frontier, used).stream(ASKED, stream_mode="messages")]
        text = "".join(m.text for m in told if isinstance(m, AIMessage))
        assert text == f"It is sunny in {city}."
        # below the frontier in one piece, since each call may still be passed over
        assert (sum(bool(m.text) for m in told if isinstance(m, AIMessage)) == 1) is whole

    def test_a_task_without_tools_stays_on_the_frontier(self, small, frontier):
        messages = agent(small, frontier, release(Rung(SMALL), ())).invoke(ASKED)["messages"]
        assert messages[-1].text == "It is sunny in Rome." and not small.requests

    def test_what_is_wrapped_sees_the_model_of_each_attempt(self, small, frontier):
        seen: list[str] = []

        class Looks(AgentMiddleware):
            def wrap_model_call(self, request: ModelRequest, handler: Any) -> Any:
                seen.append(request.model.model_name)
                return handler(request)

        agent(small, frontier, NEVER, Looks()).invoke(ASKED)
        assert seen == [SMALL, FRONTIER] * 2

    def test_structured_output_is_asked_of_whichever_tier_answers(self, frontier):
        class City(BaseModel):
            """A city."""

            name: str

        def filling(request: Any) -> Any:
            function = {"name": "City", "arguments": '{"name": "Oslo"}'}
            return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}

        with ScriptedServer(filling) as small:
            made = agent(small, frontier, ALWAYS, response_format=ToolStrategy(City))
            assert made.invoke(ASKED)["structured_response"] == City(name="Oslo")
        assert not frontier.requests


class TestTrouble:
    def test_interrupts_of_the_graph_pass(self, small, frontier):
        class Asks(AgentMiddleware):
            def wrap_model_call(self, request: ModelRequest, handler: Any) -> Any:
                if interrupt("go on?") != "yes":
                    raise AssertionError
                return handler(request)

        made = agent(small, frontier, ALWAYS, Asks(), checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        assert made.invoke(ASKED, config)["__interrupt__"][0].value == "go on?"
        done = made.invoke(Command(resume="yes"), config)
        done = done if "__interrupt__" not in done else made.invoke(Command(resume="yes"), config)
        assert done["messages"][-1].text == "It is sunny in Oslo." and not frontier.requests

    def test_a_failing_small_tier_is_passed_over_and_a_failing_frontier_raises_its_own_error(self, small, frontier):
        small.fail(500, times=2)
        assert agent(small, frontier, ALWAYS).invoke(ASKED)["messages"][-1].text == "It is sunny in Rome."
        small.fail(500, times=1)
        frontier.fail(429, times=1)
        with pytest.raises(openai.RateLimitError) as caught:
            agent(small, frontier, ALWAYS).invoke(ASKED)
        assert "routenlp: no tier answered" in caught.value.__notes__[0]

    def test_bad_arguments_are_told(self, small):
        with pytest.raises(PortfolioError, match="tiers: small must be a chat model, got str"):
            RouterMiddleware({SMALL: "gpt-4o-mini"}, ALWAYS)
        with pytest.raises(PortfolioError, match="tiers: no callable for small"):
            RouterMiddleware({}, ALWAYS)
        with pytest.raises(PortfolioError, match="task='x' is unknown to the release; its tasks: t"):
            RouterMiddleware({SMALL: chat(small, SMALL)}, ALWAYS, "x")

    def test_without_langchain_it_says_what_installs_it(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "langchain_routenlp.agents")
        monkeypatch.setitem(sys.modules, "langchain.agents.middleware", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'langchain-routenlp\[agents\]'"):
            langchain_routenlp.RouterMiddleware  # noqa: B018
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            langchain_routenlp.Nothing  # noqa: B018


def _attempts(message: AIMessage) -> list[dict[str, Any]]:
    attempts: list[dict[str, Any]] = message.response_metadata["routenlp"]["attempts"]
    return attempts
