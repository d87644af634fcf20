"""What can go wrong with a loop beside its rounds: bad arguments, silent frontiers, deleted files, other processes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from worlds import BIG, PROMISE, SMALL, Frontier, options, portfolio, serve, student, traffic

from routenlp_plugins import (
    Budget,
    Call,
    Completion,
    DataError,
    DistillationLoop,
    LoopOptions,
    Portfolio,
    PortfolioError,
    Promise,
    Release,
    ReleaseError,
    ReleaseRegistry,
    Task,
    Tier,
    TierError,
    load_student,
    student_kind,
)
from routenlp_plugins.distill.report import write_report
from routenlp_plugins.distill.student import KINDS, write_facts
from routenlp_plugins.terminal import show_versions


@dataclass
class Silent(Frontier):
    """Gives no answer to some of what it is asked once it is told to: every `share`-th."""

    share: int = 0
    word: str = ""

    def __call__(self, call: Call) -> Completion:
        said = super().__call__(call)
        silent = self.share and len(self.calls) % self.share == 0
        return replace(said, text=self.word) if silent else said


class TestLabels:
    @pytest.mark.parametrize(("share", "word", "why"), [(1, "", "empty"), (5, "I'm sorry, I cannot help.", "refusal")])
    def test_a_frontier_that_gives_no_answer_to_many_ends_the_round(self, world, share, word, why):
        world.frontier = Silent(word=word)
        loop = world.loop(ask_again=True)
        serve(loop, traffic(1600, seed=2))
        world.frontier.share = share
        done = loop.round()
        assert done.promoted is None
        assert any(re.search(rf"no answer to \d+ of \d+ fresh queries \(\d+ {why}\)", one) for one in done.refusals)

    def test_a_few_without_answer_are_left_out_and_counted(self, world):
        world.frontier = Silent()
        loop = world.loop(ask_again=True)
        serve(loop, traffic(1600, seed=2))
        world.frontier.share = 50
        done = loop.round()
        assert done.promoted == 2 and done.unanswered["empty"] > 0
        assert loop.rounds == (done,)


class TestBeginnings:
    def test_what_routes_nothing_is_certified_with_the_student_as_it_is(self, world):
        world.release = Release.frontier_only(portfolio(), ("intent",))
        loop = world.loop(promise=PROMISE, budget=Budget(lessons=1))
        serve(loop, traffic(1600, seed=2))
        done = loop.round()
        assert done.refusals and done.promoted == 2
        assert loop.serving.students()[SMALL].model == world.small.model
        assert done.after["cost_ratio"] < done.before["cost_ratio"] == 1

    def test_a_student_that_the_release_was_not_fitted_with_is_told(self, world):
        world.small = student(seed=1)
        with pytest.raises(DataError, match=r"was fitted with small as .*, this student is .*: its certificate says"):
            world.loop()

    def test_processes_that_begin_together_begin_one_loop(self, world):
        with ThreadPoolExecutor(4) as pool:
            loops = list(pool.map(lambda _: world.loop(), range(4)))
        assert [version.number for version in loops[0].registry.versions] == [1]

    def test_bad_arguments_are_told_before_anything_is_written(self, world, tmp_path):
        tiers = {SMALL: world.small, BIG: world.frontier}
        for bad, error, why in (
            ({"store": "traffic.db"}, DataError, "store must be a TraceStore, got 'traffic.db'"),
            ({"options": {"seed": 1}}, DataError, "options must be LoopOptions"),
            ({"tiers": {SMALL: world.small, BIG: "gpt-4o"}}, PortfolioError, "big must be a callable"),
        ):
            given = {"store": world.store, "tiers": tiers, "release": world.release, "options": options(), **bad}
            with pytest.raises(error, match=why):
                DistillationLoop(tmp_path / "new", given.pop("store"), given.pop("tiers"), **given)
            assert not (tmp_path / "new" / "versions").exists()
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="is a file; choose a folder"):
            DistillationLoop(tmp_path / "file", world.store, tiers, world.release)

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            (lambda: Promise(alpha=5), "promise: alpha must be strictly between 0 and 1, got 5"),
            (lambda: Promise(alpha=0.05, retention=0.9), "promise: give alpha or retention, one of them"),
            (Promise, "promise: give alpha or retention"),
            (lambda: LoopOptions(budget=100), "budget must be a Budget, got 100"),
            (lambda: LoopOptions(gate=0.03), "gate must be a GateOptions"),
            (lambda: LoopOptions(promise=0.05), "promise must be a Promise"),
            (lambda: LoopOptions(unanswered=-1), "unanswered must be at least 0"),
        ],
    )
    def test_bad_options_are_told_at_once(self, bad, why):
        with pytest.raises(DataError, match=why):
            bad()


class TestOtherArguments:
    def test_other_prices_are_told_and_can_be_given(self, world):
        loop = world.loop()
        serve(loop, traffic(1600, seed=2))
        dearer = Portfolio((Tier(SMALL, usd_per_hour=0.001), Tier(BIG, 5.0, 20.0)), BIG, portfolio().tasks)
        other = replace(world.release, portfolio=dearer)
        tiers = {SMALL: world.small, BIG: world.frontier}
        with pytest.raises(DataError, match="has other prices than the release that is given"):
            DistillationLoop(loop.folder, world.store, tiers, other, options())
        twice = DistillationLoop(loop.folder, world.store, tiers, other, options(portfolio=dearer))
        assert twice.round().promoted == 2
        assert twice.serving.release().portfolio.tier(BIG).input_usd_per_mtok == 5.0

    def test_another_promise_is_told(self, world):
        loop = world.loop()
        other = replace(world.release, certificate=replace(world.release.certificate, level=0.2))
        tiers = {SMALL: world.small, BIG: world.frontier}
        with pytest.raises(DataError, match=r"the loop keeps Promise\(alpha=0.1.*, the release that is given Promise"):
            DistillationLoop(loop.folder, world.store, tiers, other, options())

    def test_students_need_not_be_given_again(self, world):
        loop = world.loop()
        again = DistillationLoop(loop.folder, world.store, {BIG: world.frontier}, options=options())
        assert set(again.tiers) == {SMALL, BIG} and again.dispatcher().run(traffic(1, seed=9)[0][0]).tier in again.tiers


class TestRoundsThatWereBegun:
    def test_other_options_are_named_and_the_round_can_be_given_up(self, world):
        loop = world.loop()
        serve(loop, traffic(1600, seed=2))
        world.frontier.fails = True
        with pytest.raises(TierError):
            loop.round()
        world.frontier.fails = False
        tiers = {SMALL: world.small, BIG: world.frontier}
        other = DistillationLoop(loop.folder, world.store, tiers, options=options(budget=Budget(50), seed=3))
        with pytest.raises(DataError, match=r"begun with other options \(budget, seed\); finish it with those"):
            other.round()
        kept = other.abandon()
        assert (kept / "begun.json").exists() and other.rounds == ()
        assert other.round().number == 1
        with pytest.raises(DataError, match="no round was begun that is not finished"):
            other.abandon()

    def test_shares_of_delta_that_are_spent_are_told_before_the_round_begins(self, world):
        loop = world.loop(together=1)
        serve(loop, traffic(1600, seed=2))
        loop.round()
        serve(loop, traffic(1600, seed=3))
        asked = len(world.frontier.calls)
        with pytest.raises(DataError, match="round 2: 1 rounds share delta"):
            loop.round()
        assert len(world.frontier.calls) == asked and not (loop.folder / "rounds" / "0002").exists()

    def test_a_deleted_round_does_not_bring_an_old_one_back(self, world):
        import shutil

        loop = world.loop()
        for seed in (2, 3):
            serve(loop, traffic(1600, seed=seed))
            loop.round()
        shutil.rmtree(loop.folder / "rounds" / "0001")
        serve(loop, traffic(1600, seed=4))
        done = loop.round()
        assert (done.number, done.queries) == (3, 1600)

    def test_rounds_end_quietly_without_new_traffic(self, world):
        loop = world.loop()
        with pytest.raises(DataError, match="no traffic to look at"):
            list(loop.run(2))
        serve(loop, traffic(1600, seed=2))
        assert [one.number for one in loop.run(3)] == [1]
        with pytest.raises(DataError, match="rounds must be 1, 2"):
            list(loop.run(0))

    def test_its_page_shows_its_own_cut_whatever_the_options_are_now(self, world, tmp_path):
        loop = world.loop()
        serve(loop, traffic(1600, seed=2))
        loop.round()
        tiers = {SMALL: world.small, BIG: world.frontier}
        other = DistillationLoop(loop.folder, world.store, tiers, options=options(seed=1))
        pages = [write_report(one, tmp_path / f"{i}.html").read_text() for i, one in enumerate((loop, other))]
        told = [re.findall(r"the (\d+) with an outline", page) for page in pages]
        assert told[0] == told[1] != []


def test_a_student_none_of_whose_tasks_was_asked_is_told(tmp_path, world):
    tiers = (Tier(SMALL, usd_per_hour=0.001), Tier("other", usd_per_hour=0.001), Tier(BIG, 2.5, 10.0))
    tasks = (Task("intent", "accuracy", tiers=(SMALL,)), Task("risk", "accuracy", tiers=("other",)))
    release = Release.frontier_only(Portfolio(tiers, BIG, tasks))
    both = {SMALL: world.small, "other": student(seed=5), BIG: world.frontier}
    loop = DistillationLoop(tmp_path / "two", world.store, both, release, options(promise=PROMISE))
    serve(loop, traffic(1600, seed=2))
    done = loop.round()
    (silent,) = [one for one in done.students if one.tier == "other"]
    assert silent.skipped == "nothing to teach: no query of its tasks in this traffic"
    assert done.promoted == 2


class Own:
    """A student of a kind of its own."""

    lessons = ()
    model = "own-1"

    def __call__(self, call: Call) -> Completion:
        return Completion("mine", model=self.model)

    def taught(self, course: Any, folder: Path) -> Own:
        self.save(folder)
        return self

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder, "own")
        return folder


class TestRegistry:
    def test_a_kind_of_your_own_is_read_back_once_it_is_known(self, world, tmp_path, monkeypatch):
        registry = ReleaseRegistry(tmp_path / "r")
        with pytest.raises(ReleaseError, match=r"kind must be one of classifier.*student_kind\(kind, load\)"):
            registry.add(world.release, {SMALL: Own()}, "own")
        assert registry.versions == ()
        monkeypatch.setattr("routenlp_plugins.distill.student._OWN", {})
        student_kind("own", lambda folder: Own())
        registry.add(world.release, {SMALL: Own()}, "own")
        assert isinstance(registry.version(1).students()[SMALL], Own)
        for kind in KINDS:
            with pytest.raises(DataError, match="choose another name"):
                student_kind(kind, lambda folder: Own())

    def test_what_lies_beside_a_version_harms_nothing(self, world):
        loop = world.loop()
        (loop.serving.folder / "students" / SMALL / ".DS_Store").write_text("")
        assert loop.serving.number == 1

    def test_files_without_their_keys_are_told(self, world):
        loop = world.loop()
        (loop.folder / "serving.json").write_text("{}")
        with pytest.raises(ReleaseError, match=r"serving.json: truncated or edited \(format_version, history, changes"):
            loop.serving  # noqa: B018

    def test_a_loop_without_its_promise_says_how_to_go_on(self, world):
        loop = world.loop()
        (loop.folder / "promise.json").unlink()
        tiers = {SMALL: world.small, BIG: world.frontier}
        serve(loop, traffic(100, seed=2))
        with pytest.raises(DataError, match=r"promise.json: is gone; say .*LoopOptions\(promise=...\)"):
            DistillationLoop(loop.folder, world.store, tiers, options=options()).round()

    def test_paths_may_be_strings(self, tmp_path):
        one = student()
        one.save(str(tmp_path / "s"))
        assert type(one).load(str(tmp_path / "s")).model == load_student(str(tmp_path / "s")).model == one.model

    def test_status_says_why_and_that_nothing_serves(self, capsys):
        from rich.console import Console

        done = {"number": 1, "queries": 9, "promoted": None, "refusals": ["harm: x"], "cost_usd": 0.0}
        facts = {
            "serving": None,
            "versions": [],
            "rounds": [{**done, "break_even": None, "before": 0.5, "after": None, "broken": "7 of 9"}],
            "unfinished": [],
        }
        show_versions(Console(width=80), facts)
        told = capsys.readouterr().out
        assert "no version serves" in told and "round 1: harm: x" in told and "round 1: at any cost: 7 of 9" in told
