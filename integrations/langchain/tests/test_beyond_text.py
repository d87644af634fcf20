"""Tools and structured output below the frontier, where the task says that its calls have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import BEYOND, FRONTIER, SMALL, gated, release_beyond
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from langchain_routenlp import RouterChatModel
from routenlp_plugins import Completion, PortfolioError, Release
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

Reply = Callable[[Any], Any]


class City(BaseModel):
    """A city."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def release(rung: Rung, requires: tuple[str, ...] = BEYOND) -> Release:
    return release_beyond(rung, requires)


ALWAYS = release(Rung(SMALL))


@contextmanager
def router(
    small: Reply, frontier: Reply, used: Release = ALWAYS, instead: Mapping[str, Any] | None = None
) -> Iterator[tuple[RouterChatModel, list[ScriptedServer]]]:
    with ScriptedServer(small) as one, ScriptedServer(frontier) as other:
        common = {"api_key": "none", "stream_usage": True, "max_retries": 0}
        tiers = {
            SMALL: ChatOpenAI(model="small-model", base_url=one.url, **common),
            FRONTIER: ChatOpenAI(model="frontier-model", base_url=other.url, **common),
            **(instead or {}),
        }
        yield RouterChatModel(tiers=tiers, release=used), [one, other]


def says(text: str) -> Reply:
    return lambda request: {"content": text}


def calls(city: str) -> Reply:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return lambda request: {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


OSLO, WRONG = json.dumps({"name": "Oslo", "people": 700_000}), "Oslo has many people"


class TestTools:
    def test_the_small_tier_calls_them_where_the_task_has_them(self):
        with router(calls("Oslo"), calls("Rome")) as (model, (small, frontier)):
            bound = model.bind_tools([weather])
            message = bound.invoke("weather in Oslo?")
            chunks = list(bound.stream("weather in Oslo?"))
        assert not frontier.requests and len(small.requests) == 2
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("weather", {"city": "Oslo"})]
        merged = chunks[0]
        for chunk in chunks[1:]:
            merged += chunk
        assert merged.tool_calls == message.tool_calls
        assert small.requests[0]["tools"][0]["function"]["name"] == "weather"

    def test_the_frontier_calls_them_where_it_has_not(self):
        with router(calls("Oslo"), calls("Rome"), release(Rung(SMALL), ())) as (model, (small, _)):
            message = model.bind_tools([weather]).invoke("weather?")
        assert message.tool_calls[0]["args"] == {"city": "Rome"} and not small.requests
        assert "does not cover calls that need tools" in message.response_metadata["routenlp"]["reason"]

    def test_a_tier_without_tools_is_passed_over(self):
        mute = FakeListChatModel(responses=["no tools here"])
        with router(calls("Oslo"), calls("Rome"), instead={SMALL: mute}) as (model, _):
            message = model.bind_tools([weather]).invoke("weather?")
        assert message.tool_calls[0]["args"] == {"city": "Rome"}
        (first, _) = message.response_metadata["routenlp"]["attempts"]
        assert first["tier"] == SMALL and "NotImplementedError" in first["error"]

    def test_what_is_called_is_the_answer_that_is_compared(self):
        from langchain_routenlp.messages import completion_of

        with router(calls("Oslo"), calls("Rome")) as (model, _):
            bound = model.bind_tools([weather])
            one, other = (completion_of(bound.invoke("?", model=tier)).text for tier in (SMALL, FRONTIER))
        assert one == '[{"args": {"city": "Oslo"}, "name": "weather"}]' != other

    def test_other_tools_are_another_prompt(self):
        with router(calls("Oslo"), calls("Rome")) as (model, _):
            prompts = {
                bound.invoke("?").response_metadata["routenlp"]["attempts"][0]["prompt"]
                for bound in (model, model.bind_tools([weather]), model.bind_tools([City]))
            }
        assert len(prompts) == 3


class TestStructuredOutput:
    def test_each_tier_asks_in_its_own_way_and_the_result_is_that_of_the_tier(self):
        with router(says(OSLO), says(OSLO)) as (model, (small, frontier)):
            assert model.with_structured_output(City).invoke("?") == City(name="Oslo", people=700_000)
            (chunk,) = model.with_structured_output(City).stream("?")
            assert chunk == City(name="Oslo", people=700_000) and not frontier.requests
            # the native mode of ChatOpenAI, not a tool
            assert small.requests[0]["response_format"]["type"] == "json_schema"
            # and a tool where that is asked for, which the server does not call
            assert model.with_structured_output(City, method="function_calling").invoke("?") is None
            assert small.requests[-1]["tools"]

    @pytest.mark.parametrize("wrong", [WRONG, json.dumps({"name": "Oslo"})])
    def test_an_answer_that_does_not_parse_is_paid_for_and_passed_over(self, wrong):
        usage = UsageMetadataCallbackHandler()
        with router(says(wrong), says(OSLO)) as (model, _):
            both = model.with_structured_output(City, include_raw=True).invoke("?", {"callbacks": [usage]})
        assert both["parsed"] == City(name="Oslo", people=700_000) and both["parsing_error"] is None
        decision = both["raw"].response_metadata["routenlp"]
        first, second = decision["attempts"]
        assert (first["tier"], first["accepted"], first["scores"]["valid"]) == (SMALL, False, 0.0)
        assert second["accepted"] and "not valid: small" in decision["reason"]
        spent = sum(a["input_tokens"] + a["output_tokens"] for a in decision["attempts"])
        assert usage.usage_metadata["frontier-model"]["total_tokens"] == spent

    def test_a_frontier_that_does_not_parse_raises_what_its_parser_raises(self):
        with router(says(WRONG), says(WRONG)) as (model, _):
            schema = City.model_json_schema()
            for form in (City, schema):
                with pytest.raises(OutputParserException):
                    model.with_structured_output(form).invoke("?")
            both = model.with_structured_output(schema, include_raw=True).invoke("?")
        assert both["parsed"] is None and isinstance(both["parsing_error"], OutputParserException)
        assert both["raw"].text == WRONG

    def test_what_is_judged_is_judged_as_ever(self):
        with router(says(OSLO), says(OSLO), release(gated(SMALL, 0.5, "valid"))) as (model, (_, frontier)):
            assert model.with_structured_output(City).invoke("?") == City(name="Oslo", people=700_000)
        assert not frontier.requests

    async def test_async(self):
        import httpx

        with router(says(WRONG), says(OSLO)) as (model, (one, other)):
            async with httpx.AsyncClient() as client:
                common = {"api_key": "none", "max_retries": 0, "http_async_client": client}
                tiers = {
                    name: ChatOpenAI(model=name, base_url=server.url, **common)
                    for name, server in ((SMALL, one), (FRONTIER, other))
                }
                routed = RouterChatModel(tiers=tiers, release=model.release)
                assert await routed.with_structured_output(City).ainvoke("?") == City(name="Oslo", people=700_000)

    def test_tiers_that_cannot_are_passed_over(self):
        for unable in (FakeListChatModel(responses=["x"]), lambda call: Completion("x")):
            with router(says(OSLO), says(OSLO), instead={SMALL: unable}) as (model, _):
                both = model.with_structured_output(City, include_raw=True).invoke("?")
            assert both["parsed"] == City(name="Oslo", people=700_000)
            error = both["raw"].response_metadata["routenlp"]["attempts"][0]["error"]
            assert "no structured output" in error or "asked for text only" in error

    def test_a_frontier_that_cannot_is_told_at_once(self):
        plain, unable = (lambda call: Completion("x")), FakeListChatModel(responses=["x"])
        with router(says(OSLO), says(OSLO), instead={FRONTIER: plain}) as (model, _):
            told = pytest.raises(PortfolioError, match="'frontier' is a plain callable: structured output needs a chat")
            with told:
                model.with_structured_output(City)
        with (
            router(says(OSLO), says(OSLO), instead={FRONTIER: unable}) as (model, _),
            pytest.raises(NotImplementedError),
        ):
            model.with_structured_output(City)


def test_the_profile_is_what_all_tiers_can_do():
    profiles = (
        {"max_input_tokens": 8000, "tool_calling": True, "structured_output": True, "image_inputs": False},
        {"max_input_tokens": 128_000, "tool_calling": True, "structured_output": False, "pdf_inputs": True},
    )
    models = [FakeListChatModel(responses=["x"], profile=profile) for profile in profiles]
    model = RouterChatModel(tiers=dict(zip((SMALL, FRONTIER), models, strict=True)), release=ALWAYS)
    assert model.profile == {"max_input_tokens": 8000, "tool_calling": True, "structured_output": False}
    unknown = {SMALL: models[0], FRONTIER: lambda call: Completion("x")}
    assert RouterChatModel(tiers=unknown, release=ALWAYS).profile is None
