"""A round of the distillation loop, end to end on a real store and real classifiers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from threading import Lock

import numpy as np
import pytest
from worlds import (
    BIG,
    HARD,
    PROMISE,
    SMALL,
    Frontier,
    World,
    accuracy,
    options,
    portfolio,
    question,
    serve,
    student,
    traffic,
    word,
)

from routenlp_plugins import (
    Budget,
    Call,
    Completion,
    DataError,
    Dispatcher,
    DistillationLoop,
    Filters,
    FitOptions,
    GateOptions,
    LoopOptions,
    Portfolio,
    PortfolioError,
    Promise,
    Query,
    Release,
    ReleaseError,
    ReleaseRegistry,
    Tier,
    TierError,
    TraceStore,
    ledger,
)
from routenlp_plugins.distill.files import write_json
from routenlp_plugins.distill.gate import Fresh, judge
from routenlp_plugins.distill.lessons import read_lessons
from routenlp_plugins.distill.teaching import teach


def test_a_round_teaches_what_was_escalated_and_promotes_a_cheaper_release(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    served = len(world.frontier.calls)
    done = loop.round()
    assert done.promoted == 2 and not done.refusals
    assert done.after["cost_ratio"] < done.before["cost_ratio"]
    fresh = traffic(400, seed=3)
    assert accuracy(loop.tiers[SMALL], fresh) > accuracy(world.small, fresh) + 0.1
    # the new version serves, and the old one is kept
    assert [version.number for version in loop.registry.versions] == [1, 2]
    dispatcher = Dispatcher(loop.serving.release(), loop.tiers)
    answers = [dispatcher.run(query) for query, _ in fresh]
    wrong = np.mean([a.tier == SMALL and a.text != intent for a, (_, intent) in zip(answers, fresh, strict=True)])
    assert wrong <= 0.1
    # what was bought is charged: labels only, since what was escalated had its answer
    (taught,) = done.students
    assert taught.already_paid == taught.lessons == 60
    assert done.bill.teacher == 0 < done.bill.labels
    bought = len(world.frontier.calls) - served - sum(a.tier == BIG for a in answers)
    assert done.bill.labels == pytest.approx(bought * (100 * 2.5 + 5 * 10) / 1e6)
    assert ledger(world.store, portfolio()).beside_usd == pytest.approx(done.bill.labels)
    assert done.break_even == pytest.approx(done.bill.total / done.saving_usd, abs=1)


def test_lessons_are_of_the_hard_intents_and_none_of_them_judges(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    loop.round()
    folder = loop.folder / "rounds" / "0001"
    lessons = read_lessons(folder / "lessons-small.jsonl")
    assert np.mean([lesson.answer in HARD for lesson in lessons]) > 0.8
    judged = {
        json.loads(line)["query_id"]
        for name in ("gate-new-small", "gate-big", "certify-new-small", "certification-big")
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    }
    assert judged and not judged & {lesson.id for lesson in lessons}


def test_rounds_go_on_until_little_changes(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    seeds = iter(range(10, 20))
    done = list(loop.run(4, between=lambda _: serve(loop, traffic(1600, seed=next(seeds)))))
    assert done[0].promoted == 2
    assert all(one.change is not None and abs(one.change) >= 0.005 for one in done[:-1])
    assert [one.number for one in loop.rounds] == list(range(1, len(done) + 1))
    assert loop.rounds[0] == done[0]
    # each looks at traffic of its own
    assert all(one.since == before.until for before, one in pairwise(done))


def poisoned(world):
    """All goes to the frontier, whose answers about one intent that the student knows say another: a tenth of all."""
    queries = traffic(3000, seed=2)
    world.release = Release.frontier_only(portfolio(), ("intent",))
    mine = [query.text for query, intent in queries if intent == "known-0"]
    assert 0.08 < len(mine) / len(queries) < 0.12
    world.frontier.says = dict.fromkeys(mine, "hard-0")
    loop = world.loop(promise=PROMISE, ask_again=True, budget=Budget(lessons=800), selection="random escalated")
    serve(loop, queries)
    world.frontier.says.clear()
    return loop


def test_poison_in_one_cluster_is_refused_with_the_reason(world):
    loop = poisoned(world)
    before = loop.serving.students()[SMALL].model
    done = loop.round()
    # what routed nothing may route now, with the student as it was
    assert done.promoted == 2 and loop.serving.students()[SMALL].model == before
    assert any("harm: answer 'known-0'" in why for why in done.refusals), done.refusals


def test_nothing_to_teach_is_told(world):
    loop = world.loop(promise=PROMISE)
    dispatcher = Dispatcher(world.release, loop.tiers)
    serve(loop, [pair for pair in traffic(400, seed=2) if dispatcher.run(pair[0]).tier == SMALL])
    done = loop.round()
    assert done.promoted is None
    (why,) = done.refusals
    assert "nothing to teach" in why


def test_without_traffic_there_is_no_round(world):
    loop = world.loop()
    with pytest.raises(DataError, match="no traffic to look at"):
        loop.round()
    serve(loop, traffic(800, seed=2))
    assert loop.round().number == 1
    with pytest.raises(DataError, match="no traffic to look at since the last round"):
        loop.round()


def test_a_teacher_that_is_down_stops_the_round_and_it_goes_on_later(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    world.frontier.fails = True
    with pytest.raises(TierError, match="failed 10 times in a row"):
        loop.round()
    assert loop.serving.number == 1
    world.frontier.fails = False
    # later traffic is for the next round
    serve(loop, traffic(50, seed=5))
    done = loop.round()
    assert (done.number, done.queries, done.promoted) == (1, 1600, 2)


def test_what_was_paid_is_not_bought_again_after_an_interruption(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    before = len(world.frontier.calls)
    answer, left = world.frontier, 100

    def falters(call: Call) -> Completion:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return answer(call)

    tiers = {SMALL: world.small, BIG: falters}
    stopped = DistillationLoop(loop.folder, world.store, tiers, options=loop.options)
    with pytest.raises(KeyboardInterrupt):
        stopped.round()
    loop.round()
    bought = world.frontier.calls[before:]
    assert len(bought) == len(set(bought)) > 100


def test_answers_that_are_empty_or_refuse_are_not_taught(world):
    loop = world.loop()
    queries = traffic(1600, seed=2)
    rng = np.random.default_rng(0)
    mute = [query.text for query, intent in queries if intent in HARD and rng.random() < 0.3]
    refusals = ("I'm sorry, but I cannot help with that.", "   ")
    world.frontier.says = {text: refusals[i % 2] for i, text in enumerate(mute)}
    serve(loop, queries)
    world.frontier.says.clear()
    (taught,) = loop.round().students
    assert taught.dropped["refusal"] > 0 and taught.dropped["empty"] > 0
    lessons = read_lessons(loop.folder / "rounds" / "0001" / "lessons-small.jsonl")
    assert {lesson.answer for lesson in lessons} <= {intent for _, intent in queries}


def test_a_frontier_that_only_refuses_teaches_nothing(world):
    loop = world.loop()
    queries = traffic(600, seed=2)
    world.frontier.says = {query.text: "I cannot answer that." for query, _ in queries}
    serve(loop, queries)
    done = loop.round()
    assert done.promoted is None
    assert "none can be taught" in done.refusals[0] and "refusal" in done.refusals[0]


def test_one_giant_cluster_is_a_cluster(world):
    loop = world.loop(promise=PROMISE)
    rng = np.random.default_rng(0)
    same = " ".join(word("hard-1", i) for i in range(3))
    asked = [
        (Query(f"{same} {word('', rng.integers(40))} {word('n', i)}", "intent", f"x{i}"), "hard-1") for i in range(600)
    ]
    world.release = Release.frontier_only(portfolio(), ("intent",))
    loop = world.loop(promise=PROMISE)
    serve(loop, asked)
    (taught,) = loop.round().students
    assert taught.clusters and 0 < sum(cluster.lessons for cluster in taught.clusters) <= taught.lessons


def test_options_may_not_change_within_a_round(world):
    loop = world.loop()
    serve(loop, traffic(800, seed=2))
    world.frontier.fails = True
    with pytest.raises(TierError):
        loop.round()
    world.frontier.fails = False
    with pytest.raises(DataError, match="begun with other options"):
        world.loop(judged=7).round()
    # how fast it is asked is nobody's affair
    assert world.loop(workers=2).round().number == 1


def test_two_rounds_at_once_are_refused(world):
    loop = world.loop()
    serve(loop, traffic(800, seed=2))
    asked = []

    def meanwhile(call: Call) -> Completion:
        if not asked:
            asked.append(call)
            with pytest.raises(DataError, match="running in another process"):
                loop.round()
        return world.frontier(call)

    DistillationLoop(loop.folder, world.store, {SMALL: world.small, BIG: meanwhile}, options=loop.options).round()
    assert asked


def test_bad_beginnings_are_told(world, tmp_path):
    tiers = {SMALL: world.small, BIG: world.frontier}
    with pytest.raises(DataError, match="give the release"):
        DistillationLoop(tmp_path / "new", world.store, tiers)
    with pytest.raises(DataError, match="say what is to be kept"):
        DistillationLoop(tmp_path / "new", world.store, tiers, Release.frontier_only(portfolio()), LoopOptions())
    with pytest.raises(PortfolioError, match="small is missing"):
        DistillationLoop(tmp_path / "other", world.store, {BIG: world.frontier}, world.release)
    with pytest.raises(PortfolioError, match="cannot be a student"):
        DistillationLoop(tmp_path / "third", world.store, {SMALL: world.small, BIG: world.small}, world.release)
    with pytest.raises(PortfolioError, match="medium is not in the portfolio"):
        DistillationLoop(tmp_path / "fourth", world.store, {**tiers, "medium": world.small}, world.release)


def test_a_folder_of_another_portfolio_is_told(world):
    loop = world.loop()
    other = Release.frontier_only(Portfolio((Tier("a", 1, 1), Tier("b", 2, 2))))
    with pytest.raises(DataError, match="version 1, which serves, has another portfolio"):
        DistillationLoop(loop.folder, world.store, {"a": world.small, "b": world.frontier}, other, options())


def test_tiers_without_a_student_are_told(world):
    plain = {SMALL: world.small.tier, BIG: world.frontier}
    loop = DistillationLoop(world.folder / "d", world.store, plain, world.release, options())
    serve(loop, traffic(400, seed=2))
    with pytest.raises(DataError, match="no tier below the frontier can be taught; give one as a student"):
        loop.round()
    assert not (loop.folder / "rounds").exists()


def test_too_little_traffic_is_kept_for_later(world):
    loop = world.loop(gate=GateOptions(margin=0.05, fewest=200))
    serve(loop, traffic(800, seed=2))
    with pytest.raises(DataError, match=r"800 queries of 800 independent units, 1\d\d of which would judge"):
        loop.round()
    serve(loop, traffic(800, seed=3))
    done = loop.round()
    assert (done.number, done.queries) == (1, 1600)


def test_redacted_traffic_is_counted(tmp_path):
    with TraceStore(tmp_path / "plain.db") as store:
        world = World.begun(tmp_path, store)
    with TraceStore(tmp_path / "redacted.db", redact="drop") as store:
        world.store = store
        loop = world.loop()
        serve(loop, traffic(50, seed=2))
        with pytest.raises(DataError, match="50 left out: their words were not kept"):
            loop.round()


KILLED = """
import sys
from pathlib import Path
from routenlp_plugins import ClassifierStudent, Release, TraceStore
from worlds import BIG, SMALL, Frontier, World
folder = Path(sys.argv[1])
with TraceStore(folder / "traffic.db") as store:
    small = ClassifierStudent.load(folder / "small")
    world = World(folder, store, Frontier(), small, Release.load(folder / "first"))
    print("begun", flush=True)
    print(world.loop().round().promoted, flush=True)
"""


def test_killed_anywhere_the_old_release_serves_until_the_new_one_does(world):
    loop = world.loop()
    serve(loop, traffic(1000, seed=2))
    world.release.save(world.folder / "first")
    world.small.save(world.folder / "small")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    delays = iter((0.3, 0.6, 0.9, 1.3, 1.8, 2.4, 3.2))
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(world.folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(delay := next(delays, 60.0))
        if delay < 60:
            process.send_signal(signal.SIGKILL)
        promoted = process.stdout.read().strip()
        process.wait()
        process.stdout.close()
        serving = ReleaseRegistry(loop.folder).serving
        assert serving is not None and serving.release().policy.void is None
        answer = Dispatcher(serving.release(), {**serving.students(), BIG: world.frontier}).run(
            Query(question("known-1", np.random.default_rng(0)), "intent")
        )
        assert answer.text == "known-1"
        if promoted:
            break
    assert promoted == "2" and serving.number == 2


def test_versions_are_promoted_and_rolled_back(world):
    registry = ReleaseRegistry(world.folder / "versions")
    assert registry.serving is None and registry.versions == ()
    with pytest.raises(ReleaseError, match="there is nothing to return to"):
        registry.rollback()
    one = registry.add(world.release, {"a/b %": world.small}, "first")
    assert registry.serving is None
    registry.promote(one.number)
    two = registry.add(world.release, {"a/b %": student(seed=5)}, "second")
    assert registry.promote(two.number).number == registry.serving.number == 2
    assert list(registry.serving.students()) == ["a/b %"]
    assert registry.rollback().number == 1
    assert registry.serving.students()["a/b %"].model == world.small.model
    assert [(change["what"], change["version"]) for change in registry.changes] == [
        ("promoted", 1),
        ("promoted", 2),
        ("rolled back to", 1),
    ]
    with pytest.raises(ReleaseError, match="there is no version 7; versions: 1, 2"):
        registry.promote(7)


def test_a_version_that_was_edited_is_not_served(world):
    registry = ReleaseRegistry(world.folder / "versions")
    number = registry.add(world.release, {SMALL: world.small}, "first").number
    file = registry.version(number).folder / "students" / SMALL / "lessons.jsonl"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ReleaseError, match="missing, truncated or edited"):
        registry.promote(number)


class Forgetful:
    """A hosted model, as far as the loop can see: nobody knows which version answers. Taught, it forgets all else."""

    lessons = ()
    model = None

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, call):
        return Completion(self.answers(call), confidence=0.9, model="hosted")

    def taught(self, course, folder):
        folder.mkdir(parents=True, exist_ok=True)
        learned = {lesson.text: lesson.answer for lesson in course.lessons}
        return Forgetful(lambda call: learned.get(call.query.text, "nonsense"))

    def save(self, folder):
        raise AssertionError("a student that forgets everything must not be kept")


def test_a_student_without_a_known_version_is_not_judged_by_its_old_answers(world):
    old = world.small
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    (loop.folder / "rounds" / "0001").mkdir(parents=True)
    cut = {"seed": loop.options.seed, "shares": asdict(loop.options.shares), "options": loop.options.digests}
    begun = {"id": "x", "since": None, "until": time.time(), "version": 1, **cut}
    write_json(loop.folder / "rounds" / "0001" / "begun.json", begun)
    forgetful = Forgetful(lambda call: old(call).text)
    found = loop.work(1)
    told = teach(replace(found, tiers={SMALL: forgetful, BIG: world.frontier}), SMALL)
    assert told.verdict is not None and not told.verdict.promoted
    (untaught,) = [check for check in told.verdict.checks if check.about == "untaught"]
    assert untaught.old > 0.8 and untaught.new < 0.1


def test_a_rollback_during_a_round_stands(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    registry = loop.registry
    other = registry.add(world.release, {SMALL: world.small}, "an emergency")

    def meanwhile(call: Call) -> Completion:
        registry.promote(other.number)
        return world.frontier(call)

    tiers = {SMALL: world.small, BIG: meanwhile}
    done = DistillationLoop(loop.folder, world.store, tiers, options=loop.options).round()
    assert done.promoted is None and registry.serving.number == other.number
    assert "serves no longer, or was returned to" in done.refusals[-1]


def test_what_was_rolled_back_is_not_promoted_by_finishing_the_round(world):
    loop = world.loop()
    serve(loop, traffic(1600, seed=2))
    loop.round()
    (loop.folder / "rounds" / "0001" / "round.json").unlink()
    loop.registry.rollback()
    done = loop.round()
    assert done.promoted is None and loop.registry.serving.number == 1
    assert [version.number for version in loop.registry.versions] == [1, 2]


def test_a_task_that_nothing_fresh_speaks_of_is_refused():
    seen = np.zeros(400, dtype=np.intp), np.ones(400, dtype=bool)
    fresh = Fresh(["a"] * 400, *seen, [""] * 400, np.zeros(400), np.ones(400))
    assert judge(fresh, (0,), ("c",)).promoted
    (why,) = judge(fresh, (0,), ("c",), tasks=("a", "b")).refusals
    assert "task 'b': not shown" in why


def test_two_students_are_taught_in_one_round(tmp_path):
    three = (Tier(SMALL, usd_per_hour=0.001), Tier("middle", usd_per_hour=0.1), Tier(BIG, 2.5, 10))
    both = Portfolio(three, BIG, portfolio().tasks)
    with TraceStore(tmp_path / "t.db") as store:
        frontier, small, middle = Frontier(), student(), student(seed=4)
        release = Release.frontier_only(both, ("intent",))
        tiers = {SMALL: small, "middle": middle, BIG: frontier}
        how = options(promise=PROMISE, budget=Budget(80, usd=1))
        loop = DistillationLoop(tmp_path / "d", store, tiers, release, how)
        serve(loop, traffic(1600, seed=2))
        done = loop.round()
    assert {taught.tier for taught in done.students} == {SMALL, "middle"}
    assert done.promoted == 2 or "cost" in str(done.refusals)


def test_a_promise_of_another_kind_is_not_taken_over(world, tmp_path):
    certificate = replace(world.release.certificate, risk="selective violation")
    other = replace(world.release, certificate=certificate)
    with pytest.raises(DataError, match="promises a selective violation"):
        Promise.of(other, FitOptions())
    assert Promise.of(other, FitOptions(selective=True)).alpha == certificate.level


def test_rounds_that_share_delta_have_each_their_share(world):
    loop = world.loop(together=2)
    assert loop.options.promised(world.release, 1).delta == pytest.approx(0.05)
    with pytest.raises(DataError, match="2 rounds share delta, and all have had theirs"):
        loop.options.promised(world.release, 3)
    serve(loop, traffic(1600, seed=2))
    loop.round()
    # the second share is of the first promise, not of the share
    assert loop.work(1).options.promised(loop.serving.release(), 2).delta == pytest.approx(0.05)


def test_the_future_is_no_traffic(world):
    loop = world.loop()
    for bad in (time.time() + 3600, float("nan"), 0, True, "now"):
        with pytest.raises(DataError, match="until must be after the last round, and not in the future"):
            loop.round(until=bad)


def test_options_are_told_apart_by_what_they_do():
    def one(query, answer, reference):
        return 1.0

    def other(query, answer, reference):
        return 0.0

    class Validator:
        def __init__(self):
            self.lock = Lock()

        def __call__(self, query, answer):
            return True

    assert options(quality=one).digests != options(quality=other).digests
    checked = [options(filters=Filters(validators={"v": Validator()})).digests for _ in range(2)]
    assert checked[0] == checked[1] != options().digests
