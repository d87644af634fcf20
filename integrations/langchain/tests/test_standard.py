"""LangChain's standard tests, over real chat models in front of a scripted OpenAI-compatible server."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx
import pytest
from helpers import FRONTIER, PRICES, SMALL
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_routenlp import RouterChatModel
from routenlp_plugins import Policy, Portfolio, Release, Task, Tier
from routenlp_plugins.policy import Confidence, Rung
from routenlp_plugins.testing import ScriptedServer

# ChatOpenAI says so of its own accord, and takes tools instead
pytestmark = pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema")
BEYOND = ("structured output", "tools")


def covering(rung: Rung) -> Release:
    """Of a task whose calls may use tools and structured output, on both tiers."""
    tiers = tuple(Tier(name, PRICES[name], PRICES[name], supports=BEYOND) for name in (SMALL, FRONTIER))
    portfolio = Portfolio(tiers, FRONTIER, (Task("t", requires=BEYOND),))
    return Release(portfolio, Policy(FRONTIER, {"t": (rung,)}, requires={"t": BEYOND}))


ALWAYS = covering(Rung(SMALL))
NEVER = covering(Rung(SMALL, 1.0, (Confidence.plain(SMALL, "confidence"),)))
WORDY = covering(Rung(SMALL, 0.5, (Confidence.plain(SMALL, "token_probability"),)))


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[RouterChatModel]:
        return RouterChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"tiers": tiers("http://127.0.0.1:9/v1"), "release": ALWAYS}


def tiers(url: str, **more: Any) -> dict[str, Any]:
    common = {"base_url": url, "api_key": "none", "stream_usage": True, "max_retries": 0, **more}
    return {name: ChatOpenAI(model=f"{name}-model", **common) for name in (SMALL, FRONTIER)}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(obedient) as running:
        yield running


class Integration(ChatModelIntegrationTests):
    """Everything that the server can do; images, sound and documents go to the frontier and are not scripted."""

    release = ALWAYS
    asked: ScriptedServer

    @pytest.fixture(autouse=True)
    def _server(self, server: ScriptedServer) -> None:
        type(self).asked = server

    @pytest.fixture
    async def model(self, request: Any, server: ScriptedServer) -> AsyncIterator[BaseChatModel]:
        extra = getattr(request, "param", None) or {}
        # the client that LangChain shares would outlive the event loop of a test
        async with httpx.AsyncClient() as client:
            models = tiers(server.url, http_async_client=client)
            yield RouterChatModel(tiers=models, release=self.release, **self.standard_chat_model_params, **extra)

    @property
    def chat_model_class(self) -> type[RouterChatModel]:
        return RouterChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"tiers": tiers(self.asked.url), "release": self.release}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return FRONTIER


class TestSmallAnswers(Integration):
    """Each answer is accepted before it is made, so that it is streamed."""


class TestSmallIsRejected(Integration):
    """Each answer of the small tier is rejected, and the frontier's is streamed."""

    release = NEVER


class TestSmallIsJudged(Integration):
    """Each answer of the small tier is judged by its log-probabilities, which it has none of."""

    release = WORDY


def obedient(request: Mapping[str, Any]) -> dict[str, Any] | str:
    """Calls the tool it is offered, fills the schema it is given, and else is polite."""
    last = request["messages"][-1]
    text = last.get("content") if isinstance(last.get("content"), str) else json.dumps(last.get("content"))
    form = request.get("response_format") or {}
    if form.get("type") == "json_schema":
        return json.dumps(filled(form["json_schema"]["schema"], text), ensure_ascii=False)
    if form.get("type") == "json_object":
        return json.dumps({"setup": "why?", "punchline": "because"})
    tools = [tool["function"] for tool in request.get("tools") or ()]
    if tools and last["role"] == "user" and request.get("tool_choice") != "none":
        chosen = request.get("tool_choice")
        forced = chosen["function"]["name"] if isinstance(chosen, Mapping) else None
        tool = next((one for one in tools if one["name"] == forced), tools[0])
        arguments = json.dumps(filled(tool.get("parameters") or {}, text), ensure_ascii=False)
        call = {"id": "call_1", "type": "function", "function": {"name": tool["name"], "arguments": arguments}}
        return {"content": None, "tool_calls": [call]}
    return "Hello there, how are you?"


def filled(schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    """What is asked for, out of the words of the question where it is there."""
    numbers, names = re.findall(r"\d+", text), re.findall(r"'([^']+)'", text)
    values: dict[str, Any] = {}
    for place, (name, kind) in enumerate((schema.get("properties") or {}).items()):
        if kind.get("type") == "integer":
            values[name] = int(numbers[place % len(numbers)]) if numbers else 3
        else:
            values[name] = names[0] if names else f"a {name}"
    return values


del Integration
