"""`SignalEventHandler`: what engines and agents do becomes traces and signals; behind a router it is the decision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers import FRONTIER, PRICES, SMALL, gated, kept, signals
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import BaseModel

from llama_index.llms.routenlp import RouterLLM, SignalEventHandler, shadow_tiers
from routenlp_plugins import (
    Policy,
    Portfolio,
    PortfolioError,
    Release,
    Shadow,
    ShadowOptions,
    Task,
    Tier,
    TraceStore,
)
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

# of LlamaIndex's own making
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::pydantic.warnings.PydanticDeprecatedSince{since}") for since in (20, 211)
]
PORTFOLIO = Portfolio(
    tuple(Tier(name, PRICES[name], PRICES[name]) for name in (SMALL, FRONTIER)), FRONTIER, (Task("t"), Task("other"))
)
ASKED = [ChatMessage("where is it?")]


def release(rung: Rung) -> Release:
    return Release(PORTFOLIO, Policy(FRONTIER, {"t": (rung,), "other": ()}))


@pytest.fixture
def store(tmp_path) -> Iterator[TraceStore]:
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: f"{request['model']} says so") as running:
        yield running


def like(server: ScriptedServer, name: str = FRONTIER, **more: Any) -> OpenAILike:
    facts = {"is_chat_model": True, "is_function_calling_model": False, "context_window": 8000, "max_retries": 0}
    logprobs = {"logprobs": True}
    return OpenAILike(
        model=name, api_base=server.url, api_key="none", reuse_client=False, additional_kwargs=logprobs, **facts, **more
    )


async def everything(llm: Any) -> None:
    """Each way to ask, once."""
    llm.chat(ASKED)
    await llm.achat(ASKED)
    llm.complete("where is it?")
    await llm.acomplete("where is it?")
    list(llm.stream_chat(ASKED))
    [part async for part in await llm.astream_chat(ASKED)]
    list(llm.stream_complete("where is it?"))
    [part async for part in await llm.astream_complete("where is it?")]


async def test_each_call_is_one_trace_however_it_was_asked(store, server):
    handler = SignalEventHandler(store, portfolio=PORTFOLIO, task="t")
    with handler.attached():
        await everything(like(server))
    found = kept(store)
    assert len(found) == len(server.requests) == 8
    assert {one.trace.query.text for one in found} == {"where is it?"}
    assert {(one.trace.accepted.tier, one.trace.task, one.origin) for one in found} == {(FRONTIER, "t", "collected")}
    told = found[0].trace.accepted.completion
    assert (told.text, told.model) == ("frontier says so", FRONTIER)
    assert told.token_logprobs
    assert told.cost_usd == pytest.approx((told.input_tokens + told.output_tokens) * 10 / 1e6)
    assert signals(store) == []
    # nothing is left behind, and nobody listens any more
    assert len(handler._recorder.runs) == 0
    assert not (handler._models or handler._speaking or handler._waiting)
    like(server).chat(ASKED)
    assert len(kept(store)) == 8


async def test_behind_a_router_the_whole_decision_is_kept_once(store, server):
    tiers = {SMALL: like(server, SMALL), FRONTIER: like(server)}
    llm = RouterLLM(tiers, release(gated(SMALL, 1.0, "confidence")), task="t", listeners=(store.record,))
    handler = SignalEventHandler(store, portfolio=PORTFOLIO)
    with handler.attached():
        await everything(llm)
    found = kept(store)
    assert len(found) == 8
    assert {tuple(attempt.tier for attempt in one.trace.attempts) for one in found} == {(SMALL, FRONTIER)}
    assert {one.origin for one in found} == {"served"}
    assert len(handler._recorder.runs) == 0
    assert not (handler._models or handler._speaking or handler._waiting)


def test_a_query_engine_is_one_outermost_span(store, server):
    index = VectorStoreIndex.from_documents(
        [Document(text="The card is in the drawer.")], embed_model=MockEmbedding(embed_dim=8), transformations=[]
    )
    engine = index.as_query_engine(llm=like(server), response_mode="refine")
    with SignalEventHandler(store, portfolio=PORTFOLIO, task="t").attached():
        engine.query("where is it?")
        index.as_query_engine(llm=like(server), streaming=True).query("where is it?").get_response()
    found = kept(store)
    assert len(found) == 2
    assert len({one.unit for one in found}) == 2
    assert any(name.startswith("RetrieverQueryEngine.query-") for name in found[0].runs)


def test_structured_prediction_tells_whether_it_could_be_read(store):
    class Place(BaseModel):
        name: str

    said = iter([json.dumps({"name": "drawer"}), "no JSON at all"])
    with ScriptedServer(lambda request: next(said)) as server, SignalEventHandler(store).attached():
        like(server).structured_predict(Place, PromptTemplate("where is it?"))
        with pytest.raises(ValueError, match="JSON"):
            like(server).structured_predict(Place, PromptTemplate("where is it?"))
    assert [one[1:] for one in signals(store)] == [
        ("parser", "parser:structured prediction", 1.0),
        ("parser", "parser:structured prediction", 0.0),
    ]


async def test_failures_are_kept_too(store, server):
    server.fail(500, times=2)
    with SignalEventHandler(store, portfolio=PORTFOLIO).attached():
        for _ in range(2):
            with pytest.raises(Exception, match="500"):
                like(server).chat(ASKED)
        llm = RouterLLM({SMALL: like(server, SMALL), FRONTIER: like(server)}, release(Rung(SMALL)), task="t")
        server.fail(500, times=2)
        with pytest.raises(Exception, match="no tier answered"):
            await llm.achat(ASKED)
    found = kept(store)
    assert [[attempt.tier for attempt in one.trace.attempts] for one in found] == [
        [FRONTIER],
        [FRONTIER],
        [SMALL, FRONTIER],
    ]
    assert all(attempt.error for one in found for attempt in one.trace.attempts)


def test_tags_name_tasks_and_dialogues(store, server):
    llm = RouterLLM({SMALL: like(server, SMALL), FRONTIER: like(server)}, release(Rung(SMALL)))
    with instrument_tags({"routenlp_task": "t"}):
        assert llm.chat(ASKED).additional_kwargs["routenlp"]["tier"] == SMALL
    tags = instrument_tags({"routenlp_task": "other", "thread_id": "dialogue-7"})
    with SignalEventHandler(store, portfolio=PORTFOLIO, task="t").attached(), tags:
        like(server).chat(ASKED)
    (found,) = kept(store)
    assert (found.trace.task, found.unit) == ("other", "dialogue-7")


def test_a_share_goes_to_other_tiers_too(store, server):
    with Shadow(store, PORTFOLIO, shadow_tiers({SMALL: like(server, SMALL)}), ShadowOptions(share=1.0)) as shadow:
        with SignalEventHandler(store, portfolio=PORTFOLIO, task="t", shadow=shadow).attached():
            like(server).chat([ChatMessage("Be kind.", role="system"), *ASKED])
        shadow.close()
    assert [request["model"] for request in server.requests] == [FRONTIER, SMALL]
    assert server.requests[0]["messages"] == server.requests[1]["messages"]


def test_a_stream_that_nobody_reads_to_its_end_is_a_failure(store, server):
    handler = SignalEventHandler(store, portfolio=PORTFOLIO)
    with handler.attached():
        stream = like(server).stream_chat(ASKED)
        next(stream)
        stream.close()
    assert [attempt.error for one in kept(store) for attempt in one.trace.attempts] == ["GeneratorExit"]
    assert len(handler._recorder.runs) == 0


async def test_a_structured_model_is_the_model_in_it(store):
    class Place(BaseModel):
        name: str

    with ScriptedServer(lambda request: json.dumps({"name": "drawer"})) as server:
        with SignalEventHandler(store, portfolio=PORTFOLIO).attached():
            structured = like(server).as_structured_llm(Place)
            structured.chat(ASKED)
            list(structured.stream_chat(ASKED))
        assert len(kept(store)) == len(server.requests) == 2
    assert {one.trace.accepted.tier for one in kept(store)} == {FRONTIER}


def test_a_routed_stream_that_is_given_up_is_no_call_of_the_frontier(store, server):
    llm = RouterLLM({SMALL: like(server, SMALL), FRONTIER: like(server)}, release(Rung(SMALL)), task="t")
    handler = SignalEventHandler(store, portfolio=PORTFOLIO)
    with handler.attached():
        stream = llm.stream_chat(ASKED)
        next(stream)
        stream.close()
    assert kept(store) == []
    assert len(handler._recorder.runs) == 0


def test_streams_have_no_log_probabilities_of_their_last_piece_only(store, server):
    with SignalEventHandler(store).attached():
        list(like(server).stream_chat(ASKED))
        like(server).chat(ASKED)
    streamed, whole = (one.trace.accepted.completion.mean_logprob for one in kept(store))
    assert streamed is None
    assert whole is not None


def test_it_may_be_attached_within_itself_and_by_many_threads(store, server):
    handler = SignalEventHandler(store, portfolio=PORTFOLIO)
    llm = like(server)

    def ask() -> None:
        with handler.attached():
            llm.chat(ASKED)

    handler.attach()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(), range(40)))
    llm.chat(ASKED)
    handler.detach()
    llm.chat(ASKED)
    assert len(kept(store)) == 41
    assert len(handler._recorder.runs) == 0


def test_what_cannot_be_kept_is_logged(store, server, caplog):
    with SignalEventHandler(store, portfolio=PORTFOLIO).attached(), instrument_tags({"routenlp_task": 7}):
        like(server).chat(ASKED)
    assert "LLMChatStartEvent is not kept: routenlp_task must be the name of a task, got 7" in caplog.text


def test_a_mock_is_a_model_as_any_other(store):
    with SignalEventHandler(store).attached():
        MockLLM().complete("where is it?")
    (found,) = kept(store)
    assert found.trace.accepted.completion.text == "where is it?"


async def test_what_a_tier_asks_of_itself_while_its_stream_is_read_is_no_call_of_its_own(store):
    """`CustomLLM.astream_chat` calls its `stream_chat` only then."""
    llm = RouterLLM({SMALL: MockLLM(), FRONTIER: MockLLM()}, release(Rung(SMALL)), task="t")
    with SignalEventHandler(store).attached():
        list(llm.stream_chat(ASKED))
        [part async for part in await llm.astream_chat(ASKED)]
    assert [one.origin for one in kept(store)] == ["served", "served"]


def test_a_tier_that_there_is_not(store):
    with pytest.raises(PortfolioError, match="'big'"):
        SignalEventHandler(store, portfolio=PORTFOLIO, tiers={"gpt-4o": "big"})
