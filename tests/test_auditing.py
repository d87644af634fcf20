"""Audits of a certified release, over tiers that really get worse."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from multiprocessing import get_context
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from signal import SIG_IGN, SIGXFSZ, signal
from time import sleep

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, QUESTION, SMALL, portfolio, row, rows

from routenlp_plugins import (
    Answer,
    AuditOptions,
    Auditor,
    Completion,
    DataError,
    Dispatcher,
    Policy,
    Query,
    Release,
    TierError,
    TraceStore,
    Watch,
    fit,
    ledger,
    replay,
)
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.policy import Rung
from routenlp_plugins.signals.keeping import kept

EVERYTHING = AuditOptions(share=1.0)


class World:
    """Three tiers whose confidence is their true probability of being right, until the small one degrades."""

    def __init__(self) -> None:
        self.degraded = False
        self.calls: list[str] = []

    def tiers(self):
        return {SMALL: self.small, MIDDLE: self.middle, FRONTIER: self.frontier}

    def frontier(self, call) -> Completion:
        return self._answer(call, 1.0, None)

    def small(self, call) -> Completion:
        chance = np.random.default_rng(int(call.query.id)).beta(3, 1.2)
        return self._answer(call, chance / 2 if self.degraded else chance, float(chance))

    def middle(self, call) -> Completion:
        chance = np.random.default_rng(int(call.query.id) + 10**6).beta(6, 1.2)
        return self._answer(call, chance, float(chance))

    def _answer(self, call, chance: float, confidence: float | None) -> Completion:
        self.calls.append(call.tier)
        lucky = np.random.default_rng([int(call.query.id), len(call.tier)]).random() < chance
        return Completion("right" if lucky else "wrong", confidence=confidence, input_tokens=10, output_tokens=10)


def is_right(query: Query, completion: Completion) -> float:
    return float(completion.text == "right")


@pytest.fixture(scope="module")
def release() -> Release:
    return fit(rows(3000), portfolio(), alpha=0.1)


def auditor(release, log, world: World | None = None, options: AuditOptions = EVERYTHING, quality=is_right) -> Auditor:
    return Auditor(Dispatcher(release, (world or World()).tiers()), quality, log, options)


def ask(router: Auditor, first: int, last: int) -> list:
    answers = [router.run(Query(QUESTION, "t", str(i))) for i in range(first, last)]
    router.flush()
    return answers


def test_a_certificate_that_holds_stays(release, tmp_path):
    with auditor(release, tmp_path / "log.jsonl") as router:
        answers = ask(router, 0, 400)
        assert router.expired == {}
    assert {answer.tier for answer in answers} == {SMALL, MIDDLE, FRONTIER}
    (monitor,) = router.watch.monitors.values()
    assert monitor.n == 400
    assert monitor.total / 400 < 0.03


def test_a_tier_that_degrades_is_noticed_and_its_task_goes_to_the_frontier(release, tmp_path):
    world = World()
    log = tmp_path / "log.jsonl"
    with auditor(release, log, world) as router:
        ask(router, 0, 300)
        world.degraded = True
        ask(router, 300, 900)
        assert router.expired.keys() == {"t"}
        after = ask(router, 900, 1700)
    assert {answer.tier for answer in after} == {FRONTIER}
    assert "the certificate of task 't' has expired: " in after[0].trace.reason
    assert "audits show that P(answer accepted below the frontier" in after[0].trace.reason
    # the audits went on, and they are what a new release is fitted on
    fresh = [r for r in read_outcomes(log) if int(r.query.id) >= 900]
    assert len(fresh) == 800
    assert set(fresh[0].outcomes) == {SMALL, MIDDLE, FRONTIER}
    again = fit(fresh, portfolio(), alpha=0.1)
    assert again.certificate.certified == ("t",)
    assert replay(fresh, again).violation_rate < 0.1 < replay(fresh, release).violation_rate


def test_a_store_keeps_what_was_answered_what_audits_called_and_what_they_found(release, tmp_path):
    world = World()
    some = AuditOptions(share=0.5)
    with TraceStore(tmp_path / "traces.db") as store:
        dispatcher = Dispatcher(release, world.tiers(), listeners=[store.record])
        with Auditor(dispatcher, is_right, tmp_path / "log.jsonl", some, store) as router:
            answers = ask(router, 0, 200)
        store.flush()
        audits = list(read_outcomes(tmp_path / "log.jsonl"))
        rows = list(store.outcomes(labelled=True))
        traces = list(store.traces())
        bill, quality = ledger(store, release.portfolio), kept(store, release.portfolio)
    assert len(traces) == 200
    assert {one.id for one in traces} == {answer.trace.id for answer in answers}
    assert {one.propensity for one in traces} == {0.5}
    assert 60 < len(audits) == len(rows) < 140

    def facts(some):
        return {row.query.id: {tier: one.quality for tier, one in row.outcomes.items()} for row in some}

    assert facts(rows) == facts(audits)
    assert {row.propensity for row in rows} == {0.5}
    assert sum(line.calls for line in bill.lines) == len(world.calls)
    assert sum(line.usd for line in bill.lines if line.purpose == "audit") == pytest.approx(router.spent_usd)
    assert bill.saved_usd is not None
    returned = [
        row.outcomes[one.trace.accepted.tier].quality for row in rows for one in traces if one.id == row.source[6:]
    ]
    assert (quality.audited, quality.unknown) == (len(rows), "")
    assert quality.quality == pytest.approx(np.mean(returned))
    assert quality.of_frontier == pytest.approx(np.mean([row.outcomes[FRONTIER].quality for row in rows]))
    assert bill.audited == sum(
        not any(a.tier == FRONTIER for a in one.trace.attempts) and FRONTIER in facts(rows).get(one.trace.query.id, {})
        for one in traces
    )


def test_an_audit_of_a_query_that_nobody_answered_is_on_the_bill_too(release, tmp_path):
    def fails(call):
        raise OSError("down")

    def unsure(call):
        return Completion("wrong", confidence=0.0, input_tokens=10, output_tokens=10)

    with TraceStore(tmp_path / "traces.db") as store:
        dispatcher = Dispatcher(release, {SMALL: unsure, MIDDLE: unsure, FRONTIER: fails})
        with (
            Auditor(dispatcher, is_right, tmp_path / "log.jsonl", EVERYTHING, store) as router,
            pytest.raises(TierError) as caught,
        ):
            router.run(Query(QUESTION, "t", "1"))
        store.flush()
        (found,) = store.traces()
    assert found.id == caught.value.trace.id
    called = [*found.trace.attempts, *found.beside.get("audit", ())]
    assert sorted(attempt.tier for attempt in called) == sorted([SMALL, MIDDLE, FRONTIER])


def test_what_an_audit_cannot_tell_is_in_the_sample_all_the_same_and_a_query_asked_again_is_not(release, tmp_path):
    def sometimes(query, completion):
        return None if int(query.id) % 3 else is_right(query, completion)

    with TraceStore(tmp_path / "traces.db") as store:
        dispatcher = Dispatcher(release, World().tiers())
        with Auditor(dispatcher, sometimes, tmp_path / "log.jsonl", EVERYTHING, store) as router:
            ask(router, 0, 30)
            ask(router, 0, 5)
        store.flush()
        rows = list(store.outcomes(labelled=True))
    assert len(rows) == 30
    unknown = [row for row in rows if all(one.quality is None for one in row.outcomes.values())]
    assert len(unknown) == 20


def test_a_store_that_is_none_is_refused(release, tmp_path):
    with pytest.raises(DataError, match="store must be a TraceStore, got str"):
        Auditor(Dispatcher(release, World().tiers()), is_right, tmp_path / "log.jsonl", store="traces.db")


def test_the_log_is_the_whole_state(release, tmp_path):
    log, world = tmp_path / "log.jsonl", World()
    world.degraded = True
    with auditor(release, log, world) as router:
        ask(router, 0, 600)
        before = router.watch
        assert before.expired
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])  # killed in the middle of a line
    with auditor(release, log, world) as router:
        (monitor,) = router.watch.monitors.values()
        assert (monitor.n, router.expired.keys()) == (599, {"t"})
        assert ask(router, 700, 701)[0].tier == FRONTIER
        ask(router, 0, 5)  # audited already
        (monitor,) = router.watch.monitors.values()
        assert monitor.n == 600
    assert len(read_outcomes(log)) == 600


def test_the_share_is_drawn_by_the_id_and_nothing_else(release, tmp_path):
    options = AuditOptions(share=0.2)
    world = World()
    with auditor(release, tmp_path / "log.jsonl", world, options) as router:
        ask(router, 0, 500)
        audited = {r.query.id for r in read_outcomes(tmp_path / "log.jsonl")}
        assert audited == {str(i) for i in range(500) if router.drawn(Query("y", "t", str(i)))}
        assert 70 < len(audited) < 130
        assert {r.propensity for r in read_outcomes(tmp_path / "log.jsonl")} == {0.2}
        assert router.spent_usd > 0
    # what the policy had called was not called again
    calls = {tier: world.calls.count(tier) for tier in (SMALL, MIDDLE, FRONTIER)}
    assert calls[SMALL] <= 500 and calls[FRONTIER] < 500


async def test_async_answers_are_audited_too(release, tmp_path):
    with auditor(release, tmp_path / "log.jsonl") as router:
        answers = await asyncio.gather(*(router.arun(Query(QUESTION, "t", str(i))) for i in range(20)))
        await asyncio.to_thread(router.flush)
    assert len(answers) == len(read_outcomes(tmp_path / "log.jsonl")) == 20


async def test_streamed_answers_are_audited_too(release, tmp_path):
    with auditor(release, tmp_path / "log.jsonl") as router:
        last = [list(router.stream(Query(QUESTION, "t", str(i))))[-1] for i in range(5)]
        last += [[part async for part in router.astream(Query(QUESTION, "t", str(i)))][-1] for i in range(5, 10)]
        await asyncio.to_thread(router.flush)
    assert all(isinstance(answer, Answer) for answer in last)
    audited = {row.query.id for row in read_outcomes(tmp_path / "log.jsonl")}
    assert audited == {answer.trace.query.id for answer in last} == set(map(str, range(10)))


def test_a_query_without_id_gets_one(release, tmp_path):
    class Right(World):
        def _answer(self, call, chance, confidence):
            return Completion("right", confidence=0.5, input_tokens=1, output_tokens=1)

        def small(self, call):
            return self._answer(call, 1.0, 0.5)

        middle = small

    with auditor(release, tmp_path / "log.jsonl", Right()) as router:
        assert router.run("x").trace.query.id
        router.flush()
    assert len(read_outcomes(tmp_path / "log.jsonl")) == 1


def test_an_audit_needs_no_cost(release, tmp_path):
    class Unpriced(World):
        def _answer(self, call, chance, confidence):
            return replace(super()._answer(call, chance, confidence), input_tokens=None, output_tokens=None)

    with auditor(release, tmp_path / "log.jsonl", Unpriced()) as router:
        ask(router, 0, 20)
        assert router.watch.monitors["t",].n == 20


def test_two_auditors_cannot_write_one_log(release, tmp_path):
    with (
        auditor(release, tmp_path / "log.jsonl"),
        pytest.raises(DataError, match=r"log\.jsonl: another collection or auditor is writing to it"),
    ):
        auditor(release, tmp_path / "log.jsonl")
    auditor(release, tmp_path / "log.jsonl").close()


def test_a_log_has_one_release_and_one_share(release, tmp_path):
    log = tmp_path / "log.jsonl"
    with auditor(release, log) as router:
        ask(router, 0, 5)
    other = fit(rows(2000, seed=1), portfolio(), alpha=0.1)
    with pytest.raises(DataError, match=r"log.jsonl:1: was audited under another release; log to a new file"):
        auditor(other, log)
    with pytest.raises(DataError, match=r"was drawn with a share of 1.0, not 0.5; go on with that one, or log"):
        auditor(release, log, options=AuditOptions(share=0.5))
    assert auditor(release, log).watch.monitors["t",].n == 5


def test_a_link_to_a_log_is_that_log(release, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "log.jsonl")
    with (
        auditor(release, tmp_path / "log.jsonl"),
        pytest.raises(DataError, match="another collection or auditor is writing to it"),
    ):
        auditor(release, link)


def test_a_query_that_is_asked_twice_at_once_is_audited_once(release, tmp_path):
    class Slow(World):
        def frontier(self, call) -> Completion:
            sleep(0.2)
            return super().frontier(call)

    log = tmp_path / "log.jsonl"
    with auditor(release, log, Slow(), AuditOptions(share=1, workers=2)) as router:
        for _ in range(2):
            router.run(Query(QUESTION, "t", "1"))
    assert len(read_outcomes(log)) == router.watch.monitors["t",].n == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_auditor_does_not_work_in_a_forked_process(release, tmp_path):
    def ask_in_child(router, told) -> None:
        try:
            router.run(Query(QUESTION, "t", "2"))
        except DataError as error:
            told.put(str(error))

    with auditor(release, tmp_path / "log.jsonl") as router:
        ask(router, 0, 2)
        forking = get_context("fork")
        told = forking.SimpleQueue()
        child = forking.Process(target=ask_in_child, args=(router, told))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert "opened in another process; open one in each process" in told.get()


def test_an_answer_that_was_made_while_the_auditor_closed_is_returned(release, tmp_path):
    class Closing(World):
        def _answer(self, call, chance, confidence) -> Completion:
            router.close()
            return super()._answer(call, chance, confidence)

    router = auditor(release, tmp_path / "log.jsonl", Closing())
    assert router.run(Query(QUESTION, "t", "1")).text


def test_a_row_that_does_not_fit_on_the_disk_leaves_nothing_behind(release, tmp_path):
    log = tmp_path / "log.jsonl"
    with auditor(release, log) as router:
        ask(router, 0, 3)
        before = log.read_bytes()
        limits = getrlimit(RLIMIT_FSIZE)
        handler = signal(SIGXFSZ, SIG_IGN)
        setrlimit(RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                ask(router, 3, 4)
        finally:
            setrlimit(RLIMIT_FSIZE, limits)
            signal(SIGXFSZ, handler)
        assert log.read_bytes() == before
        ask(router, 4, 5)
    assert len(read_outcomes(log)) == 4


def test_an_alarm_says_how_many_qualities_are_unknown(release, tmp_path):
    with auditor(release, tmp_path / "log.jsonl", quality=lambda query, completion: None) as router:
        ask(router, 0, 60)
        (reason,) = set(router.expired.values())
    assert "which counts as bad" in reason
    with pytest.raises(DataError, match=r"quality must be a function \(query, completion\) -> quality, got 'accuracy'"):
        auditor(release, tmp_path / "log-2.jsonl", quality="accuracy")


def test_a_failed_audit_is_told_once_and_logged(release, tmp_path, caplog):
    def judge(query, completion):
        raise ValueError("no judge today")

    with auditor(release, tmp_path / "log.jsonl", quality=judge) as router:
        for i in range(5):
            router.run(Query(QUESTION, "t", str(i)))
        with pytest.raises(ValueError, match="no judge today"):
            router.flush()
        router.flush()
    assert sum("no judge today" in record.message for record in caplog.records) == 5


def test_the_error_of_the_body_is_raised_and_not_that_of_an_audit(release, tmp_path):
    def judge(query, completion):
        raise ValueError("no judge today")

    with (
        pytest.raises(KeyError, match="mine"),
        auditor(release, tmp_path / "log.jsonl", quality=judge) as router,
    ):
        router.run(Query(QUESTION, "t", "1"))
        raise KeyError("mine")
    assert len(read_outcomes(tmp_path / "log.jsonl")) == 1


def test_a_log_of_another_portfolio_is_left_alone(release, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"query_id": "q", "task": "t", "outcomes": {"other": {"quality": 1}}}\n')
    with pytest.raises(DataError, match=r"log\.jsonl:1: belongs to another portfolio; log to a new file"):
        auditor(release, log)


def test_a_quality_that_is_none_is_told_at_the_end(release, tmp_path):
    router = auditor(release, tmp_path / "log.jsonl", quality=lambda query, completion: 7)
    router.run(Query("x", "t", "1"))
    with pytest.raises(DataError, match=r"the quality function returned 7 for .*; expected"):
        router.close()


def test_a_release_without_certificate_has_nothing_to_watch(tmp_path):
    with pytest.raises(DataError, match="the release has no valid certificate that could expire"):
        auditor(Release(portfolio(), Policy(FRONTIER, {"t": (Rung(SMALL),)})), tmp_path / "log.jsonl")


def test_tasks_without_certificate_say_nothing_and_a_failing_frontier_breaks_no_promise(release):
    watch = Watch.over(release)
    other = row("a", "u", small=(0.0, 0.9), frontier=(1.0, None))
    assert watch.after(other) == watch
    failed = row("a", small=(0.0, 0.0), middle=(0.0, 0.0), frontier=(None, None))
    down = replace(failed.outcomes[FRONTIER], error="down")
    seen = watch.after(replace(failed, outcomes={**failed.outcomes, FRONTIER: down})).monitors[("t",)]
    assert (seen.n, seen.total) == (1, pytest.approx(-0.1))


def test_a_failing_tier_is_an_outcome(release, tmp_path):
    class Broken(World):
        def small(self, call):
            raise TierError("down", SMALL)

    with auditor(release, tmp_path / "log.jsonl", Broken()) as router:
        ask(router, 0, 10)
    assert {r.outcomes[SMALL].error for r in read_outcomes(tmp_path / "log.jsonl")} == {"down"}


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_out_of_range_is_an_error(share):
    with pytest.raises(DataError, match="share must be in"):
        AuditOptions(share=share)
