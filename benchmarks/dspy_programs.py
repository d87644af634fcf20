"""Two DSPy programs over real tasks, before and after they are optimised over tiers.

Each is ``dspy.Predict`` on a signature: which of 77 intents a customer has (cs_intent), which of 17 kinds a clause is
(legal_clause). The frontier is the *reference frontier*: a scripted server that replays references, at 2.5 and 10 USD
per million tokens. Below it stand two students, linear classifiers of words and of characters, that
``dspy.BootstrapFinetune`` teaches what the frontier says to a part of the training rows. `RouterOptimizer` calibrates
on another part; test rows are only ever asked here. Students are priced by the time of this machine.

    python benchmarks/dspy_programs.py [TASK...]        ten minutes
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="dspy-")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy
import numpy as np

from dspy_routenlp import RouterModule, RouterOptimizer, decision_of, student_lm
from routenlp_plugins import ClassifierStudent, Lesson, Portfolio, Release, Task, Tier
from routenlp_plugins.testing import ScriptedServer

RESULTS = Path(__file__).parent / "results" / "dspy_programs.json"
SCRATCH = Path(__file__).parent / "scratch" / "dspy_programs"
SEEDS, RETENTION, DELTA = 3, 0.97, 0.1
GIVEN = 200
"""Rows that a student came with."""
SIZES = {"cs_intent": (4000, 2000, 1500), "legal_clause": (500, 500, 590)}
"""Rows taught, rows to calibrate on, rows of the test."""
ASKS = {
    "cs_intent": "Which intent does the customer's message have? One of: {}.",
    "legal_clause": "Which kind of clause is this? One of: {}.",
}
STUDENTS: Mapping[str, Any] = {"words": "word", "characters": "char_wb"}
FRONTIER = "reference-frontier"
Row = Mapping[str, str]


def main() -> None:
    logging.disable(logging.INFO)
    conditions = {"retention": RETENTION, "delta": DELTA, "given": GIVEN, "sizes": SIZES}
    known = json.loads(RESULTS.read_text())["programs"] if RESULTS.exists() else []
    found = [one for one in known if one["task"] not in (sys.argv[1:] or SIZES)]
    for task in sys.argv[1:] or SIZES:
        for seed in range(SEEDS):
            found.append(one(task, seed))
            print(json.dumps(found[-1]), flush=True)
    found.sort(key=lambda one: (one["task"], one["seed"]))
    RESULTS.write_text(json.dumps({"conditions": conditions, "programs": found}, indent=1) + "\n", encoding="utf-8")


def one(task: str, seed: int) -> dict[str, Any]:
    taught, calibration, test = SIZES[task]
    train, held_out = rows(task, "train"), rows(task, "test")
    rng = np.random.default_rng(seed)
    order = [train[place] for place in rng.permutation(len(train))]
    given, teach, val = np.split(np.arange(GIVEN + taught + calibration), [GIVEN, GIVEN + taught])
    asked = [held_out[place] for place in rng.permutation(len(held_out))[:test]]
    program = dspy.Predict(signature(task, train))
    scratch = SCRATCH / f"{task}-{seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    with ScriptedServer(replay([*train, *held_out])) as server:
        frontier = dspy.LM(f"openai/{FRONTIER}", api_base=server.url, api_key="none", cache=False, num_retries=0)
        tiers: dict[str, Any] = {}
        lessons = [lesson(order[place], task) for place in given]
        for name, analyzer in STUDENTS.items():
            student = ClassifierStudent.train(lessons, analyzer=analyzer, seed=seed)
            tiers[name] = taught_by(frontier, program, student_lm(student, scratch / name), examples(order, teach))
        teacher_usd = len(teach) * frontier_usd(frontier)
        tiers[FRONTIER] = frontier
        machine = {name: Tier(name, usd_per_hour=0.1) for name in STUDENTS}
        portfolio = Portfolio((*machine.values(), Tier(FRONTIER, 2.5, 10)), FRONTIER, (Task(task),))
        module = RouterModule(program, tiers, Release.frontier_only(portfolio))
        before = {
            name: measured(module.routed(Release.frontier_only(replace(portfolio, frontier=name))), asked)
            for name in tiers
        }
        made = RouterOptimizer(right, RETENTION, DELTA).compile(module, valset=examples(order, val))
        after = measured(made, asked)
    certificate = made.release.certificate
    always = before[FRONTIER]
    return {
        "task": task,
        "seed": seed,
        "only": {
            name: {"metric": of["metric"], "cost_ratio": of["usd"] / always["usd"]} for name, of in before.items()
        },
        "optimised": {
            "metric": after["metric"],
            "kept": after["metric"] / always["metric"],
            "cost_ratio": after["usd"] / always["usd"],
            "shares": after["shares"],
        },
        "certified": bool(certificate and certificate.certified),
        "frontier_usd_a_thousand": always["usd"] / len(asked) * 1e3,
        "teacher_usd": teacher_usd,
    }


def measured(module: RouterModule, asked: Sequence[Row]) -> dict[str, Any]:
    """Metric, USD and shares of a module over rows."""
    usd, good, shares = 0.0, 0.0, dict.fromkeys(module.tiers, 0)
    for row in asked:
        prediction = module(text=row["text"])
        trace = decision_of(prediction)
        assert trace is not None
        usd += trace.cost_usd or 0.0
        good += prediction.label == row["reference"]
        shares[trace.accepted.tier] += 1
    total = len(asked)
    return {"metric": good / total, "usd": usd, "shares": {name: n / total for name, n in shares.items()}}


def taught_by(frontier: dspy.LM, program: dspy.Predict, model: dspy.LM, trainset: list[dspy.Example]) -> dspy.LM:
    student, teacher = program.deepcopy(), program.deepcopy()
    student.set_lm(model)
    teacher.set_lm(frontier)
    made = dspy.BootstrapFinetune(metric=right, num_threads=2).compile(student, trainset=trainset, teacher=teacher)
    found: dspy.LM = made.lm
    return found


def frontier_usd(frontier: dspy.LM) -> float:
    """Mean price of the frontier's last calls."""
    usage = [entry["usage"] for entry in frontier.history[-200:]]
    return float(np.mean([(u["prompt_tokens"] * 2.5 + u["completion_tokens"] * 10) / 1e6 for u in usage]))


def signature(task: str, train: Sequence[Row]) -> type[dspy.Signature]:
    labels = ", ".join(sorted({row["reference"] for row in train}))
    made: type[dspy.Signature] = dspy.Signature("text -> label", ASKS[task].format(labels))
    return made


def right(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(prediction.label == example.label)


def examples(order: Sequence[Row], places: Any) -> list[dspy.Example]:
    chosen = [order[place] for place in places]
    return [dspy.Example(text=row["text"], label=row["reference"]).with_inputs("text") for row in chosen]


def answer(label: str) -> str:
    return f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]\n"


def lesson(row: Row, task: str) -> Lesson:
    return Lesson(row["query_id"], task, row["text"], answer(row["reference"]), "given")


ASKED = re.compile(r"\[\[ ## text ## \]\]\n(.*?)\n\nRespond with the corresponding output fields", re.DOTALL)


def replay(known: Sequence[Row]) -> Any:
    references = {row["text"].strip(): row["reference"] for row in known}

    def reply(request: Mapping[str, Any]) -> str:
        (text,) = ASKED.findall(request["messages"][-1]["content"])
        return answer(references[text.strip()])

    return reply


def rows(task: str, split: str) -> list[Row]:
    """Each text once: a text that is in both splits belongs to neither."""
    file = Path(os.environ["ROUTENLP_DATA"]) / "tasks" / f"{task}.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        every = [json.loads(line) for line in lines]
    seen: dict[str, set[str]] = {}
    for row in every:
        seen.setdefault(row["text"].strip(), set()).add(row["split"])
    once = {row["text"].strip(): row for row in every if seen[row["text"].strip()] == {split}}
    return list(once.values())


if __name__ == "__main__":
    main()
