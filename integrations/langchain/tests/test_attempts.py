"""What attempts that were passed over leave behind: no token, no trace of their own, no signal, no wrong sum."""

from __future__ import annotations

import pickle  # noqa: TID251 - users do
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from operator import add
from threading import Barrier
from typing import Any, Union

import pytest
from helpers import BEYOND, FRONTIER, SMALL, gated, kept, release_beyond, signals
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from langchain_routenlp import RouterChatModel, RouterMiddleware, RouterRunnable, SignalCallbackHandler
from routenlp_plugins import Completion, Release, ScoredTier, TierError, TraceStore
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

ALWAYS, NEVER = release_beyond(Rung(SMALL)), release_beyond(gated(SMALL, 1.0, "confidence"))
ALWAYS_BEYOND = release_beyond(Rung(SMALL), BEYOND)
HI = {"messages": [("user", "hi")]}
ANSWERS = (("somewhere", 1.0), ("nowhere", 0.0))


class Scripted(BaseChatModel):
    """Streams its words, breaks after some of them if it is told to, and counts how often it was asked."""

    model: str
    words: list[str] = ["says ", "so"]
    content: Any = None
    calls: list[Any] = []
    breaks_after: int | None = None
    counts: bool = True
    asked: list[str] = []

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, *, tool_choice: Any = None, **more: Any) -> Any:
        return self.bind(tools=[*tools], tool_choice=tool_choice, **more)

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **more: Any) -> ChatResult:
        self.asked.append("whole")
        if self.breaks_after is not None:
            raise RuntimeError(f"{self.model} broke off")
        content = "".join(self.words) if self.content is None else self.content
        facts = {"usage_metadata": self._usage, "response_metadata": {"model_name": self.model}}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content, tool_calls=self.calls, **facts))])

    @property
    def _usage(self) -> UsageMetadata | None:
        return UsageMetadata(input_tokens=3, output_tokens=4, total_tokens=7) if self.counts else None


class Streaming(Scripted):
    def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **more: Any) -> Iterator[Any]:
        self.asked.append("stream")
        for place, word in enumerate(self.words):
            if place == self.breaks_after:
                raise RuntimeError(f"{self.model} broke off")
            told = {} if place else {"model_name": self.model}
            chunk = ChatGenerationChunk(message=AIMessageChunk(word, response_metadata=told))
            if run_manager:
                run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk
        yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=self._usage, chunk_position="last"))


def small(**more: Any) -> Streaming:
    return Streaming(**{"model": SMALL, "words": ["small ", "says ", "so"], "asked": [], **more})


def big(**more: Any) -> Streaming:
    return Streaming(**{"model": FRONTIER, "words": ["big ", "says ", "so"], "asked": [], **more})


def graph(runnable: Any) -> Any:
    made = StateGraph(MessagesState)
    made.add_node("asks", lambda state: {"messages": [runnable.invoke(state["messages"])]})
    made.add_edge(START, "asks")
    return made.compile()


def agent(cheap: BaseChatModel, used: Release = ALWAYS, frontier: BaseChatModel | None = None, **more: Any) -> Any:
    return create_agent(frontier or big(), tools=[], middleware=[RouterMiddleware({SMALL: cheap}, used)], **more)


def chains(cheap: Any, frontier: Any, used: Release = ALWAYS) -> RouterRunnable:
    return RouterRunnable.of_chains({SMALL: cheap, FRONTIER: frontier}, used, to_text=str)


class TestTokens:
    @pytest.mark.parametrize("cheap", [small(breaks_after=2), small(model="another")])
    def test_none_of_a_chain_that_is_passed_over(self, cheap):
        certified = replace(ALWAYS, policy=replace(ALWAYS.policy, models={SMALL: (SMALL,)}))
        made = graph(chains(cheap, big(), certified))
        said = [message.text for message, _ in made.stream(HI, stream_mode="messages")]
        assert "".join(said) == "big says so"

    def test_none_of_an_agents_tier_that_breaks_off(self):
        said = [message.text for message, _ in agent(small(breaks_after=2)).stream(HI, stream_mode="messages")]
        assert "".join(said) == "big says so"

    def test_an_accepted_answer_comes_once(self):
        said = [message.text for message, _ in agent(small()).stream(HI, stream_mode="messages")]
        assert "".join(said) == "small says so"


class City(BaseModel):
    """A city."""

    number: int


class Country(BaseModel):
    """A country."""

    name: str


def calling(name: str, args: dict[str, Any]) -> list[Any]:
    return [{"name": name, "args": args, "id": "1"}]


class TestAgents:
    def test_a_structured_answer_that_does_not_parse_is_passed_over(self):
        cheap = Scripted(model=SMALL, words=[""], calls=calling("City", {"number": "no"}), asked=[])
        frontier = Scripted(model=FRONTIER, words=[""], calls=calling("City", {"number": 1}), asked=[])
        made = agent(cheap, ALWAYS_BEYOND, frontier, response_format=City)
        assert made.invoke(HI, {"recursion_limit": 12})["structured_response"] == City(number=1)
        assert (cheap.asked, frontier.asked) == (["whole"], ["whole"])

    def test_an_empty_answer_is_passed_over(self):
        assert agent(small(words=[""])).invoke(HI)["messages"][-1].text == "big says so"

    @pytest.mark.parametrize(
        "form",
        [
            ToolStrategy(Union[City, Country]),  # noqa: UP007
            ToolStrategy({"oneOf": [City.model_json_schema(), Country.model_json_schema()]}),
            ProviderStrategy({"type": "object", "properties": {"number": {"type": "integer"}}}),
        ],
    )
    def test_every_kind_of_schema(self, form):
        said: dict[str, Any] = {"words": ['{"number": 1}']}
        if isinstance(form, ToolStrategy):
            said = {"words": [""], "calls": calling("City", {"number": 1})}
        frontier = Scripted(model=FRONTIER, asked=[], **said)
        found = agent(small(), NEVER, frontier, response_format=form).invoke(HI)["structured_response"]
        assert found in (City(number=1), {"number": 1})


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: "no json") as opened:
        yield opened


@pytest.fixture
def store(tmp_path) -> Iterator[TraceStore]:
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


class TestTraces:
    @pytest.mark.parametrize("listening", [True, False])
    @pytest.mark.parametrize("kind", ["chat model", "chains", "agent"])
    def test_a_decision_is_one_trace_and_its_attempts_are_no_signals(self, store, kind, listening):
        listeners = (store.record,) if listening else ()
        tiers = {SMALL: small(), FRONTIER: big()}
        if kind == "chat model":
            routed, asked = RouterChatModel(tiers=tiers, release=NEVER, listeners=listeners) | StrOutputParser(), "hi"
        elif kind == "chains":
            parsed = {name: tier | StrOutputParser() for name, tier in tiers.items()}
            routed, asked = RouterRunnable.of_chains(parsed, NEVER, listeners=listeners), "hi"
        else:
            middleware = RouterMiddleware({SMALL: small()}, NEVER, listeners=listeners)
            routed, asked = create_agent(big(), tools=[], middleware=[middleware]), HI
        handler = SignalCallbackHandler(store, portfolio=NEVER.portfolio, task="t")
        routed.invoke(asked, {"callbacks": [handler]})
        (found,) = kept(store)
        assert [(one.tier, one.accepted) for one in found.trace.attempts] == [(SMALL, False), (FRONTIER, True)]
        assert found.origin == "served"
        assert signals(store) == []
        assert len(handler._recorder.runs) == 0

    @pytest.mark.parametrize("listening", [True, False])
    @pytest.mark.parametrize("kind", ["chat model", "chains", "agent"])
    async def test_what_nobody_answered_is_one_trace_with_all_attempts(self, store, kind, listening):
        listeners = (store.record,) if listening else ()
        tiers = {SMALL: small(), FRONTIER: big(breaks_after=0)}
        if kind == "chat model":
            routed, asked = RouterChatModel(tiers=tiers, release=NEVER, listeners=listeners), "hi"
        elif kind == "chains":
            routed, asked = RouterRunnable.of_chains(tiers, NEVER, listeners=listeners), "hi"
        else:
            middleware = RouterMiddleware({SMALL: small()}, NEVER, listeners=listeners)
            routed, asked = create_agent(tiers[FRONTIER], tools=[], middleware=[middleware]), HI
        config = {"callbacks": [SignalCallbackHandler(store, portfolio=NEVER.portfolio, task="t")]}
        with pytest.raises(RuntimeError, match="frontier broke off"):
            routed.invoke(asked, config)
        with pytest.raises(RuntimeError, match="frontier broke off"):
            await routed.ainvoke(asked, config)
        found = kept(store)
        assert [[one.tier for one in each.trace.attempts] for each in found] == [[SMALL, FRONTIER]] * 2
        assert not any(one.accepted for each in found for one in each.trace.attempts)

    def test_what_a_parser_makes_of_a_fallback_says_nothing_of_the_decision_that_failed(self, store):
        failing = RouterChatModel(tiers={SMALL: small(), FRONTIER: big(breaks_after=0)}, release=NEVER)
        chain = failing.with_fallbacks([RunnableLambda(lambda _: AIMessage("{}"))]) | JsonOutputParser()
        assert chain.invoke("hi", {"callbacks": [SignalCallbackHandler(store, portfolio=NEVER.portfolio)]}) == {}
        assert len(kept(store)) == 1 and signals(store) == []

    def test_tools_of_parallel_agents_speak_of_their_own_answers(self, store):
        """Each tool waits for the other agent's answer, so that the last of all is not the own one."""
        both = Barrier(2)

        @tool
        def weather(city: str) -> str:
            """The weather in a city."""
            both.wait(10)
            if city == "nowhere":
                raise ValueError(city)
            return city

        class Calls(Scripted):
            def _generate(self, messages: Any, *rest: Any, **more: Any) -> ChatResult:
                if isinstance(messages[-1], ToolMessage):
                    return ChatResult(generations=[ChatGeneration(message=AIMessage("done"))])
                return super()._generate(messages, *rest, **more)

        def node(city: str) -> Any:
            calls = calling("weather", {"city": city})
            made = create_agent(Calls(model=FRONTIER, words=[""], calls=calls, asked=[]), tools=[weather])

            def run(state: Any) -> Any:
                with suppress(ValueError):
                    made.invoke(HI)
                return {}

            return run

        agents = StateGraph(MessagesState)
        for name in ("somewhere", "nowhere"):
            agents.add_node(name, node(name))
            agents.add_edge(START, name)
        agents.compile().invoke(HI, {"callbacks": [SignalCallbackHandler(store, portfolio=NEVER.portfolio)]})
        told = {about: value for about, kind, _, value in signals(store) if kind == "tool"}
        of = {known: one for one in kept(store) for known in (one.id, *one.runs)}
        said = {of[about].trace.accepted.completion.text: value for about, value in told.items()}
        assert said == {f'[{{"args": {{"city": "{city}"}}, "name": "weather"}}]': value for city, value in ANSWERS}

    def test_each_decision_of_a_call_that_is_repeated_is_kept(self, store):
        class Twice(AgentMiddleware):
            def wrap_model_call(self, request: Any, handler: Any) -> Any:
                handler(request)
                return handler(request)

        made = create_agent(big(), tools=[], middleware=[Twice(), RouterMiddleware({SMALL: small()}, NEVER)])
        config = {"callbacks": [SignalCallbackHandler(store, portfolio=NEVER.portfolio)]}
        message = made.invoke(HI, config)["messages"][-1]
        found = kept(store)
        last = message.response_metadata["routenlp"]["id"]
        (first,) = {one.id for one in found} - {last}
        # what was asked again was not answered well
        assert [(about, kind) for about, kind, *_ in signals(store)] == [(first, "retry")]

    def test_an_agents_own_model_is_asked_itself(self):
        own = FakeMessagesListChatModel(responses=[AIMessage("one"), AIMessage("two")])
        made = create_agent(own, tools=[], middleware=[RouterMiddleware({SMALL: small()}, NEVER)])
        assert [made.invoke(HI)["messages"][-1].text for _ in range(2)] == ["one", "two"]

    def test_a_router_in_a_router_fails_with_the_attempts_of_the_outer_one(self):
        def broken(call: Any) -> Completion:
            raise RuntimeError("boom")

        inner = RouterChatModel(tiers={SMALL: broken, FRONTIER: broken}, release=NEVER)
        outer = RouterChatModel(tiers={SMALL: small(), FRONTIER: inner}, release=NEVER)
        with pytest.raises(TierError, match="no tier answered") as caught:
            outer.invoke("hi")
        assert [one.tier for one in caught.value.trace.attempts] == [SMALL, FRONTIER]


class TestUsage:
    def test_of_all_attempts_or_unknown(self):
        model = RouterChatModel(tiers={SMALL: small(), FRONTIER: big(counts=False)}, release=NEVER)
        assert model.invoke("hi").usage_metadata is None
        assert reduce(add, model.stream("hi")).usage_metadata is None


class TestCallsAndStreams:
    """The same answer, called or streamed."""

    @pytest.mark.parametrize(("cheap", "frontier"), [("", "big"), ("ok", ""), ("", "")])
    def test_chains_that_say_nothing(self, cheap, frontier):
        made = chains(RunnableLambda(lambda _: cheap), RunnableLambda(lambda _: frontier))
        expected = cheap or frontier
        assert made.invoke("hi") == expected
        assert "".join(made.stream("hi")) == expected

    @pytest.mark.parametrize("who", [SMALL, FRONTIER])
    def test_models_that_say_it_with_an_image(self, who):
        image = [{"type": "image", "base64": "aGk=", "mime_type": "image/png"}]
        models: dict[str, Any] = {SMALL: small(words=[""]), FRONTIER: big()}
        models[who] = Scripted(model=who, content=image, asked=[])
        made = RouterChatModel(tiers=models, release=ALWAYS)
        assert made.invoke("hi").content == image
        streamed = reduce(add, made.stream("hi"))
        assert streamed.content == image
        assert streamed.response_metadata["routenlp"]["tier"] == who

    def test_a_tier_that_does_not_stream_tool_calls_is_called(self):
        cheap = small(disable_streaming="tool_calling")
        model = RouterChatModel(tiers={SMALL: cheap, FRONTIER: big()}, release=ALWAYS_BEYOND)
        list(model.bind_tools([City]).stream("hi"))
        assert cheap.asked == ["whole"]

    @pytest.mark.parametrize("method", ["json_mode", "json_schema"])
    def test_raw_answers_beside_what_cannot_be_parsed(self, server, method):
        tiers = {n: ChatOpenAI(model=n, base_url=server.url, api_key="none", max_retries=0) for n in (SMALL, FRONTIER)}
        routed = RouterChatModel(tiers=tiers, release=ALWAYS_BEYOND)
        structured = routed.with_structured_output(City.model_json_schema(), method=method, include_raw=True)
        for found in (structured.invoke("hi"), reduce(add, structured.stream("hi"))):
            assert found["parsed"] is None and found["parsing_error"] is not None
            assert found["raw"].text == "no json"


class TestModels:
    def test_a_frontier_inside_a_tier_that_adds_scores_is_a_chat_model(self):
        frontier = ScoredTier(big(calls=calling("City", {"number": 1})), {"judge": lambda query, answer: 1.0})
        frontier_only = Release.frontier_only(ALWAYS.portfolio)
        model = RouterChatModel(tiers={SMALL: small(), FRONTIER: frontier}, release=frontier_only, task="t")
        assert [call["name"] for call in model.bind_tools([City]).invoke("hi").tool_calls] == ["City"]
        assert model.with_structured_output(City).invoke("hi") == City(number=1)

    def test_how_tools_are_bound_is_part_of_the_prompt(self):
        model = RouterChatModel(tiers={SMALL: small(), FRONTIER: big()}, release=ALWAYS_BEYOND)
        prompts = {
            model.bind_tools([City], **how).invoke("hi").response_metadata["routenlp"]["attempts"][0]["prompt"]
            for how in ({}, {"parallel_tool_calls": False})
        }
        assert len(prompts) == 2

    def test_a_copy_with_other_listeners_tells_them(self):
        heard: list[Any] = []
        model = RouterChatModel(tiers={SMALL: small(), FRONTIER: big()}, release=ALWAYS)
        model.model_copy(update={"listeners": (heard.append,)}).invoke("hi")
        assert len(heard) == 1

    def test_what_can_be_pickled_is(self):
        assert pickle.dumps(RouterChatModel(tiers={SMALL: answers, FRONTIER: big()}, release=ALWAYS))
        assert pickle.dumps(chains(small(), big()).bound.tiers)


async def answers(call: Any) -> Completion:
    return Completion("small says so")
