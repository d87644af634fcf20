from __future__ import annotations

import asyncio
import threading
import time

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, release, ticks_during

from routenlp_plugins import Call, Completion, Dispatcher, PortfolioError, Query, TierError
from routenlp_plugins.testing import ScriptedTier

GATED = release(gated(SMALL, 0.5, "confidence"))


def tiers(small=None):
    small = small or ScriptedTier({"easy": Completion("small", 0.9), "hard": Completion("small", 0.1)})
    return {SMALL: small, FRONTIER: ScriptedTier(default=Completion("frontier", input_tokens=100, output_tokens=100))}


def facts(answer):
    attempts = [(a.tier, a.accepted, a.confidence) for a in answer.trace.attempts]
    return answer.text, answer.tier, attempts, answer.trace.reason


@pytest.mark.parametrize("text", ["easy", "hard", "unknown"])
async def test_sync_and_async_decide_alike(text):
    dispatcher = Dispatcher(GATED, tiers())
    assert facts(dispatcher.run(text)) == facts(await dispatcher.arun(text))


def test_calls_are_measured_and_priced_by_the_portfolio():
    (attempt,) = Dispatcher(release(), tiers()).run("x").trace.attempts
    assert attempt.completion.cost_usd == pytest.approx(200 * 10 / 1e6)
    assert attempt.completion.latency_ms > 0


def test_a_tier_s_own_cost_and_latency_are_kept():
    own = ScriptedTier(default=Completion("x", cost_usd=7.0, latency_ms=5.0))
    (attempt,) = Dispatcher(release(), {FRONTIER: own}).run("x").trace.attempts
    assert (attempt.completion.cost_usd, attempt.completion.latency_ms) == (7.0, 5.0)


@pytest.mark.parametrize("error", [ValueError("bad"), TimeoutError("late"), TierError("down", SMALL), KeyError("k")])
async def test_whatever_a_cheap_tier_raises_escalates(error):
    dispatcher = Dispatcher(GATED, tiers(ScriptedTier(default=error)))
    for answer in (dispatcher.run("x"), await dispatcher.arun("x")):
        assert answer.tier == FRONTIER
        assert str(error) in answer.trace.attempts[0].error


def test_a_failing_frontier_raises_with_the_attempts():
    failing = {SMALL: ScriptedTier(default=Completion("x", 0.1)), FRONTIER: ScriptedTier(default=OSError("refused"))}
    with pytest.raises(
        TierError, match=r"no tier answered \(small: answer rejected; frontier: OSError: refused\)"
    ) as caught:
        Dispatcher(GATED, failing).run("x")
    assert [a.tier for a in caught.value.attempts] == [SMALL, FRONTIER]


def test_missing_and_unknown_tiers_are_named_at_once():
    with pytest.raises(
        PortfolioError, match="tiers: no callable for small, which the release can call; given: frontier"
    ):
        Dispatcher(GATED, {FRONTIER: ScriptedTier()})
    with pytest.raises(
        PortfolioError, match="tiers: tiny is not in the portfolio of the release; its tiers: small, middle"
    ):
        Dispatcher(GATED, {**tiers(), "tiny": ScriptedTier()})
    with pytest.raises(PortfolioError, match="tiers: small must be a callable Call -> Completion, got str"):
        Dispatcher(GATED, {**tiers(), SMALL: "gpt"})


def test_tiers_the_policy_never_calls_need_not_be_there():
    assert Dispatcher(GATED, {**tiers(), MIDDLE: ScriptedTier()}).run("easy").tier == SMALL
    assert Dispatcher(GATED, tiers()).run("easy").tier == SMALL


def test_a_tier_that_returns_something_else_is_told_what_to_return():
    with pytest.raises(
        PortfolioError, match="tier 'small': returned str; a tier is called with a Call and returns a Completion"
    ):
        Dispatcher(GATED, {**tiers(), SMALL: lambda call: "text"}).run("x")


async def test_async_tiers_are_awaited_and_refused_by_run():
    async def small(call: Call) -> Completion:
        await asyncio.sleep(0)
        return Completion("small", 0.9)

    dispatcher = Dispatcher(GATED, {**tiers(), SMALL: small})
    assert (await dispatcher.arun("x")).tier == SMALL
    with pytest.raises(PortfolioError, match="tier 'small' is async only: use arun"):
        dispatcher.run("x")


async def test_sync_tiers_do_not_block_the_event_loop():
    def slow(call: Call) -> Completion:
        time.sleep(0.2)
        return Completion("small", 0.9)

    dispatcher = Dispatcher(GATED, {**tiers(), SMALL: slow})
    assert await ticks_during(dispatcher.arun("x"), interval=0.01) >= 5


async def test_cancelling_cancels_the_tier():
    cancelled = asyncio.Event()

    async def hanging(call: Call) -> Completion:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Completion("never")

    task = asyncio.create_task(Dispatcher(GATED, {**tiers(), SMALL: hanging}).arun("x"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()


def test_one_dispatcher_serves_many_threads_without_mixing_queries():
    def echo(call: Call) -> Completion:
        time.sleep(0.001)
        return Completion(call.query.text, confidence=0.9)

    dispatcher, wrong = Dispatcher(GATED, {**tiers(), SMALL: echo}), []

    def work(name: str) -> None:
        for i in range(20):
            text = f"{name}-{i}"
            answer = dispatcher.run(Query(text, "t"))
            if answer.text != text or answer.trace.query.text != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_pinned_dispatcher_sends_everything_to_one_tier():
    answer = Dispatcher(GATED, tiers()).pinned(SMALL).run("hard")
    assert (answer.tier, len(answer.trace.attempts)) == (SMALL, 1)
