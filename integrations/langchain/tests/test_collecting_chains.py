"""Outcomes of a whole chain on each tier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, SMALL, portfolio
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from langchain_routenlp import Decisions, RouterRunnable, chain_tiers
from routenlp_plugins import (
    Call,
    Completion,
    Portfolio,
    Query,
    Reference,
    Task,
    Tier,
    TierError,
    collect,
    fit,
    replay,
)
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.evaluate.table import task_tables
from routenlp_plugins.testing import ScriptedServer, ScriptedTier
from routenlp_plugins.tiers.boundary import acall_tier, call_tier


def chain(server: ScriptedServer):
    model = ChatOpenAI(model="m", base_url=server.url, api_key="none", logprobs=True, max_retries=0)
    return ChatPromptTemplate.from_template("Answer in JSON: {text}") | model | JsonOutputParser()


def to_input(query: Query) -> dict[str, str]:
    return {"text": query.text}


def test_each_tier_answers_through_the_whole_chain(tmp_path):
    completion = Completion('{"a":1}', confidence=0.4, input_tokens=1, output_tokens=1)
    small = ScriptedTier({"Answer in JSON: broken": Completion("not JSON")}, default=completion)
    with ScriptedServer(lambda request: '{"a": 1}') as server:
        tiers = chain_tiers(chain(server), {SMALL: small, FRONTIER: None}, to_input=to_input)
        queries = [Reference(Query(text, "t", text), '{"a": 1}') for text in ("fine", "broken")]
        collect(queries, tiers, tmp_path / "o.jsonl", portfolio=portfolio(Task("t", "accuracy")))
    fine, broken = read_outcomes(tmp_path / "o.jsonl")
    assert (fine.outcomes[SMALL].quality, fine.outcomes[FRONTIER].quality) == (1, 1)
    assert fine.outcomes[SMALL].completion.confidence == 0.4
    assert fine.outcomes[FRONTIER].completion.mean_logprob < 0
    assert fine.outcomes[FRONTIER].completion.input_tokens > 0
    # the router, in the place of the model, would have accepted it: it is a bad answer, not a failed tier
    assert (broken.outcomes[SMALL].quality, broken.outcomes[SMALL].error) == (0, None)


async def test_a_failing_model_is_a_failed_tier():
    down = ScriptedTier(default=OSError("refused"))
    with ScriptedServer({}) as server:
        tier = chain_tiers(chain(server), {SMALL: down}, to_input=to_input)[SMALL]
        for attempt in (call_tier, acall_tier):
            error = await failure(attempt, tier)
            assert "OSError: refused" in error


async def failure(attempt, tier) -> str:
    call = Call(SMALL, Query("hi", "t"))
    with pytest.raises(TierError) as caught:
        if attempt is call_tier:
            call_tier(portfolio().tier(SMALL), tier, call)
        else:
            await acall_tier(portfolio().tier(SMALL), tier.acall, call)
    return str(caught.value)


async def test_a_chain_that_calls_its_model_twice_has_no_outcome_of_its_own():
    small = ScriptedTier(default=Completion('{"a": 1}'))
    with ScriptedServer({}) as server:
        once = chain(server)
        model = once.steps[1]
        twice = once | (lambda answer: {"text": str(answer)}) | once.first | model | JsonOutputParser()
        tier = chain_tiers(twice, {SMALL: small}, to_input=to_input)[SMALL]
        assert "the chain calls its model 2 times a query" in await failure(call_tier, tier)
        assert "the chain calls its model 2 times a query" in await failure(acall_tier, tier)


async def test_a_chain_whose_calls_always_go_to_the_frontier_has_nothing_to_collect():
    with ScriptedServer(lambda request: '{"a": 1}') as server:
        model = ChatOpenAI(model="m", base_url=server.url, api_key="none")
        structured = model.with_structured_output({"title": "a", "type": "object"}, method="json_mode")
        tier = chain_tiers(structured, {SMALL: model})[SMALL]
        assert "with structured output, and such calls always go to the frontier" in await failure(call_tier, tier)


def test_what_a_core_tier_says_of_itself_reaches_the_outcome():
    own = Completion('{"a": 1}', mean_logprob=-0.1, cost_usd=0.5, latency_ms=2.0, prompt="mine")
    with ScriptedServer({}) as server:
        tier = chain_tiers(chain(server), {SMALL: ScriptedTier(default=own)}, to_input=to_input)[SMALL]
        assert tier(Call(SMALL, Query("hi", "t"))) == replace(own, asked="Answer in JSON: hi")


def test_agreement_is_of_the_words_of_the_models_as_it_will_be_when_serving(tmp_path):
    """A parser makes one answer of two texts that a router, in the place of the model, would see differ."""
    used = Portfolio(
        (Tier(SMALL, version="1"), Tier("middle", version="1"), Tier(FRONTIER, version="1")),
        FRONTIER,
        (Task("t", "accuracy"),),
    )
    costs = {"input_tokens": 1, "output_tokens": 1, "cost_usd": 1.0}
    scripted = {
        name: ScriptedTier(default=Completion(text, confidence=0.5, **costs))
        for name, text in ((SMALL, '{"a":1}'), ("middle", '{"a": 1}'), (FRONTIER, '{"a": 1}'))
    }
    with ScriptedServer({}) as server:
        tiers = chain_tiers(chain(server), scripted, to_input=to_input)
        collect([Reference(Query("hi", "t", "1"), '{"a": 1}')], tiers, tmp_path / "o.jsonl", portfolio=used)
    (row,) = read_outcomes(tmp_path / "o.jsonl")
    small, middle = (row.outcomes[name].completion for name in (SMALL, "middle"))
    assert (small.text, small.said, small.words) == ('{"a": 1}', '{"a":1}', '{"a":1}')
    assert (middle.text, middle.said, middle.words) == ('{"a": 1}', None, '{"a": 1}')
    assert task_tables([row], used)["t"].agreement[SMALL, "middle"] == [0.0]


def test_a_template_around_the_words_of_the_user_is_no_unlike_query(tmp_path):
    """What the certificate speaks of is what the router sees: the rendered message."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(60)]
    texts = [" ".join(rng.choice(words, 6)) for _ in range(200)]
    small = ScriptedTier(default=Completion("{}", confidence=0.9, input_tokens=1, output_tokens=1))
    used = portfolio(Task("t", "accuracy"))
    with ScriptedServer(lambda request: "{}") as server:
        tiers = chain_tiers(chain(server), {SMALL: small, FRONTIER: None}, to_input=to_input)
        queries = [Reference(Query(text, "t", str(i)), "{}") for i, text in enumerate(texts)]
        collect(queries, tiers, tmp_path / "o.jsonl", portfolio=used)
        members = read_outcomes(tmp_path / "o.jsonl")
        assert {(m.query.text, m.asked) for m in members} == {(text, f"Answer in JSON: {text}") for text in texts}
        release = fit(members, used, alpha=0.1)
        assert replay(members, release).tier_share[SMALL] > 0.9
        decisions = Decisions()
        routed = RouterRunnable.from_chain(chain(server), {SMALL: small}, release)
        for text in texts[:40]:
            routed.invoke({"text": text}, {"callbacks": [decisions]})
    tiers_used = [message.response_metadata["routenlp"]["tier"] for message in decisions.messages]
    assert tiers_used.count(SMALL) > 36


async def test_sync_and_async_complete_alike():
    small = ScriptedTier(default=Completion('{"a": 1}', latency_ms=3.0))
    with ScriptedServer({}) as server:
        tier = chain_tiers(chain(server), {SMALL: small}, to_input=to_input)[SMALL]
        call = Call(SMALL, Query("hi", "t"))
        assert tier(call) == await tier.acall(call)
