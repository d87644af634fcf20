"""One decision in three homes: the same query, release and tiers give the same tier, trace and cost everywhere.

Real outcomes: nine models over 1,300 questions of a medical examination. On 800 of them a release is fitted; the 500
others are asked of the plain dispatcher and of each adapter, over real clients in front of a server that replays what
the models said.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="dspy-")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy
import httpx
import pytest
from dspy.lm15 import Message, Request
from helpers import write_jsonl
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from dspy_routenlp import RouterEngine
from dspy_routenlp.engine import AsyncRouterEngine
from langchain_routenlp import RouterChatModel
from llama_index.llms.routenlp import RouterLLM
from routenlp_plugins import (
    Answer,
    Completion,
    Dispatcher,
    FitOptions,
    OpenAICompatibleTier,
    Portfolio,
    Query,
    Release,
    fit,
)
from routenlp_plugins.testing import ScriptedServer

QUERIES = 500
Facts = tuple[Any, ...]


@pytest.fixture(scope="module")
def rows(data_folder) -> list[dict[str, Any]]:
    file = data_folder / "outcomes" / "medmcqa_nine.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def release(rows, data_folder, tmp_path_factory) -> Release:
    portfolio = Portfolio.from_yaml(data_folder / "outcomes" / "medmcqa_nine.portfolio.yaml")
    file = write_jsonl(tmp_path_factory.mktemp("parity") / "first.jsonl", *rows[:-QUERIES])
    return fit(file, portfolio, retention=0.95, options=FitOptions(router=None))


@pytest.fixture(scope="module")
def server(rows) -> Iterator[ScriptedServer]:
    said: dict[tuple[str, str], Mapping[str, Any]] = {
        (tier, row["text"]): outcome for row in rows for tier, outcome in row["outcomes"].items()
    }

    def reply(request: Mapping[str, Any]) -> Completion:
        outcome = said[request["model"], request["messages"][-1]["content"]]
        return Completion(outcome["answer"], mean_logprob=outcome["mean_logprob"])

    with ScriptedServer(reply) as running:
        yield running


@pytest.fixture(scope="module")
def texts(rows) -> list[str]:
    return [row["text"] for row in rows[-QUERIES:]]


def facts(decision: Mapping[str, Any], text: str) -> Facts:
    """All of a decision but what a clock or chance has a part in."""
    attempts = [
        {name: value for name, value in attempt.items() if name != "latency_ms"} for attempt in decision["attempts"]
    ]
    rest = {name: value for name, value in decision.items() if name not in ("id", "attempts", "cost_usd")}
    return text, json.dumps(rest, sort_keys=True), json.dumps(attempts, sort_keys=True), round(decision["cost_usd"], 12)


@pytest.fixture(scope="module")
def plain(release, server, texts) -> list[Facts]:
    answers = dispatcher(release, server)
    found = [answers.run(Query(text, "medmcqa")) for text in texts]
    tiers = [answer.tier for answer in found]
    # else there would be nothing to compare
    assert len(set(tiers)) > 1 and max(map(tiers.count, set(tiers))) < len(tiers)
    return [facts(answer.trace.as_dict(), answer.text) for answer in found]


def dispatcher(release: Release, server: ScriptedServer) -> Dispatcher:
    common = {"base_url": server.url, "api_key": "none"}
    return Dispatcher(release, {name: OpenAICompatibleTier(name, **common) for name in release.portfolio.names})


def langchain(release: Release, server: ScriptedServer, **more: Any) -> RouterChatModel:
    common = {
        "base_url": server.url,
        "api_key": "none",
        "max_retries": 0,
        "logprobs": True,
        "stream_usage": True,
        **more,
    }
    return RouterChatModel(
        tiers={name: ChatOpenAI(model=name, **common) for name in release.portfolio.names}, release=release
    )


def llama_index(release: Release, server: ScriptedServer, **more: Any) -> RouterLLM:
    common = {"api_base": server.url, "api_key": "none", "max_retries": 0, "is_chat_model": True, **more}
    return RouterLLM({name: OpenAILike(model=name, **common) for name in release.portfolio.names}, release)


def dspy_engine(release: Release, server: ScriptedServer) -> RouterEngine:
    common = {"api_base": server.url, "api_key": "none", "cache": False, "num_retries": 0, "logprobs": True}
    return RouterEngine({name: dspy.LM(f"openai/{name}", **common) for name in release.portfolio.names}, release)


def of_engine(response: Any, text: str | None = None) -> Facts:
    """Of a response, or of the last event of a stream and what it said."""
    return facts(response.provider_data["routenlp"], response.message.text if text is None else text)


def of_message(message: Any) -> Facts:
    return facts(message.response_metadata["routenlp"], message.text)


def of_response(response: Any) -> Facts:
    return facts(response.additional_kwargs["routenlp"], response.message.content)


def added(chunks: Iterator[Any]) -> Any:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


class TestDispatcher:
    def test_streams(self, release, server, texts, plain):
        router = dispatcher(release, server)
        last = [list(router.stream(Query(text, "medmcqa")))[-1] for text in texts]
        assert [facts(answer.trace.as_dict(), answer.text) for answer in last] == plain

    def test_async_and_many_at_once(self, release, server, texts, plain):
        router = dispatcher(release, server)

        async def everything() -> list[Answer]:
            some = asyncio.Semaphore(50)

            async def ask(text: str) -> Answer:
                async with some:
                    return await router.arun(Query(text, "medmcqa"))

            found = await asyncio.gather(*map(ask, texts))
            for tier in router.tiers.values():
                await tier.aclose()
            return found

        found = asyncio.run(everything())
        assert [facts(answer.trace.as_dict(), answer.text) for answer in found] == plain


class TestLangChain:
    def test_invoke_and_batch(self, release, server, texts, plain):
        model = langchain(release, server)
        assert [of_message(model.invoke(text)) for text in texts] == plain
        assert [of_message(message) for message in model.batch(texts, {"max_concurrency": 4})] == plain

    def test_streams(self, release, server, texts, plain):
        model = langchain(release, server)
        assert [of_message(added(model.stream(text))) for text in texts] == plain

    async def test_async(self, release, server, texts, plain):
        async with httpx.AsyncClient() as client:
            model = langchain(release, server, http_async_client=client)
            assert [of_message(m) for m in await model.abatch(texts, {"max_concurrency": 8})] == plain
            found = [added(iter([chunk async for chunk in model.astream(text)])) for text in texts]
        assert [of_message(message) for message in found] == plain


class TestLlamaIndex:
    def test_chat(self, release, server, texts, plain):
        llm = llama_index(release, server, additional_kwargs={"logprobs": True})
        assert [of_response(llm.chat([ChatMessage(text)])) for text in texts] == plain

    async def test_async(self, release, server, texts, plain):
        async with httpx.AsyncClient() as client:
            llm = llama_index(release, server, additional_kwargs={"logprobs": True}, async_http_client=client)
            assert [of_response(await llm.achat([ChatMessage(text)])) for text in texts] == plain

    def test_streams(self, release, server, texts, plain):
        """Their last answer has no log-probabilities: LlamaIndex's streams do not carry them."""
        usage = {"logprobs": True, "stream_options": {"include_usage": True}}
        llm = llama_index(release, server, additional_kwargs=usage)
        found = [of_response(list(llm.stream_chat([ChatMessage(text)]))[-1]) for text in texts]
        assert [without_evidence_of_the_last(one) for one in found] == [
            without_evidence_of_the_last(one) for one in plain
        ]


class TestDSPy:
    def test_calls(self, release, server, texts, plain):
        model = dspy_engine(release, server).lm()
        found = []
        for text in texts:
            model(text)
            found.append(of_engine(model.history[-1]["response"]))
        assert found == plain

    async def test_async_and_many_at_once(self, release, server, texts, plain):
        model, some = dspy_engine(release, server).lm(), asyncio.Semaphore(8)

        async def ask(text: str) -> Any:
            async with some:
                return await model.acall(Request(model=model.model, messages=(Message.user(text),)))

        assert [of_engine(response) for response in await asyncio.gather(*map(ask, texts))] == plain

    async def test_streams(self, release, server, texts, plain):
        """Their last answer has no log-probabilities either, and no model where its provider names none."""
        engine = dspy_engine(release, server)
        asynchronous, found = AsyncRouterEngine(engine), []
        for place, text in enumerate(texts):
            request = Request(model="any", messages=(Message.user(text),))
            events = [e async for e in asynchronous.stream(request)] if place % 2 else list(engine.stream(request))
            said = "".join(event.delta.text for event in events if event.type == "delta")
            found.append(of_engine(events[-1], said))
        assert [without_evidence_of_the_last(one) for one in found] == [
            without_evidence_of_the_last(one) for one in plain
        ]


def without_evidence_of_the_last(told: Facts) -> Facts:
    *earlier, last = json.loads(told[2])
    last = {name: value for name, value in last.items() if name not in ("mean_logprob", "scores")}
    return told[0], told[1], earlier, last, told[3]
