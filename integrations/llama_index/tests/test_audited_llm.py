"""A certificate watched while `RouterLLM` answers, and what listeners keep of it."""

from __future__ import annotations

import copy
import time

import pytest
from helpers import FRONTIER, SMALL, kept, portfolio, row
from llama_index.core.llms import ChatMessage, MockLLM

from llama_index.llms.routenlp import RouterLLM, SignalEventHandler
from routenlp_plugins import AuditOptions, Completion, FitOptions, PortfolioError, Release, TraceStore, fit
from routenlp_plugins.evaluate.outcomes import read_outcomes


def sure(call):
    return Completion("a small guess", confidence=1.0, input_tokens=10, output_tokens=1)


async def test_each_way_to_ask_is_audited_and_kept_once(tmp_path):
    members = [row(f"q{n}", small=(1.0, None), frontier=(1.0, None)) for n in range(200)]
    fitted = fit(members, portfolio(), alpha=0.1, options=FitOptions(unlike=0))
    llm, store = RouterLLM({SMALL: sure, FRONTIER: MockLLM()}, fitted), TraceStore(tmp_path / "traces.db")
    log, asked = tmp_path / "audits.jsonl", [ChatMessage("hi")]

    def wrong(query, completion) -> float:
        return float(completion.text != "a small guess")

    with SignalEventHandler(store).attached(), llm.audited(wrong, log, AuditOptions(share=1), store) as watched:
        for _ in range(5):
            found = [watched.chat(asked), await watched.achat(asked), watched.complete("hi")]
            found += [list(watched.stream_chat(asked))[-1], [r async for r in await watched.astream_chat(asked)][-1]]
        for _ in range(200):
            if watched.expired:
                break
            time.sleep(0.02)
        assert "audits show that" in watched.expired["t"]
        told = watched.chat(asked).additional_kwargs["routenlp"]
        assert told["tier"] == FRONTIER and "has expired" in told["reason"]
    assert llm.expired == {}
    members = read_outcomes(log)
    assert {(one.outcomes[SMALL].quality, one.outcomes[FRONTIER].quality) for one in members} == {(0.0, 1.0)}
    traces = kept(store)
    store.close()
    assert (len(members), len(traces)) == (26, 26)
    assert {one.propensity for one in traces} == {1.0}
    assert {"audit"} == {name for one in traces for name in one.beside}


def test_copies_are_watched_too_or_say_that_they_are_not(tmp_path):
    members = [row(f"q{n}", small=(1.0, None), frontier=(1.0, None)) for n in range(200)]
    fitted = fit(members, portfolio(), alpha=0.1, options=FitOptions(unlike=0))
    llm = RouterLLM({SMALL: sure, FRONTIER: MockLLM()}, fitted)
    asked, log = [ChatMessage("hi")], tmp_path / "audits.jsonl"
    with llm.audited(lambda query, completion: 1.0, log, AuditOptions(share=1)) as watched:
        copy.deepcopy(watched).chat(asked)
        other = watched.model_copy(update={"release": Release.frontier_only(portfolio())})
        with pytest.raises(PortfolioError, match="audit it by itself"):
            other.chat(asked)
        with pytest.raises(PortfolioError, match="what is audited cannot be pickled"):
            watched.__reduce_ex__(4)
    assert len(read_outcomes(log)) == 1
    changed = llm.model_copy(update={"release": Release.frontier_only(portfolio())})
    assert changed.chat(asked).additional_kwargs["routenlp"]["tier"] == FRONTIER
