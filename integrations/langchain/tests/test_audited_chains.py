"""Certificates watched while chat models and chains answer, in copies of them too."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
from helpers import FRONTIER, SMALL, portfolio, row
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField

from langchain_routenlp import RouterChatModel, RouterRunnable
from routenlp_plugins import AuditOptions, FitOptions, PortfolioError, Release, fit
from routenlp_plugins.evaluate.outcomes import read_outcomes

ALL = AuditOptions(share=1)


class Says(BaseChatModel):
    """Its name."""

    @property
    def _llm_type(self) -> str:
        return "says"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **more: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self.name or ""))])


WRONG, RIGHT = Says(name="wrong"), Says(name="right")


@pytest.fixture(scope="module")
def fitted() -> Release:
    """On a small tier that was always right."""
    members = [row(f"q{n}", small=(1.0, None), frontier=(1.0, None)) for n in range(200)]
    return fit(members, portfolio(), alpha=0.1, options=FitOptions(unlike=0))


def right(query: Any, completion: Any) -> float:
    return float(completion.text == "right")


async def expires(watched: Any) -> None:
    for _ in range(200):
        if watched.expired:
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not expire")


@pytest.mark.parametrize("kind", ["model", "chain"])
async def test_a_model_and_a_chain_are_audited(fitted, tmp_path, kind):
    routed: Any = RouterChatModel(tiers={SMALL: WRONG, FRONTIER: RIGHT}, release=fitted)
    ask: Any = "q"
    if kind == "chain":
        chain = ChatPromptTemplate.from_template("{text}") | RIGHT
        routed, ask = RouterRunnable.from_chain(chain, {SMALL: WRONG}, fitted), {"text": "q"}
    assert routed.invoke(ask).response_metadata["routenlp"]["tier"] == SMALL
    log = tmp_path / "audits.jsonl"
    with routed.audited(right, log, ALL) as watched:
        for _ in range(10):
            watched.invoke(ask)
            await watched.ainvoke(ask)
            list(watched.stream(ask))
        await expires(watched)
        assert "audits show that" in watched.expired["t"]
        told = watched.invoke(ask).response_metadata["routenlp"]
        assert told["tier"] == FRONTIER and "has expired" in told["reason"]
    members = read_outcomes(log)
    assert len(members) == 31
    assert {member.query.text for member in members} == {"q"}
    assert {(m.outcomes[SMALL].quality, m.outcomes[FRONTIER].quality) for m in members} == {(0.0, 1.0)}
    assert routed.expired == {}


async def test_copies_of_what_is_audited_are_watched_too(fitted, tmp_path):
    model = RouterChatModel(tiers={SMALL: WRONG, FRONTIER: RIGHT}, release=fitted)
    with model.audited(right, Path(tmp_path / "audits.jsonl"), ALL) as watched:
        for _ in range(20):
            copy.deepcopy(watched).invoke("q")
        await expires(watched)
        for one in (watched, watched.model_copy(update={"task": "t"}), copy.deepcopy(watched)):
            assert "has expired" in one.invoke("q").response_metadata["routenlp"]["reason"]
        with pytest.raises(PortfolioError, match="what is audited cannot be pickled"):
            watched.__reduce_ex__(4)
        # what is another one is not watched, and says so
        choosable = watched.configurable_fields(task=ConfigurableField("task")).with_config(configurable={"task": "t"})
        for other in (watched.model_copy(update={"release": Release.frontier_only(portfolio())}), choosable):
            with pytest.raises(PortfolioError, match="audit it by itself"):
                other.invoke("q")
