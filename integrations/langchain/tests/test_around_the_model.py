"""What LangChain puts around a model: caches, fields chosen at run time, retries, fallbacks, tracing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import FRONTIER, SMALL, portfolio, release, signals
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import OutputParserException
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from langchain_routenlp import RouterChatModel, SignalCallbackHandler
from routenlp_plugins import Policy, Release, Task, TraceStore
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

TWO = Release(portfolio(Task("easy"), Task("hard")), Policy(FRONTIER, {"easy": (Rung(SMALL),), "hard": ()}))


class City(BaseModel):
    """A city."""

    name: str


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: f"{request['model']} says so") as running:
        yield running


@pytest.fixture
def cache() -> Iterator[InMemoryCache]:
    used = InMemoryCache()
    set_llm_cache(used)
    yield used
    set_llm_cache(None)


def router(server: ScriptedServer, used: Release = TWO, **more: Any) -> RouterChatModel:
    common = {"base_url": server.url, "api_key": "none", "max_retries": 0, "cache": False}
    return RouterChatModel(
        tiers={name: ChatOpenAI(model=name, **common) for name in (SMALL, FRONTIER)}, release=used, **more
    )


def tier_of(message: Any) -> str:
    return message.response_metadata["routenlp"]["tier"]


class TestCaches:
    async def test_one_answer_for_each_task_and_release(self, server, cache):
        model = router(server, task="easy")
        for way in (model.invoke, model.invoke):
            assert tier_of(way("hi")) == SMALL
        assert tier_of(await model.ainvoke("hi")) == SMALL
        assert len(server.requests) == 1
        assert tier_of(model.invoke("hi", {"metadata": {"routenlp_task": "hard"}})) == FRONTIER
        assert tier_of(router(server, release(Rung(SMALL), task="easy"), task="easy").invoke("hi")) == SMALL
        assert len(server.requests) == 3

    def test_it_can_be_turned_off(self, server, cache):
        model = router(server, task="easy", cache=False)
        model.invoke("hi")
        model.invoke("hi")
        assert len(server.requests) == 2

    def test_an_expired_certificate_is_another_key(self, server):
        model = router(server, task="easy")
        before = model._get_llm_string()
        model.auditor = type("Auditor", (), {"expired": {"easy": "too many bad answers"}})()
        assert model._get_llm_string() != before

    def test_what_a_cache_answers_was_kept_before(self, server, cache, tmp_path):
        with TraceStore(tmp_path / "traces.db") as store:
            handler = SignalCallbackHandler(store)
            for _ in range(2):
                router(server, task="easy").invoke("hi", {"callbacks": [handler]})
            store.flush(10)
            assert len(list(store.traces())) == 1

    def test_other_options_and_tiers_are_other_keys(self, server, cache):
        def asked(**more: Any) -> int:
            before = len(server.requests)
            router(server, task="hard", **more).invoke("hi")
            return len(server.requests) - before

        changes = [{}, {"temperature": 0.5}, {"max_tokens": 7}, {"stop": ["x"]}]
        assert [asked(**more) for more in (*changes, *changes)] == [1] * 4 + [0] * 4
        common = {"base_url": server.url, "api_key": "none", "cache": False}
        tiers = {name: ChatOpenAI(model="another", **common) for name in (SMALL, FRONTIER)}
        assert RouterChatModel(tiers=tiers, release=TWO, task="hard").invoke("hi").text == "another says so"

    def test_a_tier_without_usage_may_be_cached(self, cache):
        tiers = {SMALL: FakeListChatModel(responses=["s"]), FRONTIER: FakeListChatModel(responses=["f"])}
        for task, said in (("hard", "f"), ("easy", "s")):
            model = RouterChatModel(tiers=tiers, release=TWO, task=task, cache=False)
            assert [model.invoke("hi").text for _ in range(2)] == [said, said]

    def test_what_is_said_of_a_cached_answer_is_said_of_the_first(self, server, cache, tmp_path):
        with TraceStore(tmp_path / "traces.db") as store:
            handler = SignalCallbackHandler(store)
            plain = ChatOpenAI(model="plain", base_url=server.url, api_key="none")
            chain = router(server, task="easy") | JsonOutputParser()
            for _ in range(2):
                plain.invoke("hi", {"callbacks": [handler]})
                with pytest.raises(OutputParserException):
                    chain.invoke("hi", {"callbacks": [handler]})
            store.flush(10)
            assert [one.trace.accepted.tier for one in store.traces()] == ["plain", SMALL]
            (routed,) = [one for one in store.traces() if one.trace.accepted.tier == SMALL]
            # the same of the same answer, which is kept once
            assert [name for name, kind, *_ in signals(store) if kind == "parser"] == [routed.id]


class TestThoughts:
    """Below the frontier what says nothing yet waits for what does."""

    async def test_an_answer_of_thoughts_only_is_passed_over_in_streams_too(self, server):
        class Thinking(BaseChatModel):
            says: str = ""

            @property
            def _llm_type(self) -> str:
                return "thinking"

            def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any) -> ChatResult:
                content = [{"type": "reasoning", "reasoning": "hm"}, *([self.says] if self.says else [])]
                return ChatResult(generations=[ChatGeneration(message=AIMessage(content))])

            def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any) -> Any:
                yield ChatGenerationChunk(message=AIMessageChunk([{"type": "reasoning", "reasoning": "hm"}]))
                if self.says:
                    yield ChatGenerationChunk(message=AIMessageChunk(self.says))

        frontier = ChatOpenAI(model=FRONTIER, base_url=server.url, api_key="none")
        for says, expected in (("", f"{FRONTIER} says so"), ("so", "so")):
            model = RouterChatModel(
                tiers={SMALL: Thinking(says=says), FRONTIER: frontier}, release=TWO, task="easy", cache=False
            )
            assert model.invoke("hi").text == expected
            assert "".join(str(chunk.text) for chunk in model.stream("hi")) == expected
            assert "".join([str(chunk.text) async for chunk in model.astream("hi")]) == expected


class TestFields:
    def test_the_task_may_be_chosen_at_run_time(self, server):
        model = router(server, task="easy").configurable_fields(task=ConfigurableField(id="task"))
        assert tier_of(model.invoke("hi")) == SMALL
        assert tier_of(model.with_config(configurable={"task": "hard"}).invoke("hi")) == FRONTIER
        chain = ChatPromptTemplate.from_template("{text}") | model | StrOutputParser()
        assert chain.invoke({"text": "hi"}, {"configurable": {"task": "hard"}}) == f"{FRONTIER} says so"

    def test_so_may_sampling_and_the_release(self, server):
        fields = {"temperature": ConfigurableField(id="heat"), "release": ConfigurableField(id="release")}
        model = router(server, task="easy").configurable_fields(**fields)
        other = Release.frontier_only(TWO.portfolio)
        found = model.invoke("hi", {"configurable": {"heat": 0.25, "release": other}})
        assert (tier_of(found), server.requests[-1]["temperature"]) == (FRONTIER, 0.25)

    def test_the_router_may_be_one_of_several_models(self, server):
        plain = ChatOpenAI(model="plain", base_url=server.url, api_key="none")
        model = plain.configurable_alternatives(ConfigurableField(id="model"), routed=router(server, task="easy"))
        assert model.invoke("hi").text == "plain says so"
        assert tier_of(model.invoke("hi", {"configurable": {"model": "routed"}})) == SMALL


class TestRetriesAndFallbacks:
    async def test_a_retry_asks_the_whole_router_again(self, server):
        model = router(server, task="hard").with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
        server.fail(500, times=2)
        assert tier_of(model.invoke("hi")) == FRONTIER
        server.fail(500, times=2)
        assert tier_of(await model.ainvoke("hi")) == FRONTIER

    async def test_a_fallback_answers_what_no_tier_could(self, server):
        with ScriptedServer(lambda request: "the spare one") as other:
            spare = ChatOpenAI(model="spare", base_url=other.url, api_key="none")
            model = router(server, task="easy").with_fallbacks([spare])
            server.fail(500, times=2)
            assert model.invoke("hi").text == "the spare one"
            server.fail(500, times=2)
            assert (await model.ainvoke("hi")).text == "the spare one"
            server.fail(500, times=2)
            assert "".join(chunk.text for chunk in model.stream("hi")) == "the spare one"

    @pytest.mark.parametrize("kind", ["tools", "structured"])
    def test_so_it_does_for_tools_and_structured_output(self, server, kind):
        with ScriptedServer(lambda request: '{"name": "Oslo"}') as other:
            spare = ChatOpenAI(model="spare", base_url=other.url, api_key="none")
            model = router(server, task="easy").with_fallbacks([spare])
            server.fail(500, times=1)
            if kind == "tools":
                assert model.bind_tools([weather]).invoke("hi").text == '{"name": "Oslo"}'
            else:
                assert model.with_structured_output(City).invoke("hi") == City(name="Oslo")
            assert other.requests


class TestEmptyAnswers:
    """Below the frontier they are paid for and passed over; the frontier's own is returned as it is."""

    async def test_alike_in_calls_and_streams(self):
        with ScriptedServer(lambda request: "" if request["model"] == SMALL else "the frontier says so") as server:
            model = router(server, task="easy")
            told = [model.invoke("hi"), await model.ainvoke("hi")]
            assert [message.text for message in told] == ["the frontier says so"] * 2
            assert "not valid: small" in told[0].response_metadata["routenlp"]["reason"]
            assert "".join(chunk.text for chunk in model.stream("hi")) == "the frontier says so"
            assert "".join([chunk.text async for chunk in model.astream("hi")]) == "the frontier says so"

    async def test_of_the_frontier(self):
        with ScriptedServer(lambda request: "") as server:
            model = router(server, task="hard")
            assert (model.invoke("hi").text, (await model.ainvoke("hi")).text) == ("", "")


class TestTracing:
    def test_a_run_says_what_langsmith_shows(self, server):
        class Tracer(BaseTracer):
            runs: list[Any] = []

            def _persist_run(self, run: Any) -> None:
                self.runs.append(run)

        tracer = Tracer()
        router(server, task="easy", temperature=0.5).invoke("hi", {"callbacks": [tracer], "metadata": {"user": "7"}})
        (run,) = tracer.runs
        told = run.extra["metadata"]
        assert (told["ls_provider"], told["ls_model_name"], told["ls_model_type"], told["ls_temperature"]) == (
            "routenlp",
            "routenlp-router",
            "chat",
            0.5,
        )
        message = run.outputs["generations"][0][0]["message"]["kwargs"]
        assert message["response_metadata"]["routenlp"]["tier"] == SMALL
        assert message["response_metadata"]["model_name"] == SMALL
        assert "none" not in str(run.serialized)
