"""`RouterEngine` over real `dspy.LM` in front of scripted servers: answers, streams, usage, caches, errors, saving."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, FunctionTool, Message, Request
from dspy_world import ALWAYS, GATED, NEVER, SAID, fields, lm
from helpers import FRONTIER, SMALL, release_beyond

from dspy_routenlp import RouterEngine
from dspy_routenlp.engine import AsyncRouterEngine
from routenlp_plugins import DataError, PortfolioError, ReleaseError, SelfConsistentTier
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer, ScriptedTier

QA = "question -> answer"


def engine(small: ScriptedServer, frontier: ScriptedServer, used: Any, **more: Any) -> RouterEngine:
    return RouterEngine({SMALL: lm(small, SMALL), FRONTIER: lm(frontier, FRONTIER)}, used, **more)


def decision(model: dspy.LM) -> dict[str, Any]:
    return model.history[-1]["response"].provider_data["routenlp"]


def asked(text: str = "hi", **config: Any) -> Request:
    return Request(model="any", messages=(Message.user(text),), config=Config(**config))


async def events_of(router: RouterEngine, request: Request) -> list[Any]:
    return [event async for event in AsyncRouterEngine(router).stream(request)]


def text_of(events: list[Any]) -> list[str]:
    return [event.delta.text for event in events if event.type == "delta"]


class TestAnswers:
    @pytest.mark.parametrize(("used", "said", "attempts"), [(ALWAYS, "a small guess", 1), (NEVER, SAID, 2)])
    async def test_every_way_to_ask_decides_alike(self, small, frontier, used, said, attempts):
        router = engine(small, frontier, used)
        model = router.lm()
        told = []
        for way in (lambda: model("hi"), lambda: model(replace(asked(), model=model.model))):
            way()
            told.append(decision(model))
        await model.acall("hi")
        told.append(decision(model))
        streamed = [list(router.stream(asked())), await events_of(router, asked())]
        told += [events[-1].provider_data["routenlp"] for events in streamed]
        assert ["".join(text_of(events)) for events in streamed] == [said, said]
        alike = {
            json.dumps({**one, "id": "", "attempts": [{**a, "latency_ms": 0} for a in one["attempts"]]}, sort_keys=True)
            for one in told
        }
        # only what a stream does not carry may differ
        assert len({(one["tier"], one["reason"], len(one["attempts"]), one["cost_usd"]) for one in told}) == 1
        assert len(told[0]["attempts"]) == attempts
        assert len(alike) <= 2

    def test_a_program_runs_on_it_as_on_any_model(self, small, frontier):
        with (
            ScriptedServer(lambda request: fields(answer="blue")) as one,
            ScriptedServer(lambda request: fields(answer="green")) as two,
        ):
            cheap, dear = engine(one, two, GATED).lm(), engine(one, two, NEVER).lm()
            with dspy.context(lm=cheap):
                assert dspy.Predict(QA)(question="sky?").answer == "blue"
            with dspy.context(lm=dear):
                assert dspy.Predict(QA)(question="sky?").answer == "green"
        assert "structured" not in decision(cheap)["reason"]

    def test_usage_is_that_of_all_attempts_and_counted_once(self, small, frontier):
        model = engine(small, frontier, NEVER).lm()
        alone = [lm(small, SMALL), lm(frontier, FRONTIER)]
        with dspy.track_usage() as tracker:
            model("hi")
        with dspy.track_usage() as bare:
            for one in alone:
                one("hi")
        (counted,) = tracker.get_total_tokens().values()
        apart = bare.get_total_tokens().values()
        assert counted["total_tokens"] == sum(one["total_tokens"] for one in apart)

    def test_tiers_are_silent(self, small, frontier):
        tiers = {SMALL: lm(small, SMALL), FRONTIER: lm(frontier, FRONTIER)}
        RouterEngine(tiers, NEVER).lm()("hi")
        assert [one.history for one in tiers.values()] == [[], []]

    def test_options_of_a_tier_hold_where_the_call_has_none(self, small, frontier):
        tier = lm(small, SMALL, temperature=0.25, max_tokens=7, stop=["x"])
        model = RouterEngine({SMALL: tier, FRONTIER: lm(frontier, FRONTIER)}, ALWAYS).lm(temperature=0.5)
        model("hi")
        sent = small.requests[-1]
        assert (sent["temperature"], sent["stop"], sent.get("max_completion_tokens", sent.get("max_tokens"))) == (
            0.5,
            ["x"],
            7,
        )

    def test_a_core_tier_may_stand_among_them(self, frontier):
        model = RouterEngine({SMALL: ScriptedTier(default="scripted"), FRONTIER: lm(frontier, FRONTIER)}, ALWAYS).lm()
        assert model("hi") == ["scripted"]

    def test_samples_of_a_tier_never_come_from_its_cache(self, small, frontier):
        tier = SelfConsistentTier(lm(small, SMALL, cache=True), samples=3)
        RouterEngine({SMALL: tier, FRONTIER: lm(frontier, FRONTIER)}, ALWAYS).lm()("a question of its own")
        assert len(small.requests) == 3

    def test_what_is_drawn_never_comes_from_a_tiers_cache(self, small, frontier):
        router = RouterEngine({SMALL: lm(small, SMALL, cache=True), FRONTIER: lm(frontier, FRONTIER)}, ALWAYS)
        for _ in range(2):
            router.lm(temperature=0)("drawn or not?")
        assert len(small.requests) == 1
        for _ in range(2):
            router.lm(temperature=1)("drawn or not?")
        assert len(small.requests) == 3


class TestTasks:
    def test_of_the_call_the_context_and_the_engine(self, small, frontier):
        used = release_beyond(Rung(SMALL), (), "t", "other")
        model = engine(small, frontier, used, task="other").lm()
        assert model("hi") == [SAID]
        with dspy.context(routenlp_task="t"):
            assert model("hi") == ["a small guess"]
            named = replace(asked(extensions={"routenlp_task": "other"}), model=model.model)
            assert model(named).message.text == SAID
        assert "routenlp_task" not in json.dumps([*small.requests, *frontier.requests])

    def test_an_unknown_one_is_told_at_once(self, small, frontier):
        with pytest.raises(PortfolioError, match="'nothing' is unknown to the release; its tasks: t"):
            engine(small, frontier, ALWAYS, task="nothing")

    def test_one_that_is_no_name(self, small, frontier):
        with pytest.raises(DataError, match="must be the name of a task, got 3"):
            engine(small, frontier, ALWAYS).complete(asked(extensions={"routenlp_task": 3}))


class TestPrompts:
    """A certificate speaks of a prompt: instructions, options, and of a program its demonstrations."""

    def test_other_demonstrations_are_another_prompt(self, small, frontier):
        router = engine(small, frontier, ALWAYS)
        demo = (Message.user("1+1"), Message.assistant("2"))
        plain, shown, other = (
            router.query(Request(model="any", messages=(*before, Message.user("2+2"))))
            for before in ((), demo, (Message.user("1+1"), Message.assistant("3")))
        )
        assert len({plain.settings, shown.settings, other.settings}) == 3
        assert {plain.text, shown.text, other.text} == {"2+2"}
        chats = engine(small, frontier, ALWAYS, demonstrations=False)
        two = [
            chats.query(Request(model="any", messages=(Message.user(one), Message.assistant("b"), Message.user("c"))))
            for one in ("a", "d")
        ]
        assert two[0].settings == two[1].settings

    def test_log_probabilities_change_nothing(self, small, frontier):
        router = engine(small, frontier, ALWAYS)
        assert router.query(asked(logprobs=0)).settings == router.query(asked()).settings
        assert router.query(asked(temperature=1.0)).settings != router.query(asked()).settings

    def test_tools_and_formats_are_beyond_text(self, small, frontier):
        router = engine(small, frontier, ALWAYS)
        tool = Request(model="any", messages=(Message.user("hi"),), tools=(FunctionTool("look"),))
        assert router.query(tool).requires == {"tools"}
        assert router.query(asked(response_format={"type": "json_object"})).requires == {"structured output"}
        assert router.complete(tool).provider_data["routenlp"]["tier"] == FRONTIER


class TestStreams:
    async def test_no_word_of_a_rejected_answer(self, small, frontier):
        router = engine(small, frontier, NEVER)
        for events in (list(router.stream(asked())), await events_of(router, asked())):
            assert len(text_of(events)) > 1
            assert "".join(text_of(events)) == SAID

    async def test_what_has_to_be_judged_comes_in_one_piece(self, small, frontier):
        router = engine(small, frontier, GATED)
        for events in (list(router.stream(asked())), await events_of(router, asked())):
            assert text_of(events) == ["a small guess"]

    async def test_a_tier_that_breaks_off_before_a_word_is_passed_over(self, small, frontier):
        small.break_off(after=0)
        router = engine(small, frontier, ALWAYS)
        for events in (list(router.stream(asked())), await events_of(router, asked())):
            assert "".join(text_of(events)) == SAID

    async def test_a_tier_that_breaks_off_in_the_middle_is_an_error(self, small, frontier):
        small.break_off(after=2)
        router = engine(small, frontier, ALWAYS)
        with pytest.raises(dspy.LMTransportError, match="connection closed") as caught:
            list(router.stream(asked()))
        assert "routenlp: no tier answered (small:" in caught.value.__notes__[0]
        with pytest.raises(dspy.LMTransportError):
            await events_of(router, asked())

    def test_a_stream_that_is_closed_ends_its_call(self, small, frontier):
        told: list[Any] = []
        router = engine(small, frontier, ALWAYS, listeners=(told.append,))
        events = router.stream(asked())
        next(events)
        next(events)
        events.close()
        assert [trace.reason for trace in told] == ["nobody waited for the answer"]

    async def test_a_cancelled_task_is_told(self, small, frontier):
        told: list[Any] = []
        router = engine(small, frontier, ALWAYS, listeners=(told.append,))
        small.slow(5)
        task = asyncio.create_task(events_of(router, asked()))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [trace.reason for trace in told] == ["nobody waited for the answer"]

    async def test_through_streamify(self):
        with (
            ScriptedServer(lambda request: fields(answer="a small guess of several words")) as one,
            ScriptedServer(lambda request: fields(answer="the frontier says more than that")) as two,
        ):
            program = dspy.Predict(QA)
            listener = dspy.streaming.StreamListener(signature_field_name="answer")
            with dspy.context(lm=engine(one, two, NEVER).lm()):
                stream = dspy.streamify(program, stream_listeners=[listener])(question="why?")
                parts = [part async for part in stream]
        *chunks, last = parts
        assert len(chunks) > 1
        assert "".join(chunk.chunk for chunk in chunks) == last.answer == "the frontier says more than that"


class TestCaches:
    def test_no_decision_is_frozen_by_default(self, small, frontier):
        model = engine(small, frontier, ALWAYS).lm()
        model("hi")
        model("hi")
        assert len(small.requests) == 2

    def test_a_cache_knows_the_release(self, small, frontier):
        text = "cached for one release only"
        for _ in range(2):
            assert engine(small, frontier, ALWAYS).lm(cache=True)(text) == ["a small guess"]
        assert len(small.requests) == 1
        assert engine(small, frontier, NEVER).lm(cache=True)(text) == [SAID]


class TestErrors:
    def test_what_a_failing_frontier_raises_is_known(self, small, frontier):
        frontier.fail(429, times=5)
        model = engine(small, frontier, NEVER).lm()
        with pytest.raises(dspy.LMRateLimitError) as caught:
            model("hi")
        assert "routenlp: no tier answered (small: answer rejected" in caught.value.__notes__[0]
        assert len(small.requests) == 1

    async def test_so_is_one_that_says_nothing_or_cannot_take_so_much(self, small, frontier):
        with ScriptedServer(lambda request: "") as mute:
            router = engine(mute, frontier, ALWAYS)
            assert router.lm()("hi") == [SAID]
            for events in (list(router.stream(asked())), await events_of(router, asked())):
                assert "".join(text_of(events)) == SAID
        small.fail(400, times=2)
        model = engine(small, frontier, ALWAYS).lm()
        assert model("a very long text") == [SAID]
        assert await model.acall("a very long text") == [SAID]

    async def test_a_failing_tier_is_passed_over(self, small, frontier):
        small.fail(500, times=5)
        model = engine(small, frontier, ALWAYS).lm()
        assert model("hi") == [SAID]
        assert await model.acall("hi") == [SAID]

    @pytest.mark.parametrize(
        ("tiers", "message"),
        [
            ({SMALL: "gpt-4o-mini"}, "small must be a dspy.LM or a callable"),
            ({}, "no callable for small, frontier"),
            ({"big": ScriptedTier()}, "no callable for"),
        ],
    )
    def test_tiers_that_are_none(self, tiers, message):
        with pytest.raises(PortfolioError, match=message):
            RouterEngine(tiers, ALWAYS)

    def test_no_release(self, small, frontier):
        with pytest.raises(ReleaseError, match=r"manifest.json: cannot be read"):
            engine(small, frontier, "nowhere")


class TestSaving:
    def test_a_program_with_it_is_saved_and_loaded(self, small, frontier, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        program = dspy.Predict(QA)
        program.set_lm(engine(small, frontier, GATED, task="t").lm())
        program.save(tmp_path / "program.json")
        assert "none" not in json.loads((tmp_path / "program.json").read_text())["lm"]["engine"]["state"]["tiers"]
        other = dspy.Predict(QA)
        with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
            other.load(tmp_path / "program.json")
        other.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
        loaded = other.lm.engine
        assert (loaded.release, loaded.task) == (GATED, "t")
        assert other.lm("hi") == ["a small guess"]
        assert asyncio.run(other.lm.acall("hi")) == ["a small guess"]

    def test_what_would_be_lost_is_named(self, frontier, tmp_path):
        program = dspy.Predict(QA)
        program.set_lm(RouterEngine({SMALL: ScriptedTier(), FRONTIER: lm(frontier, FRONTIER)}, ALWAYS).lm())
        with pytest.raises(TypeError, match=r"tier 'small', which is no dspy.LM, would be lost"):
            program.save(tmp_path / "program.json")
