"""`RouterLLM` over OpenAILike models in front of a scripted server: chat, complete, streams, tools, engines, events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from helpers import BEYOND, FRONTIER, SMALL, gated, release_beyond
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ThinkingBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse, CustomLLM, LLMMetadata, MockLLM
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import BaseModel

from llama_index.llms.routenlp import RouterLLM
from routenlp_plugins import Completion, DataError, Portfolio, PortfolioError, Release, ScoredTier, Tier, TierError
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer, ScriptedTier

# of LlamaIndex's own making
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::pydantic.warnings.PydanticDeprecatedSince{since}") for since in (20, 211)
]
SAID = "the frontier says so"
WORDS = [SAID[i : i + 4] for i in range(0, len(SAID), 4)]
ASKED = [ChatMessage("hi")]


ALWAYS, GATED = release_beyond(Rung(SMALL)), release_beyond(gated(SMALL, 0.5, "token_probability"))
NEVER = release_beyond(gated(SMALL, 1.0, "confidence"))
TOOLS = release_beyond(Rung(SMALL), BEYOND)


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: "a small guess") as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: SAID) as server:
        yield server


def like(server: ScriptedServer, name: str, **more: Any) -> OpenAILike:
    facts = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 8000, "max_retries": 0, **more}
    return OpenAILike(model=name, api_base=server.url, api_key="none", reuse_client=False, **facts)


def router(small: ScriptedServer, frontier: ScriptedServer, used: Release, **more: Any) -> RouterLLM:
    return RouterLLM({SMALL: like(small, SMALL), FRONTIER: like(frontier, FRONTIER)}, used, **more)


def decision(response: Any) -> dict[str, Any]:
    return response.additional_kwargs["routenlp"]


class TestAnswers:
    @pytest.mark.parametrize(("used", "text", "tiers"), [(ALWAYS, "a small guess", 1), (NEVER, SAID, 2)])
    async def test_every_way_to_ask_decides_alike(self, small, frontier, used, text, tiers):
        llm = router(small, frontier, used)
        found = [llm.chat(ASKED), await llm.achat(ASKED), llm.complete("hi"), await llm.acomplete("hi")]
        found += [list(llm.stream_chat(ASKED))[-1], list(llm.stream_complete("hi"))[-1]]
        found += [[part async for part in await llm.astream_chat(ASKED)][-1]]
        found += [[part async for part in await llm.astream_complete("hi")][-1]]
        for response in found:
            assert (getattr(response, "text", None) or response.message.content) == text
            assert [attempt["tier"] for attempt in decision(response)["attempts"]] == [SMALL, FRONTIER][:tiers]
        whole = found[0].additional_kwargs
        spent = sum(a["input_tokens"] + a["output_tokens"] for a in decision(found[0])["attempts"])
        assert whole["total_tokens"] == whole["prompt_tokens"] + whole["completion_tokens"] == spent

    def test_log_probabilities_are_evidence(self, small, frontier):
        models = {SMALL: like(small, SMALL, additional_kwargs={"logprobs": True}), FRONTIER: like(frontier, FRONTIER)}
        response = RouterLLM(models, GATED).chat(ASKED)
        assert response.message.content == "a small guess" and not frontier.requests
        assert decision(response)["attempts"][0]["mean_logprob"] < 0

    def test_streams_have_no_word_of_a_rejected_answer_and_none_twice(self, small, frontier):
        for used, words in ((NEVER, WORDS), (ALWAYS, ["a sm", "all ", "gues", "s"])):
            parts = list(router(small, frontier, used).stream_chat(ASKED))
            assert [part.delta for part in parts if part.delta] == words
            assert parts[-1].delta == "" and decision(parts[-1])["tier"] == (FRONTIER if used is NEVER else SMALL)
            assert all(decision(part)["tier"] == decision(parts[-1])["tier"] for part in parts)

    def test_core_tiers_answer_too(self, frontier):
        tiers = {SMALL: ScriptedTier(default=Completion("core", 0.9)), FRONTIER: like(frontier, FRONTIER)}
        llm = RouterLLM(tiers, ALWAYS)
        assert llm.chat(ASKED).message.content == llm.complete("hi").text == "core"
        assert [part.delta for part in llm.stream_chat(ASKED) if part.delta] == ["core"]

    @pytest.mark.parametrize(("task", "tier"), [("easy", SMALL), ("hard", FRONTIER)])
    def test_the_task_may_come_with_the_call_or_its_last_message(self, small, frontier, task, tier):
        llm = router(small, frontier, release_beyond(Rung(SMALL), (), "easy", "hard"))
        message = ChatMessage("hi", additional_kwargs={"routenlp_task": task})
        for response in (llm.chat(ASKED, routenlp_task=task), llm.chat([message])):
            assert decision(response)["tier"] == tier
        # and is not sent to anybody
        assert "routenlp_task" not in json.dumps((small.requests or frontier.requests)[-1])

    def test_images_go_to_the_frontier(self, small, frontier):
        picture = ChatMessage(blocks=[ImageBlock(image=b"iVBORw0KGgo=", image_mimetype="image/png")])
        told = decision(router(small, frontier, ALWAYS).chat([ChatMessage("hi"), picture]))
        assert told["tier"] == FRONTIER and "does not cover calls that need image" in told["reason"]


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def memory() -> ChatMemoryBuffer:
    """The default one leaves a connection open."""
    return ChatMemoryBuffer.from_defaults(token_limit=1000)


TOOL = FunctionTool.from_defaults(weather)


def calling(city: str) -> Any:
    """Calls the tool, then says what it heard."""

    def reply(request: Any) -> Any:
        last = request["messages"][-1]
        if last["role"] == "tool":
            return f"It is {last['content']}."
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}

    return reply


class TestTools:
    @pytest.mark.parametrize(("used", "city"), [(TOOLS, "Oslo"), (ALWAYS, "Rome")])
    async def test_whichever_tier_answers_calls_them_in_its_own_way(self, used, city):
        with ScriptedServer(calling("Oslo")) as one, ScriptedServer(calling("Rome")) as other:
            llm = router(one, other, used)
            found = [llm.chat_with_tools([TOOL], "weather?"), await llm.achat_with_tools([TOOL], "weather?")]
            found += [list(llm.stream_chat_with_tools([TOOL], "weather?"))[-1]]
            found += [[part async for part in await llm.astream_chat_with_tools([TOOL], "weather?")][-1]]
            for response in found:
                (call,) = llm.get_tool_calls_from_response(response)
                assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": city})
            assert llm.predict_and_call([TOOL], "weather?").response == f"sunny in {city}"
        asked = (one if city == "Oslo" else other).requests
        assert asked[0]["tools"][0]["function"]["name"] == "weather"

    async def test_an_agent_works(self):
        with ScriptedServer(calling("Oslo")) as one, ScriptedServer(calling("Rome")) as other:
            agent = FunctionAgent(tools=[TOOL], llm=router(one, other, TOOLS))
            assert str(await agent.run("weather?", memory=memory())) == "It is sunny in Oslo."
            assert not other.requests

    def test_a_tier_without_tools_is_passed_over(self):
        with ScriptedServer(calling("Rome")) as other:
            for unable in (
                MockLLM(),
                like(other, SMALL, is_function_calling_model=False),
                lambda call: Completion("x"),
            ):
                llm = RouterLLM({SMALL: unable, FRONTIER: like(other, FRONTIER)}, TOOLS)
                response = llm.chat_with_tools([TOOL], "weather?")
                assert llm.get_tool_calls_from_response(response)[0].tool_kwargs == {"city": "Rome"}
                assert "tools" in decision(response)["attempts"][0]["error"]


class City(BaseModel):
    """A city."""

    name: str


class TestHomes:
    def test_query_engines_and_chat_engines_are_routed(self, small, frontier):
        documents = [Document(text="Paris is in France."), Document(text="Oslo is in Norway.")]
        index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8), transformations=[])
        llm = router(small, frontier, ALWAYS)
        assert str(index.as_query_engine(llm=llm).query("Where is Oslo?")) == "a small guess"
        streaming = index.as_query_engine(llm=llm, streaming=True).query("Where is Oslo?")
        assert "".join(streaming.response_gen) == "a small guess"
        engine = index.as_chat_engine(llm=llm, chat_mode="context", memory=memory())
        assert str(engine.chat("Where is Oslo?")) == "a small guess"
        assert not frontier.requests

    def test_predict_and_structured_predict(self, frontier):
        def filling(request: Any) -> Any:
            if not request.get("tools"):
                return "plain"
            function = {"name": "City", "arguments": '{"name": "Oslo"}'}
            return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}

        with ScriptedServer(filling) as small:
            llm = router(small, frontier, TOOLS)
            prompt = PromptTemplate("a city in {country}")
            assert llm.predict(prompt, country="Norway") == "plain"
            assert llm.structured_predict(City, prompt, country="Norway") == City(name="Oslo")
            assert llm.as_structured_llm(City).complete("a city").raw == City(name="Oslo")
        assert not frontier.requests

    def test_metadata_are_what_all_tiers_can_do(self, small, frontier):
        models = {
            SMALL: like(small, SMALL, context_window=4000, is_function_calling_model=False),
            FRONTIER: like(frontier, FRONTIER, context_window=128_000),
        }
        metadata = RouterLLM(models, ALWAYS).metadata
        told = (metadata.context_window, metadata.is_chat_model, metadata.is_function_calling_model)
        assert told == (4000, True, False)
        # what is told to observers, or written, holds no model and no key
        assert "api_key" not in str(RouterLLM(models, ALWAYS).to_dict()) + str(RouterLLM(models, ALWAYS).to_payload())


class Events(BaseEventHandler):
    seen: list[Any] = []

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: Any, **_: Any) -> None:
        self.seen.append(event)


def test_each_answer_is_told_once_as_an_event(small, frontier):
    handler = Events()
    root = get_dispatcher()
    root.add_event_handler(handler)
    try:
        llm = router(small, frontier, NEVER)
        llm.chat(ASKED)
        list(llm.stream_chat(ASKED))
    finally:
        root.event_handlers.remove(handler)
    told = [event for event in handler.seen if event.class_name() == "RouteDecisionEvent"]
    assert [event.decision["tier"] for event in told] == [FRONTIER, FRONTIER]


class TestTrouble:
    def test_a_failing_small_tier_is_passed_over_and_a_failing_frontier_is_told(self, small, frontier):
        small.fail(500, times=2)
        llm = router(small, frontier, ALWAYS)
        assert llm.chat(ASKED).message.content == SAID
        frontier.fail(500)
        # what it raises without us, which retries know
        with pytest.raises(openai.InternalServerError) as caught:
            llm.chat(ASKED)
        assert re.match(r"routenlp: no tier answered \(small: .*; frontier: ", caught.value.__notes__[0])
        small.fail(500)
        core = RouterLLM({SMALL: like(small, SMALL), FRONTIER: ScriptedTier({}, default=None)}, ALWAYS)
        with pytest.raises(TierError, match="no tier answered") as told:
            core.chat(ASKED)
        assert len(told.value.attempts) == 2

    def test_a_stream_that_breaks_off(self, small, frontier):
        small.break_off(after=2)
        heard = []
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            heard.extend(router(small, frontier, ALWAYS).stream_chat(ASKED))
        assert [part.delta for part in heard] == ["a sm", "all "] and not frontier.requests
        small.break_off(after=0)
        parts = list(router(small, frontier, ALWAYS).stream_chat(ASKED))
        assert [part.delta for part in parts if part.delta] == WORDS

    def test_bad_arguments_are_told(self, small, frontier):
        with pytest.raises(
            PortfolioError, match="tiers: small must be an LLM or a callable Call -> Completion, got str"
        ):
            RouterLLM({SMALL: "gpt", FRONTIER: like(frontier, FRONTIER)}, ALWAYS)
        with pytest.raises(PortfolioError, match="no callable for small"):
            RouterLLM({FRONTIER: like(frontier, FRONTIER)}, ALWAYS)
        with pytest.raises(PortfolioError, match="task='x' is unknown to the release; its tasks: t"):
            router(small, frontier, ALWAYS, task="x")
        with pytest.raises(PortfolioError, match="unknown argument listener, taks; known: tiers, release, task"):
            router(small, frontier, ALWAYS, taks="t", listener=())
        with pytest.raises(DataError, match="messages: empty"):
            router(small, frontier, ALWAYS).chat([])


async def test_an_empty_answer_below_the_frontier_is_passed_over(frontier):
    with ScriptedServer(lambda request: "") as mute:
        llm = router(mute, frontier, ALWAYS)
        assert [llm.chat(ASKED).message.content, (await llm.achat(ASKED)).message.content] == [SAID, SAID]
        assert list(llm.stream_chat(ASKED))[-1].message.content == SAID


class TestStructuredPrediction:
    """Below the frontier an answer that does not parse is passed over."""

    @pytest.mark.parametrize("said", ["I will not", '{"nam', '{"number": 1}'])
    async def test_what_calls_nothing_or_cannot_be_read(self, said):
        def filling(arguments: str) -> Any:
            def reply(request: Any) -> Any:
                if arguments == "I will not":
                    return arguments
                function = {"name": request["tools"][0]["function"]["name"], "arguments": arguments}
                return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}

            return reply

        prompt = PromptTemplate("a city in {country}")
        with ScriptedServer(filling(said)) as one, ScriptedServer(filling('{"name": "Rome"}')) as other:
            llm = router(one, other, TOOLS)
            assert llm.structured_predict(City, prompt, country="Italy") == City(name="Rome")
            assert await llm.astructured_predict(City, prompt, country="Italy") == City(name="Rome")
            assert llm.as_structured_llm(City).chat(ASKED).raw == City(name="Rome")
            assert len(one.requests) == len(other.requests) == 3


class TestPieces:
    def test_calls_that_come_in_one_piece_are_no_words(self):
        release = release_beyond(gated(SMALL, 0.5, "judge"), BEYOND)
        with ScriptedServer(calling("Oslo")) as one, ScriptedServer(calling("Rome")) as other:
            judged = ScoredTier(like(one, SMALL), {"judge": lambda query, answer: 1.0})
            llm = RouterLLM({SMALL: judged, FRONTIER: like(other, FRONTIER)}, release)
            parts = list(llm.stream_chat_with_tools([TOOL], "weather?"))
        assert "".join(part.delta for part in parts) == ""
        assert llm.get_tool_calls_from_response(parts[-1])[0].tool_kwargs == {"city": "Oslo"}

    @pytest.mark.parametrize("used", [ALWAYS, Release.frontier_only(ALWAYS.portfolio)])
    def test_thoughts_are_passed_on_but_not_those_of_a_tier_that_says_nothing(self, used):
        llm = RouterLLM({SMALL: Thinks(words=["yes"]), FRONTIER: Thinks(words=["yes"])}, used, task="t")
        parts = [(part.delta, part.additional_kwargs.get("thinking_delta")) for part in llm.stream_chat(ASKED)]
        assert parts == [("", "h"), ("", "m"), ("yes", None), ("", None)]
        mute = RouterLLM({SMALL: Thinks(words=[]), FRONTIER: MockLLM()}, ALWAYS)
        assert {part.additional_kwargs.get("thinking_delta") for part in mute.stream_chat(ASKED)} == {None}


class Thinks(CustomLLM):
    words: list[str]

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    def complete(self, prompt: str, formatted: bool = False, **more: Any) -> CompletionResponse:
        raise NotImplementedError

    def stream_complete(self, prompt: str, formatted: bool = False, **more: Any) -> Any:
        raise NotImplementedError

    @llm_chat_callback()
    def stream_chat(self, messages: Any, **more: Any) -> Any:
        def pieces() -> Iterator[ChatResponse]:
            for place, thought in enumerate("hm"):
                said = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"[: place + 1])])
                yield ChatResponse(message=said, delta="", additional_kwargs={"thinking_delta": thought})
            for word in self.words:
                said = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), TextBlock(text=word)])
                yield ChatResponse(message=said, delta=word)

        return pieces()


async def test_each_way_to_ask_is_counted_once(small, frontier):
    counted = TokenCountingHandler(tokenizer=str.split)
    llm = router(small, frontier, ALWAYS, callback_manager=CallbackManager([counted]))
    llm.chat(ASKED)
    llm.complete("hi")
    await llm.acomplete("hi")
    list(llm.stream_complete("hi"))
    [part async for part in await llm.astream_complete("hi")]
    assert len(counted.llm_token_counts) == len(small.requests) == 5


async def test_a_core_tier_answers_an_agent_without_tools(frontier):
    llm = RouterLLM({SMALL: ScriptedTier(default="core says"), FRONTIER: like(frontier, FRONTIER)}, ALWAYS)
    assert str(await FunctionAgent(tools=[], llm=llm).run("weather?", memory=memory())) == "core says"


def test_tools_through_a_router_in_a_router(frontier):
    with ScriptedServer(calling("Oslo")) as one:
        inner = RouterLLM({"inner": like(one, "inner")}, Release.frontier_only(Portfolio((Tier("inner"),))))
        llm = RouterLLM({SMALL: inner, FRONTIER: like(frontier, FRONTIER)}, TOOLS)
        assert llm.predict_and_call([TOOL], "weather?").response == "sunny in Oslo"
