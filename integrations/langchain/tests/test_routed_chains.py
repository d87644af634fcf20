"""Routing over whole chains: one run, a child for each attempt, the decision told, streams without rejected parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers import FRONTIER, SMALL, gated, portfolio, release
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from langchain_routenlp import Decisions, RouterRunnable, WholeChain
from routenlp_plugins import Completion, PortfolioError, Query, Reference, Task, collect, fit
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

GATED, ALWAYS = release(gated(SMALL, 0.5, "token_probability")), release(Rung(SMALL))
SAID = "the frontier says so"


@pytest.fixture
def servers() -> Iterator[dict[str, ScriptedServer]]:
    with ScriptedServer(lambda request: "a small guess") as one, ScriptedServer(lambda request: SAID) as other:
        yield {SMALL: one, FRONTIER: other}


def chain(server: ScriptedServer, name: str, words: str = "{x}", **more: Any) -> Runnable[Any, Any]:
    model = ChatOpenAI(model=name, base_url=server.url, api_key="none", stream_usage=True, max_retries=0, **more)
    return ChatPromptTemplate.from_template(words) | model | StrOutputParser()


def routed(servers: dict[str, ScriptedServer], used: Any, **more: Any) -> RouterRunnable:
    tiers = {name: chain(server, name, **more) for name, server in servers.items()}
    return RouterRunnable.of_chains(tiers, used, to_text=lambda value: value["x"])


class Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.roots, self.models, self.tokens = 0, [], []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **_: Any) -> None:
        self.roots += parent_run_id is None

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, tags: Any = None, **_: Any) -> None:
        self.models.append("nostream" in (tags or []))

    def on_llm_new_token(self, token: str, *, run_id: Any, **_: Any) -> None:
        self.tokens += [token] if token else []


class TestRuns:
    @pytest.mark.parametrize(("used", "text", "calls"), [(ALWAYS, "a small guess", 1), (GATED, SAID, 2)])
    def test_each_attempt_is_a_child_and_each_model_is_counted_once(self, servers, used, text, calls):
        heard, usage, decisions = Heard(), UsageMetadataCallbackHandler(), Decisions()
        made = routed(servers, used)
        assert made.invoke({"x": "hi"}, {"callbacks": [heard, usage, decisions]}) == text
        assert heard.roots == 1 and len(heard.models) == calls
        (trace,) = decisions.traces
        assert [attempt.tier for attempt in trace.attempts] == [SMALL, FRONTIER][:calls]
        for attempt in trace.attempts:
            spent = attempt.completion.input_tokens + attempt.completion.output_tokens
            assert usage.usage_metadata[attempt.tier]["total_tokens"] == spent
        # of what may be passed over message streams have no token
        assert heard.models == [True, False][:calls]

    async def test_async_and_batch_are_the_same(self, servers):
        assert routed(servers, GATED).batch([{"x": "a"}, {"x": "b"}]) == [SAID, SAID]
        async with httpx.AsyncClient() as client:
            made = routed(servers, GATED, http_async_client=client)
            assert await made.ainvoke({"x": "hi"}) == SAID
            assert await made.abatch([{"x": "a"}]) == [SAID]
            assert [part async for part in made.astream({"x": "hi"}) if part] == [
                SAID[i : i + 4] for i in range(0, 20, 4)
            ]

    def test_streams_have_no_part_of_a_rejected_chain_and_none_twice(self, servers):
        words = [SAID[i : i + 4] for i in range(0, len(SAID), 4)]
        assert [part for part in routed(servers, GATED).stream({"x": "hi"}) if part] == words
        assert [part for part in routed(servers, ALWAYS).stream({"x": "hi"}) if part] == ["a sm", "all ", "gues", "s"]
        # one that is judged comes whole
        judged = routed(servers, GATED, logprobs=True)
        assert list(judged.stream({"x": "hi"})) == ["a small guess"]

    def test_a_graph_streams_what_is_accepted_only(self, servers):
        tiers = {name: chain(server, name).steps[1] for name, server in servers.items()}
        made = RouterRunnable.of_chains(tiers, GATED, to_text=lambda messages: messages[-1].text)
        graph = StateGraph(MessagesState)
        graph.add_node("answer", lambda state: {"messages": [made.invoke(state["messages"])]})
        graph.add_edge(START, "answer")
        told = list(graph.compile().stream({"messages": [("user", "hi")]}, stream_mode="messages"))
        assert "".join(message.text for message, _ in told) == SAID

    def test_the_task_in_the_metadata_counts(self, servers):
        decisions = Decisions()
        routed(servers, ALWAYS).invoke({"x": "a"}, {"callbacks": [decisions], "metadata": {"routenlp_task": "other"}})
        assert decisions.traces[0].reason == "frontier: unknown task 'other'"


class TestCollecting:
    def test_chains_are_collected_fitted_and_routed(self, servers, tmp_path):
        """Small chains of their own prompt, right about short questions; log-probabilities tell."""

        def reply(request: Any) -> Any:
            asked = request["messages"][-1]["content"].removeprefix("Q: ")
            easy = len(asked) < 5
            return Completion(asked if easy else "no idea", mean_logprob=-0.01 if easy else -2.0)

        with ScriptedServer(reply) as one, ScriptedServer(lambda request: request["messages"][-1]["content"]) as other:
            tiers = {SMALL: chain(one, SMALL, "Q: {x}", logprobs=True), FRONTIER: chain(other, FRONTIER)}
            whole = {name: WholeChain(of, lambda query: {"x": query.text}) for name, of in tiers.items()}
            texts = [f"{i}" if i % 4 else f"a long question {i}" for i in range(400)]
            asked = [Reference(Query(text, "t", str(i)), text) for i, text in enumerate(texts)]
            used = portfolio(Task("t", "accuracy"))
            collect(asked, whole, tmp_path / "o.jsonl", portfolio=used, progress=False)
            made = fit(tmp_path / "o.jsonl", used, alpha=0.05)
            router = RouterRunnable.of_chains(tiers, made, to_text=lambda value: value["x"])
            decisions = Decisions()
            assert router.invoke({"x": "7"}, {"callbacks": [decisions]}) == "7"
            long = "a long question 444"
            assert router.invoke({"x": long}, {"callbacks": [decisions]}) == long
        assert [trace.accepted.tier for trace in decisions.traces] == [SMALL, FRONTIER]


class TestTrouble:
    def test_a_chain_that_fails_is_passed_over_and_the_frontier_s_error_is_its_own(self, servers):
        def broken(value: Any) -> str:
            raise KeyError("gone")

        good = chain(servers[FRONTIER], FRONTIER)
        tiers = {SMALL: RunnableLambda(broken), FRONTIER: good}
        made = RouterRunnable.of_chains(tiers, ALWAYS, to_text=json.dumps)
        assert made.invoke({"x": "hi"}) == SAID
        made = RouterRunnable.of_chains({SMALL: RunnableLambda(broken), FRONTIER: RunnableLambda(broken)}, ALWAYS)
        with pytest.raises(KeyError) as caught:
            made.invoke({"x": "hi"})
        assert "routenlp: no tier answered" in caught.value.__notes__[0]

    def test_bad_arguments_are_told(self, servers):
        good: dict[str, Any] = {name: chain(server, name) for name, server in servers.items()}
        with pytest.raises(PortfolioError, match="tiers: small must be a chain, got str"):
            RouterRunnable.of_chains({**good, SMALL: "x"}, ALWAYS)
        with pytest.raises(PortfolioError, match="no callable for small"):
            RouterRunnable.of_chains({FRONTIER: good[FRONTIER]}, ALWAYS)
        with pytest.raises(PortfolioError, match="middleman is not in the portfolio"):
            RouterRunnable.of_chains({**good, "middleman": good[SMALL]}, ALWAYS)
        with pytest.raises(PortfolioError, match="task='x' is unknown"):
            RouterRunnable.of_chains(good, ALWAYS, task="x")
        made = RouterRunnable.of_chains(good, ALWAYS)
        with (
            pytest.raises(PortfolioError, match="the tiers are whole chains"),
            made.audited(lambda q, c: 1.0, "x.jsonl"),
        ):
            pass
