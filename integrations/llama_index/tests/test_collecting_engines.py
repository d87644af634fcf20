"""Outcomes of whole engines: what `collect` keeps is what a `RouterLLM` in the engine decides by."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import FRONTIER, PRICES, SMALL
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.llms.openai_like import OpenAILike

from llama_index.llms.routenlp import RouterLLM, engine_tiers
from routenlp_plugins import FitOptions, Portfolio, Query, Reference, Task, Tier, collect, fit
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.testing import ScriptedServer

# of LlamaIndex's own making
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::pydantic.warnings.PydanticDeprecatedSince{since}") for since in (20, 211)
]
PORTFOLIO = Portfolio(
    tuple(Tier(name, PRICES[name], PRICES[name]) for name in (SMALL, FRONTIER)), FRONTIER, (Task("rag", "accuracy"),)
)


@pytest.fixture(autouse=True)
def no_event_loop_left() -> Iterator[None]:
    """LlamaIndex makes one where there is none, and leaves it open."""
    yield
    left = getattr(asyncio.get_event_loop_policy(), "_local", None)
    loop = getattr(left, "_loop", None)
    if loop is not None and not loop.is_running():
        loop.close()
        asyncio.set_event_loop(None)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: "in the drawer") as running:
        yield running


@pytest.fixture
def index() -> VectorStoreIndex:
    documents = [Document(text="The card is in the drawer.")]
    return VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8), transformations=[])


def llms(server: ScriptedServer) -> dict[str, Any]:
    common = {"api_base": server.url, "api_key": "none", "max_retries": 0, "is_chat_model": True}
    return {
        name: OpenAILike(model=name, reuse_client=False, additional_kwargs={"logprobs": True}, **common)
        for name in (SMALL, FRONTIER)
    }


def test_a_release_of_collected_outcomes_routes_the_engine(server, index, tmp_path):
    questions = [f"question {number}: where is the card?" for number in range(120)]
    references = [Reference(Query(text, "rag", str(place)), "in the drawer") for place, text in enumerate(questions)]
    tiers = engine_tiers(llms(server), lambda llm: index.as_query_engine(llm=llm))
    collect(references, tiers, tmp_path / "outcomes.jsonl", portfolio=PORTFOLIO, workers=2)
    (first, *_) = read_outcomes(tmp_path / "outcomes.jsonl")
    told = first.outcomes[SMALL].completion
    assert (told.text, told.model) == ("in the drawer", SMALL)
    assert told.token_logprobs
    assert told.cost_usd > 0
    assert "The card is in the drawer." in first.asked
    release = fit(tmp_path / "outcomes.jsonl", PORTFOLIO, alpha=0.1, options=FitOptions(router=None))
    heard: list[Any] = []
    llm = RouterLLM(llms(server), release, listeners=(heard.append,))
    assert str(index.as_query_engine(llm=llm).query("question 7: where is the card?")) == "in the drawer"
    assert heard[0].accepted.tier == SMALL


def test_an_engine_that_asks_several_times_is_told(server, index, tmp_path):
    tiers = engine_tiers(
        llms(server),
        lambda llm: index.as_query_engine(llm=llm),
        ask=lambda engine, text: (engine.query(text), engine.query(text))[0],
    )
    one = [Reference(Query("where?", "rag", "1"), "in the drawer")]
    collect(one, tiers, tmp_path / "outcomes.jsonl", portfolio=PORTFOLIO)
    (row,) = read_outcomes(tmp_path / "outcomes.jsonl")
    assert "asks its LLM 2 times a query" in row.outcomes[SMALL].error


def test_chat_engines_remember_and_are_refused(server, index, tmp_path):
    class Chat:
        """As LlamaIndex's chat engines, which leave event loops open behind them."""

        def chat(self, message: str) -> str:
            raise AssertionError("it would remember")

    tiers = engine_tiers(llms(server), lambda llm: Chat())
    one = [Reference(Query("where?", "rag", "1"), "in the drawer")]
    collect(one, tiers, tmp_path / "outcomes.jsonl", portfolio=PORTFOLIO)
    (row,) = read_outcomes(tmp_path / "outcomes.jsonl")
    assert "Chat has no query(text): say how it is asked" in row.outcomes[SMALL].error


def test_a_failing_tier_is_a_failed_outcome(server, index, tmp_path):
    server.fail(500, times=1)
    tiers = engine_tiers(llms(server), lambda llm: index.as_query_engine(llm=llm))
    one = [Reference(Query("where?", "rag", "1"), "in the drawer")]
    collect(one, tiers, tmp_path / "outcomes.jsonl", portfolio=PORTFOLIO)
    (row,) = read_outcomes(tmp_path / "outcomes.jsonl")
    assert [outcome.error is None for outcome in row.outcomes.values()] == [False, True]
