"""A chain whose model was replaced answers as before when every query is sent to the frontier."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from helpers import FRONTIER, SMALL, gated, portfolio, release
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import (
    RouterRunnable as KeyedRunnable,
)
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from langchain_routenlp import RouterRunnable
from routenlp_plugins import Completion, PortfolioError, Release, TierError
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer, ScriptedTier

Chain = Runnable[Any, Any]
PROMPT = ChatPromptTemplate.from_messages([("system", "Be {tone}."), ("human", "{text}")])
INPUTS = [{"tone": tone, "text": f"{text} — né à Łódź, 東京"} for tone in ("brief", "kind") for text in "abcde"]


class Reply(BaseModel):
    """A structured reply."""

    text: str
    length: int


def reply(request: Any) -> str:
    """Depends on every byte of the messages."""
    text = "|".join(str(message["content"]) for message in request["messages"])
    return json.dumps({"text": text[::-1], "length": len(text)}, ensure_ascii=False)


@pytest.fixture(scope="module")
def server():
    with ScriptedServer(reply) as running:
        yield running


def chat(server: ScriptedServer, name: str = "frontier-model") -> ChatOpenAI:
    # langchain-openai keeps connections of event loops that have ended
    headers = {"Connection": "close"}
    return ChatOpenAI(model=name, base_url=server.url, api_key="none", max_retries=0, default_headers=headers)


def sequence(server: ScriptedServer) -> Chain:
    return PROMPT | chat(server) | StrOutputParser()


def parallel(server: ScriptedServer) -> Chain:
    model = chat(server)
    return RunnableParallel(
        first=PROMPT | model | StrOutputParser(),
        second=ChatPromptTemplate.from_template("Again: {text}") | model | JsonOutputParser(),
        untouched=RunnablePassthrough(),
    )


def binding_and_retry(server: ScriptedServer) -> Chain:
    model = chat(server).bind(stop=["\n"]).with_retry(stop_after_attempt=2)
    return PROMPT | model.with_config(tags=["mine"]) | StrOutputParser()


def fallbacks(server: ScriptedServer) -> Chain:
    spare = chat(server, "spare-model")
    return PROMPT | chat(server).with_fallbacks([spare]) | StrOutputParser()


def branch_and_assign(server: ScriptedServer) -> Chain:
    model = chat(server)
    choose = RunnableBranch(
        (lambda x: x["tone"] == "kind", PROMPT | model | StrOutputParser()),
        ChatPromptTemplate.from_template("{text}") | model | StrOutputParser(),
    )
    return RunnablePassthrough.assign(answer=choose) | RunnableLambda(lambda x: {**x, "size": len(x["answer"])})


def structured(server: ScriptedServer) -> Chain:
    return PROMPT | chat(server).with_structured_output(Reply, method="json_schema")


def keyed_and_mapped(server: ScriptedServer) -> Chain:
    each = (PROMPT | chat(server) | JsonOutputParser()).map()
    choice: Chain = KeyedRunnable({"each": each, "none": RunnableLambda(lambda x: [])})
    return RunnableLambda(lambda x: {"key": "each", "input": [x, {**x, "text": "other"}]}) | choice


CHAINS = [sequence, parallel, binding_and_retry, fallbacks, branch_and_assign, structured, keyed_and_mapped]


def run(chain: Chain, way: str) -> list[Any]:
    match way:
        case "invoke":
            return [chain.invoke(one) for one in INPUTS]
        case "ainvoke":

            async def all_of_them() -> list[Any]:
                return await asyncio.gather(*(chain.ainvoke(one) for one in INPUTS))

            return asyncio.run(all_of_them())
        case "batch":
            return chain.batch(INPUTS, {"max_concurrency": 4})
        case _:
            return asyncio.run(chain.abatch(INPUTS))


def as_bytes(outputs: list[Any]) -> bytes:
    return json.dumps(outputs, ensure_ascii=False, default=lambda o: o.model_dump()).encode()


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch"])
@pytest.mark.parametrize("build", CHAINS)
def test_outputs_are_the_same_byte_for_byte(server, build: Callable[[ScriptedServer], Chain], way: str):
    chain = build(server)
    before = as_bytes(run(chain, way))
    routed = RouterRunnable.from_chain(chain, tiers={}, release=Release.frontier_only(portfolio()))
    assert as_bytes(run(routed, way)) == before
    assert as_bytes(run(chain, way)) == before  # the original is as it was
    assert b"\xc5\x81" in before


@pytest.mark.parametrize("build", CHAINS)
def test_requests_to_the_endpoint_are_the_same(server, build):
    chain = build(server)
    server.requests.clear()
    chain.invoke(INPUTS[0])
    before = list(server.requests)
    server.requests.clear()
    RouterRunnable.from_chain(chain, tiers={}, release=Release.frontier_only(portfolio())).invoke(INPUTS[0])
    key = json.dumps
    assert sorted(map(key, server.requests)) == sorted(map(key, before))


def test_the_cheap_tier_answers_in_the_place_of_the_model(server):
    small = ScriptedTier(default=Completion("small says", confidence=0.9))
    routed = RouterRunnable.from_chain(sequence(server), {SMALL: small}, release(gated(SMALL, 0.5, "confidence")))
    assert routed.invoke(INPUTS[0]) == "small says"
    assert "".join(routed.stream(INPUTS[0])) == "small says"
    (call, _) = small.calls
    assert call.query.text == INPUTS[0]["text"]
    assert call.query.chat[0] == {"role": "system", "content": "Be brief."}


def test_what_is_bound_to_the_model_reaches_every_tier(server):
    with ScriptedServer(reply) as cheap:
        chain = binding_and_retry(server)
        RouterRunnable.from_chain(chain, {SMALL: chat(cheap)}, release(Rung(SMALL))).invoke(INPUTS[0])
        (request,) = cheap.requests
    assert request["stop"] == ["\n"]


def test_a_release_may_be_a_folder(server, tmp_path):
    folder = release(Rung(SMALL)).save(tmp_path / "r")
    routed = RouterRunnable.from_chain(sequence(server), {SMALL: ScriptedTier(default="small")}, release=folder)
    assert routed.invoke(INPUTS[0]) == "small"


def test_the_same_model_used_twice_is_one_model(server):
    routed = RouterRunnable.from_chain(
        parallel(server), {SMALL: ScriptedTier(default='{"a": 1}')}, release=release(Rung(SMALL))
    )
    assert routed.invoke(INPUTS[0]) == {"first": '{"a": 1}', "second": {"a": 1}, "untouched": INPUTS[0]}


def two_models(server: ScriptedServer) -> Chain:
    one, two = chat(server, "one"), chat(server, "two")
    return RunnableParallel(one=PROMPT | one | StrOutputParser(), two=PROMPT | two | StrOutputParser())


def test_of_several_models_one_is_named(server):
    chain = two_models(server)
    small = {SMALL: ScriptedTier(default="small")}
    with pytest.raises(
        PortfolioError, match=re.escape("2 chat models to choose from (ChatOpenAI('one'), ChatOpenAI('t")
    ):
        RouterRunnable.from_chain(chain, small, release(Rung(SMALL)))
    routed = RouterRunnable.from_chain(chain, small, release(Rung(SMALL)), model="two")
    outputs = routed.invoke(INPUTS[0])
    assert outputs["two"] == "small"
    assert outputs["one"] == chain.invoke(INPUTS[0])["one"]
    by_object = RouterRunnable.from_chain(chain, small, release(Rung(SMALL)), model=chain.steps__["one"].steps[1])
    assert by_object.invoke(INPUTS[0])["one"] == "small"


def test_a_model_that_is_not_in_the_chain_is_an_error(server):
    with pytest.raises(PortfolioError, match="model='three' is not in the chain; its chat models: ChatOpenAI"):
        RouterRunnable.from_chain(two_models(server), {}, release(), model="three")


def test_a_chain_without_a_model_that_can_be_seen_is_an_error(server):
    hidden = RunnableLambda(lambda x: chat(server).invoke(x))
    with pytest.raises(PortfolioError, match="no chat model that can be seen"):
        RouterRunnable.from_chain(PROMPT | hidden, {}, release())


def test_of_fallbacks_the_spare_stays(server):
    def down(call: Any) -> Completion:
        raise TierError("down", call.tier)

    chain = fallbacks(server)
    routed = RouterRunnable.from_chain(chain, {FRONTIER: down}, release())
    server.requests.clear()
    assert routed.invoke(INPUTS[0]) == chain.invoke(INPUTS[0])
    assert server.requests[0]["model"] == "spare-model"


def test_a_routed_chain_can_be_extended_and_its_answers_are_messages(server):
    routed = RouterRunnable.from_chain(PROMPT | chat(server), {}, release=Release.frontier_only(portfolio()))
    message = routed.invoke(INPUTS[0])
    plain = (PROMPT | chat(server)).invoke(INPUTS[0])
    assert isinstance(message, AIMessage)
    decision = message.response_metadata.pop("routenlp")
    assert decision["tier"] == FRONTIER
    ours = {k: v for k, v in message.model_dump().items() if k != "id"}
    theirs = {k: v for k, v in plain.model_dump().items() if k != "id"}
    assert ours == theirs
    assert (routed | StrOutputParser()).invoke(INPUTS[0]) == plain.content


def test_callbacks_and_tags_of_the_model_go_over_to_the_router(server):
    class Heard(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tags: list[str] | None = None

        def on_chat_model_start(
            self, serialized: Any, messages: Any, *, tags: list[str] | None = None, **_: Any
        ) -> None:
            self.tags = tags

    handler = Heard()
    model = ChatOpenAI(model="m", base_url=server.url, api_key="none", callbacks=[handler], tags=["mine"])
    RouterRunnable.from_chain(PROMPT | model, {SMALL: ScriptedTier(default="x")}, release(Rung(SMALL))).invoke(
        INPUTS[0]
    )
    assert "mine" in handler.tags
