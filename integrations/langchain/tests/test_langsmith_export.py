"""Runs as LangChain's own tracer sends them to LangSmith, read into a store."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tracers.langchain import LangChainTracer
from langchain_openai import ChatOpenAI

from routenlp_plugins import ImportOptions, TraceStore, import_traces
from routenlp_plugins.testing import ScriptedServer


class Client:
    """Keeps what the tracer would send."""

    tracing_queue = None

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}

    def create_run(self, **facts: Any) -> None:
        self.runs[str(facts["id"])] = facts

    def update_run(self, run_id: Any = None, **facts: Any) -> None:
        self.runs.setdefault(str(run_id), {}).update(facts)


@pytest.fixture
def export(tmp_path):
    client = Client()
    headers = {"Connection": "close"}
    with ScriptedServer(lambda request: "an answer") as server:
        prompt = ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{text}")])
        model = ChatOpenAI(
            model="big", base_url=server.url, api_key="none", logprobs=True, max_retries=0, default_headers=headers
        )
        chain = prompt | model | StrOutputParser()
        config = {"callbacks": [LangChainTracer(client=client)], "metadata": {"thread_id": "d1"}}
        chain.invoke({"text": "where is my card?"}, config)
        server.fail(500, times=1)
        with pytest.raises(Exception, match="scripted failure"):
            chain.invoke({"text": "and now?"}, config)
    runs = list(client.runs.values())
    root = next(str(run["id"]) for run in runs if run["run_type"] == "chain")
    feedback = [
        {"key": "thumbs", "run_id": root, "score": 1, "created_at": "2026-01-01T00:00:00+00:00"},
        {"key": "helpful", "run_id": root, "score": 0.5, "value": "so so"},
        {"key": "note", "run_id": root, "comment": "thanks"},
    ]
    file = tmp_path / "runs.jsonl"
    file.write_text("".join(json.dumps(one, default=str) + "\n" for one in (*feedback, *runs)))
    return file


def test_runs_and_feedback_become_traces_and_signals(export, tmp_path):
    with TraceStore(tmp_path / "traces.db") as store:
        done = import_traces(store, export, "langsmith", ImportOptions(task="support"))
        first, second = store.traces()
        counts = store.counts()
    assert (done.traces, done.signals, done.skipped) == (2, 2, 0)
    assert counts.unknown_signals == 0
    (attempt,) = first.trace.attempts
    completion = attempt.completion
    assert (first.origin, first.unit, first.trace.task) == ("imported", "d1", "support")
    assert first.trace.query.text == "where is my card?"
    assert first.trace.query.messages[0] == {"role": "system", "content": "Be kind."}
    assert (attempt.tier, completion.text, completion.model) == ("big", "an answer", "big")
    assert completion.token_logprobs
    assert completion.input_tokens > 0
    assert completion.latency_ms > 0
    assert "scripted failure" in second.trace.attempts[0].error
