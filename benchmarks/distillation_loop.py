"""The loop on cs_intent: rounds 0 to 3, a poisoned round, a round killed again and again, and how long a round takes.

    ROUTENLP_DATA=... python benchmarks/distillation_loop.py [rounds | poison | crash | speed | lora]...   half an hour

The promise is alpha = 0.05 with delta = 0.1 for every release. The frontier replays references.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from local_tiers import HERE, SCRATCH
from teaching import FRONTIER, STUDENT, Row, Setting, queries, rows_of, setting

from routenlp_plugins import (
    Budget,
    Call,
    ClassifierStudent,
    Completion,
    Dispatcher,
    DistillationLoop,
    GateOptions,
    LoopOptions,
    LoRAStudent,
    LoRATraining,
    Promise,
    Query,
    Release,
    ReleaseRegistry,
    Shares,
    StaticEmbeddings,
    TraceStore,
    base_from_gguf,
    fit,
    replay,
)
from routenlp_plugins.distill.registry import Version
from routenlp_plugins.evaluate.outcomes import OutcomeRow
from routenlp_plugins.tiers.llama_cpp import smollm2_path

RESULTS = HERE / "results" / "distillation_loop.json"
ALPHA, DELTA, SEED = 0.05, 0.1, 0
FIRST, TRAFFIC, ROUNDS, LESSONS = 1500, 2500, 3, 300
PAPER = {"cost_ratio": [0.203, 0.178, 0.163, 0.159], "quality": [0.961, 0.964, 0.969, 0.971]}
REPEATS = 3
KILLS = 60
POISONED = 7000
"""Queries of the poisoned round: with a third of them, and 300 lessons, the harm is too small to be found."""


def main() -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for what in sys.argv[1:] or PARTS:
        known[what] = PARTS[what]()
        print(json.dumps(known[what], indent=1), flush=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def options(**changes: Any) -> LoopOptions:
    """Set before anything was looked at; the gate gets more of the traffic than by default, since there is little."""
    return replace(
        LoopOptions(
            shares=Shares(teaching=0.4, gate=0.3),
            budget=Budget(LESSONS),
            gate=GateOptions(margin=0.05),
            encoder=StaticEmbeddings.wordllama(),
            usd_per_hour=0.1,
            progress=False,
        ),
        **changes,
    )


def world(size: int = FIRST + ROUNDS * TRAFFIC) -> tuple[Setting, ClassifierStudent]:
    of = setting("cs_intent", SEED, traffic=size, calibration=0, test=3080)
    return of, ClassifierStudent.train(of.lessons, seed=SEED)


def answered(student: Callable[[Call], Completion], of: Setting, rows: Sequence[Row]) -> list[OutcomeRow]:
    said = [replace(student(Call(STUDENT, query)), latency_ms=1.0) for query in queries(rows, of.task)]
    return rows_of(of, rows, said)


def first_release(of: Setting, student: ClassifierStudent) -> Release:
    return fit(answered(student, of, of.traffic[:FIRST]), of.portfolio, alpha=ALPHA, delta=DELTA, seed=SEED)


def serve(loop: DistillationLoop, of: Setting, rows: Sequence[Row]) -> None:
    dispatcher = Dispatcher(loop.serving.release(*loop.options.encoders), loop.tiers, listeners=[loop.store.record])
    for query in queries(rows, of.task):
        dispatcher.run(query)
    loop.store.flush()


def measured(loop: DistillationLoop, of: Setting) -> dict[str, Any]:
    """What the version that serves does on the test split."""
    done = replay(answered(loop.serving.students()[STUDENT], of, of.test), loop.serving.release(*loop.options.encoders))
    names = ("cost_ratio", "quality_ratio", "tier_share", "escalation_rate", "violation_rate")
    return {name: getattr(done, name) for name in names} | {"queries": done.queries}


def rounds() -> dict[str, Any]:
    """Several times: traces have new names each time, and with them certification draws other rows."""
    runs = [one_run() for _ in range(REPEATS)]
    names = ("cost_ratio", "quality_ratio", "violation_rate")
    means = {name: [_mean([run[k][name] for run in runs]) for k in range(ROUNDS + 1)] for name in names}
    shares = [_mean([run[k]["tier_share"][STUDENT] for run in runs]) for k in range(ROUNDS + 1)]
    costs = [sorted(round(run[k]["cost_ratio"], 4) for run in runs) for k in range(ROUNDS + 1)]
    return {"paper": PAPER, "mean": {**means, "student_share": shares}, "cost_ratios": costs, "runs": runs}


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def one_run() -> list[dict[str, Any]]:
    of, student = world()
    with TemporaryDirectory() as folder, TraceStore(Path(folder) / "traffic.db") as store:
        tiers: dict[str, Any] = {STUDENT: student, FRONTIER: by_text(of)}
        loop = DistillationLoop(Path(folder) / "loop", store, tiers, first_release(of, student), options())
        told: list[dict[str, Any]] = [{"round": 0, **measured(loop, of)}]
        for number in range(ROUNDS):
            serve(loop, of, of.traffic[FIRST + number * TRAFFIC :][:TRAFFIC])
            done = loop.round()
            told.append(
                {
                    "round": done.number,
                    **measured(loop, of),
                    "promoted": done.promoted,
                    "refusals": done.refusals,
                    "certified": done.certified,
                    "lessons": done.students[0].lessons,
                    "already_paid": done.students[0].already_paid,
                    "spent_usd": round(done.bill.total, 4),
                    "break_even": done.break_even,
                    "seconds": round(done.seconds, 1),
                }
            )
    return told


def poison() -> dict[str, Any]:
    """A tenth of the recorded answers, of eight intents that lie together, say another intent."""
    of, student = world(FIRST + POISONED)
    victims, wrong = _alike(of)
    traffic = of.traffic[FIRST:]
    flipped = {row["query_id"] for row in traffic if row["reference"] in victims}
    true, texts = by_text(of), {row["text"] for row in traffic if row["query_id"] in flipped}

    def lying(call: Call) -> Completion:
        answer = true(call)
        return replace(answer, text=wrong) if call.query.text in texts else answer

    told: dict[str, Any] = {"victims": sorted(victims), "said_instead": wrong, "share": len(flipped) / len(traffic)}
    for name, frontier in (("clean", true), ("poisoned", lying)):
        with TemporaryDirectory() as folder, TraceStore(Path(folder) / "traffic.db") as store:
            # what judges is answered by a frontier that is itself again
            tiers: dict[str, Any] = {STUDENT: student, FRONTIER: true}
            loop = DistillationLoop(
                Path(folder) / "loop",
                store,
                tiers,
                first_release(of, student),
                options(ask_again=True, judged=2000, budget=Budget(1000)),
            )
            before = measured(loop, of)
            dispatcher = Dispatcher(
                loop.serving.release(), {STUDENT: student, FRONTIER: frontier}, listeners=[store.record]
            )
            for query in queries(traffic, of.task):
                dispatcher.run(query)
            done = loop.round()
            new = ClassifierStudent.load(loop.folder / "rounds" / "0001" / "students" / STUDENT)
            mine = [row for row in of.test if row["reference"] in victims]
            told[name] = {
                "lessons": done.students[0].lessons,
                "of_victims": sum(lesson.text in texts for lesson in new.lessons),
                "promoted": done.promoted,
                "refusals": done.refusals,
                "before": before,
                "after": measured(loop, of),
                "victims_right_before": _right(student, mine),
                "victims_right_had_it_been_promoted": _right(new, mine),
                "victims_right_of_what_serves": _right(loop.serving.students()[STUDENT], mine),
            }
    return told


def _right(student: Any, rows: Sequence[Row]) -> float:
    return float(np.mean([student(Call(STUDENT, Query(row["text"]))).text == row["reference"] for row in rows]))


def _alike(of: Setting) -> tuple[set[str], str]:
    """Eight intents whose middles lie nearest to that of the first one, and the one that lies next."""
    encoder = StaticEmbeddings.wordllama()
    names = sorted({row["reference"] for row in of.given})
    vectors = encoder([row["text"] for row in of.given])
    labels = np.array([row["reference"] for row in of.given])
    middles = np.stack([vectors[labels == name].mean(axis=0) for name in names])
    # of an intent that the student was taught well
    start = next(i for i, name in enumerate(names) if (labels == name).sum() > 2)
    near = np.argsort(-(middles @ middles[start]), kind="stable")
    return {names[i] for i in near[:8]}, names[near[8]]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from distillation_loop import *
folder = Path(sys.argv[1])
of, _ = world(FIRST + TRAFFIC)
student = ClassifierStudent.load(folder / "student")
with TraceStore(folder / "traffic.db") as store:
    loop = DistillationLoop(folder / "loop", store, {STUDENT: student, FRONTIER: by_text(of)}, options=options())
    print("begun", flush=True)
    print(loop.round().promoted, flush=True)
"""


def by_text(of: Setting) -> Callable[[Call], Completion]:
    """The frontier for queries that are known by their traces."""
    ids = {row["text"]: row["query_id"] for row in (*of.traffic, *of.test)}
    return lambda call: of.frontier(replace(call, query=replace(call.query, id=ids[call.query.text])))


def crash() -> dict[str, Any]:
    """Kill -9 in every step of a round; each time, what serves must be whole and answer as before."""
    of, student = world(FIRST + TRAFFIC)
    died: dict[str, int] = dict.fromkeys(STEPS, 0)
    finished = broken = 0
    rng = random.Random(SEED)
    with TemporaryDirectory() as name:
        folder = Path(name)
        student.save(folder / "student")
        with TraceStore(folder / "traffic.db") as store:
            tiers: dict[str, Any] = {STUDENT: student, FRONTIER: by_text(of)}
            loop = DistillationLoop(folder / "loop", store, tiers, first_release(of, student), options())
            serve(loop, of, of.traffic[FIRST:])
        kept = folder / "kept"
        subprocess.run(["cp", "-r", folder / "loop", kept], check=True)
        while min(died.values()) < KILLS // len(STEPS):
            subprocess.run(["rm", "-rf", folder / "loop"], check=True)
            subprocess.run(["cp", "-r", kept, folder / "loop"], check=True)
            told = ""
            # each process goes on where the one before was killed, until one comes to the end
            for step in [*STEPS, ""]:
                told = killed(folder, step, rng)
                if not told:
                    died[reached(folder / "loop")] += 1
                version = ReleaseRegistry(folder / "loop").serving
                broken += version is None or not as_it_was(version, student)
            finished += bool(told)
    return {
        "kills": sum(died.values()),
        "died_in": died,
        "rounds_finished_after": finished,
        "serving_not_whole": broken,
    }


def as_it_was(version: Version, student: ClassifierStudent) -> bool:
    """Whether a version is whole, and the first one what it was."""
    same = version.number > 1 or version.students()[STUDENT].model == student.model
    return version.release().policy.void is None and same


STEPS = ("harvest", "choosing lessons", "training", "judging", "calibration", "promotion")
ROUND = Path("rounds") / "0001"
FILES = {
    "harvest": ROUND / "traffic.jsonl",
    "choosing lessons": ROUND / f"lessons-{STUDENT}.json",
    "training": ROUND / "students" / STUDENT / "student.json",
    "judging": ROUND / f"taught-{STUDENT}.json",
    "calibration": ROUND / "certified.json",
    "promotion": ROUND / "round.json",
}
"""Step of a round -> what is there at its end."""


def reached(loop: Path) -> str:
    """The step that a round is at."""
    return next((step for step in STEPS if not (loop / FILES[step]).exists()), "promotion")


def killed(folder: Path, step: str, rng: random.Random) -> str:
    """What a round says at its end; nothing if it is killed within a step before that."""
    command = [sys.executable, "-c", CHILD, str(folder), str(HERE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    process.stdout.readline()
    if step:
        while process.poll() is None and STEPS.index(reached(folder / "loop")) < STEPS.index(step):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
    told = process.stdout.read().strip()
    process.wait()
    process.stdout.close()
    return told


def speed() -> dict[str, Any]:
    """A round over 10,000 traces."""
    of, student = world(9000)
    rows = [*of.traffic, *of.test][:10000]
    with TemporaryDirectory() as folder, TraceStore(Path(folder) / "traffic.db") as store:
        tiers: dict[str, Any] = {STUDENT: student, FRONTIER: by_text(of)}
        loop = DistillationLoop(
            Path(folder) / "loop", store, tiers, first_release(of, student), options(shares=Shares())
        )
        serve(loop, of, rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        done = loop.round()
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "traces": len(rows),
        "seconds": round(seconds, 1),
        "of_them_training": round(done.students[0].seconds, 1),
        "promoted": done.promoted,
        "peak_gb": round(peak / 1e6, 2),
        "peak_gb_before": round(before / 1e6, 2),
    }


def lora() -> dict[str, Any]:
    """A round that teaches SmolLM2 400 lessons, from nothing."""
    SCRATCH.mkdir(exist_ok=True)
    base = base_from_gguf(smollm2_path(), SCRATCH / "smollm2")
    of, _ = world(1600)
    student = LoRAStudent(base, training=LoRATraining(epochs=2, longest=320), most=12)
    with TemporaryDirectory() as folder, TraceStore(Path(folder) / "traffic.db") as store:
        tiers: dict[str, Any] = {STUDENT: student, FRONTIER: by_text(of)}
        small = {"budget": Budget(400), "judged": 100, "certified": 200, "promise": Promise(alpha=ALPHA, delta=DELTA)}
        loop = DistillationLoop(
            Path(folder) / "loop", store, tiers, Release.frontier_only(of.portfolio), options(**small)
        )
        serve(loop, of, of.traffic)
        begun = time.perf_counter()
        done = loop.round()
        seconds = time.perf_counter() - begun
    told = done.students[0]
    return {
        "traces": len(of.traffic),
        "lessons": told.lessons,
        "minutes": round(seconds / 60, 1),
        "of_them_training": round(told.seconds / 60, 1),
        "judged": small["judged"],
        "certified_on": small["certified"],
        "promoted": done.promoted,
        "refusals": done.refusals,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "rounds": rounds,
    "poison": poison,
    "crash": crash,
    "speed": speed,
    "lora": lora,
}

if __name__ == "__main__":
    main()
