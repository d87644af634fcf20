"""Answers that come piece by piece: no word of a rejected one, none twice, none lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

import pytest
from helpers import FRONTIER, SMALL, gated, policy, portfolio, release, ticks_during

from routenlp_plugins import Answer, Call, Completion, Delta, Dispatcher, PortfolioError, Query, Release, TierError
from routenlp_plugins.policy import Rung
from routenlp_plugins.tiers.boundary import prompt_fingerprint


@dataclass(eq=False)
class Speaker:
    """Streams its words one by one; `breaks_after` of them it fails."""

    words: tuple[str, ...]
    confidence: float | None = None
    model: str | None = None
    breaks_after: int | None = None
    ends_as: str | None = None
    said: list[str] = field(default_factory=list)
    whole: int = 0
    closed: int = 0

    def __call__(self, call: Call) -> Completion:
        self.whole += 1
        if self.breaks_after is not None:
            raise OSError("broken off")
        return self._completion()

    def stream(self, call: Call) -> Iterator[Delta | Completion]:
        try:
            for place, word in enumerate(self.words):
                if place == self.breaks_after:
                    raise OSError("broken off")
                self.said.append(word)
                yield Delta(word, self.model, payload=place)
            if self.words:
                yield replace(self._completion(), model=self.ends_as or self.model)
        finally:
            self.closed += 1

    def _completion(self) -> Completion:
        return Completion(
            "".join(self.words), self.confidence, model=self.model, input_tokens=1, output_tokens=len(self.words)
        )


class AsyncSpeaker(Speaker):
    """The same without blocking."""

    async def acall(self, call: Call) -> Completion:
        await asyncio.sleep(0)
        return self(call)

    async def astream(self, call: Call) -> AsyncIterator[Delta | Completion]:
        for piece in self.stream(call):
            await asyncio.sleep(0)
            yield piece


GATED = release(gated(SMALL, 0.5, "confidence"))
ALWAYS = release(Rung(SMALL))


def certified(models: tuple[str, ...] = (), prompts: tuple[str, ...] = ()) -> Release:
    made = replace(policy(Rung(SMALL)), models={SMALL: models} if models else {}, prompts={"t": prompts})
    return Release(portfolio(), made)


def both(of: Release, small: dict, frontier: dict | None = None, listeners=()) -> list[tuple[list[Delta], Answer]]:
    """What is streamed, sync, async and async over tiers that are sync only."""
    found = []
    for kind, asynchronous in ((Speaker, False), (AsyncSpeaker, True), (Speaker, True)):
        tiers = {SMALL: kind(**small), FRONTIER: kind(**(frontier or {"words": ("the ", "frontier")}))}
        dispatcher = Dispatcher(of, tiers, listeners=listeners)
        query = Query("x", "t")
        parts = asyncio.run(everything(dispatcher, query)) if asynchronous else list(dispatcher.stream(query))
        assert isinstance(parts[-1], Answer) and all(isinstance(part, Delta) for part in parts[:-1])
        found.append((parts[:-1], parts[-1]))
    return found


async def everything(dispatcher: Dispatcher, query: Query) -> list[Delta | Answer]:
    return [part async for part in dispatcher.astream(query)]


def words(parts: list[Delta]) -> list[str]:
    return [part.text for part in parts]


class TestWhatIsPassedOn:
    def test_the_frontier_word_by_word_and_nothing_of_what_was_rejected(self):
        for parts, answer in both(GATED, {"words": ("a ", "guess"), "confidence": 0.1}):
            assert words(parts) == ["the ", "frontier"] and {part.tier for part in parts} == {FRONTIER}
            assert answer.text == "the frontier" and [a.tier for a in answer.trace.attempts] == [SMALL, FRONTIER]

    def test_an_accepted_answer_that_might_have_been_rejected_in_one_piece(self):
        for parts, answer in both(GATED, {"words": ("I ", "know"), "confidence": 0.9, "model": "m"}):
            assert words(parts) == ["I know"] and (parts[0].tier, parts[0].model) == (SMALL, "m")
            assert answer.tier == SMALL

    def test_a_tier_whose_every_answer_is_accepted_word_by_word(self):
        for parts, answer in both(ALWAYS, {"words": ("I ", "know")}):
            assert words(parts) == ["I ", "know"] and [part.payload for part in parts] == [0, 1]
            assert answer.tier == SMALL and answer.trace.attempts[0].completion.output_tokens == 2

    def test_the_decision_is_that_of_run(self):
        for small in ({"words": ("a",), "confidence": 0.1}, {"words": ("a",), "confidence": 0.9}):
            for of in (GATED, ALWAYS):
                dispatcher = Dispatcher(of, {SMALL: Speaker(**small), FRONTIER: Speaker(("f",))})
                run = dispatcher.run(Query("x", "t"))
                for _, answer in both(of, small, {"words": ("f",)}):
                    assert (answer.text, answer.tier, answer.trace.reason) == (run.text, run.tier, run.trace.reason)

    def test_tiers_that_do_not_stream_answer_in_one_piece(self):
        dispatcher = Dispatcher(ALWAYS, {SMALL: lambda call: Completion("plain"), FRONTIER: lambda call: None})
        *parts, answer = dispatcher.stream(Query("x", "t"))
        assert words(parts) == ["plain"] and answer.tier == SMALL


class TestCertificates:
    def test_the_certified_model_word_by_word(self):
        for parts, answer in both(certified(("m",)), {"words": ("I ", "know"), "model": "m"}):
            assert words(parts) == ["I ", "know"] and answer.tier == SMALL

    def test_another_model_not_at_all(self):
        for parts, answer in both(certified(("m",)), {"words": ("I ", "know"), "model": "n"}):
            assert words(parts) == ["the ", "frontier"] and "answered as 'n'" in answer.trace.reason

    def test_a_model_that_is_told_only_at_the_end_in_one_piece(self):
        for parts, answer in both(certified(("m",)), {"words": ("I ", "know"), "ends_as": "m"}):
            assert words(parts) == ["I know"] and answer.tier == SMALL

    def test_a_model_that_changes_its_name_on_the_way_ends_the_stream(self):
        small = Speaker(("I ", "know"), model="m", ends_as="n")
        dispatcher = Dispatcher(certified(("m",)), {SMALL: small, FRONTIER: Speaker(("f",))})
        heard = []
        with pytest.raises(TierError, match="changed after the answer had begun to be passed on"):
            heard.extend(dispatcher.stream(Query("x", "t")))
        assert words(heard) == ["I ", "know"]

    def test_an_answer_that_turns_out_not_to_be_valid_ends_the_stream(self):
        class Invalid(Speaker):
            def _completion(self) -> Completion:
                return replace(super()._completion(), scores={"valid": 0.0})

        heard = []
        with pytest.raises(TierError, match="turned out not to be valid"):
            heard.extend(
                Dispatcher(ALWAYS, {SMALL: Invalid(("I ", "know")), FRONTIER: Speaker(("f",))}).stream(Query("x", "t"))
            )
        assert words(heard) == ["I ", "know"]
        # of the frontier nothing else could be returned
        *parts, answer = Dispatcher(release(), {FRONTIER: Invalid(("f",))}).stream(Query("x", "t"))
        assert words(parts) == ["f"] and answer.tier == FRONTIER

    def test_another_prompt_not_word_by_word(self):
        mine = prompt_fingerprint(Query("x", "t", settings="hot"))
        hot = Query("x", "t", settings="hot")
        small = {SMALL: Speaker(("I ", "know")), FRONTIER: Speaker(("the ", "frontier"))}
        assert words(list(Dispatcher(certified(prompts=(mine,)), small).stream(hot))[:-1]) == ["I ", "know"]
        *parts, answer = Dispatcher(certified(prompts=("another",)), small).stream(hot)
        assert words(parts) == ["the ", "frontier"] and "prompt" in answer.trace.reason


class TestFailures:
    def test_before_the_first_word_the_next_tier_answers(self):
        for small in ({"words": ("a", "b"), "breaks_after": 0}, {"words": ()}):
            for parts, answer in both(ALWAYS, small):
                assert words(parts) == ["the ", "frontier"]
                why = "broken off" if small["words"] else "the stream was empty"
                assert why in answer.trace.attempts[0].error

    def test_after_the_first_word_there_is_an_error_with_the_attempts(self):
        for asynchronous in (False, True):
            frontier = AsyncSpeaker(("f",))
            tiers = {SMALL: AsyncSpeaker(("a ", "b ", "c"), breaks_after=2), FRONTIER: frontier}
            heard: list[Delta | Answer] = []
            told = []
            dispatcher = Dispatcher(ALWAYS, tiers, listeners=[told.append])
            with pytest.raises(TierError, match=r"no tier answered \(small: OSError: broken off\)") as caught:
                asyncio.run(hear(dispatcher, heard)) if asynchronous else heard.extend(dispatcher.stream("x"))
            assert words(heard) == ["a ", "b "] and not frontier.said and not frontier.whole
            assert [a.tier for a in caught.value.attempts] == [SMALL] and caught.value.begun
            assert told == [caught.value.trace]

    def test_a_frontier_that_breaks_off(self):
        tiers = {SMALL: Speaker(("g",), confidence=0.1), FRONTIER: Speaker(("a ", "b"), breaks_after=1)}
        with pytest.raises(TierError, match="frontier: OSError: broken off") as caught:
            list(Dispatcher(GATED, tiers).stream("x"))
        assert [a.tier for a in caught.value.attempts] == [SMALL, FRONTIER]

    def test_a_stream_that_ends_without_its_answer(self):
        class Cut(Speaker):
            def stream(self, call: Call) -> Iterator[Delta | Completion]:
                yield Delta("half")

        tiers = {SMALL: Cut(("x",)), FRONTIER: Speaker(("f",))}
        with pytest.raises(TierError, match="the stream ended before the answer was whole"):
            list(Dispatcher(ALWAYS, tiers).stream("x"))

    def test_a_tier_that_streams_something_else_is_told_what_to_stream(self):
        class Wrong(Speaker):
            def stream(self, call: Call) -> Iterator[str]:
                yield "word"

        tiers = {SMALL: Wrong(("x",)), FRONTIER: Speaker(("f",))}
        with pytest.raises(PortfolioError, match="'small': streamed a str; a tier streams Delta, and at last"):
            list(Dispatcher(ALWAYS, tiers).stream("x"))


async def hear(dispatcher: Dispatcher, heard: list[Delta | Answer]) -> None:
    async for part in dispatcher.astream("x"):
        heard.append(part)


class TestListeners:
    def test_are_told_once_and_before_the_end(self):
        told = []
        found = both(GATED, {"words": ("a",), "confidence": 0.1}, listeners=[told.append])
        assert [trace.id for trace in told] == [answer.trace.id for _, answer in found]

    def test_hear_of_a_stream_that_is_closed(self):
        told = []
        small, frontier = Speaker(("g",), confidence=0.1), Speaker(("a ", "b ", "c"))
        stream = Dispatcher(GATED, {SMALL: small, FRONTIER: frontier}, listeners=[told.append]).stream("x")
        assert next(stream).text == "a "
        stream.close()
        (trace,) = told
        assert [a.tier for a in trace.attempts] == [SMALL, FRONTIER] and frontier.closed == 1
        assert trace.reason == "nobody waited for the answer" and not any(a.accepted for a in trace.attempts)
        assert frontier.said == ["a "]

    async def test_hear_of_a_cancelled_call(self):
        async def slow(call: Call) -> Completion:
            await asyncio.sleep(60)
            return Completion("late")

        told = []
        dispatcher = Dispatcher(ALWAYS, {SMALL: slow, FRONTIER: slow}, listeners=[told.append])
        for work in (dispatcher.arun("x"), hear(dispatcher, [])):
            task = asyncio.create_task(work)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            (trace,) = told
            assert [a.error for a in trace.attempts] == ["the call was given up before its end"]
            told.clear()


async def test_sync_streams_do_not_block_the_event_loop():
    class Slow(Speaker):
        def stream(self, call: Call) -> Iterator[Delta | Completion]:
            import time

            for piece in super().stream(call):
                time.sleep(0.05)
                yield piece

    dispatcher = Dispatcher(ALWAYS, {SMALL: Slow(("a", "b", "c")), FRONTIER: Speaker(("f",))})
    assert await ticks_during(hear(dispatcher, []), 0.005) > 10
