"""Show 1 with SmolLM2 and LoRA: what each way to choose lessons saves, at equal certified retention.

    ROUTENLP_DATA=... python benchmarks/distillation_lora.py [TASK...]     hours: twenty trainings on a processor
    python benchmarks/distillation_lora.py table                           what is there already, with intervals

Every arm leaves a file in scratch/lora and one line in results/distillation_lora.json; what is there is not done again.
A certificate on 350 rows moves by tenths from one to the next. So beside the certified cost the table has the cost in
hindsight: that of the threshold on the student's log-probability that keeps the promise on the test rows themselves,
which no arm could have known, and the difference from no loop by bootstrap over queries.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from local_tiers import HERE, SCRATCH
from numpy.typing import NDArray
from teaching import RETENTION, Setting, costs, fitted, lessons, queries, rows_of, setting

from routenlp_plugins import Completion, Course, Release
from routenlp_plugins.distill.causal import base_from_gguf
from routenlp_plugins.distill.dataset import rehearsal
from routenlp_plugins.distill.lora import LoRAStudent
from routenlp_plugins.distill.training import LoRATraining
from routenlp_plugins.evaluate.outcomes import OutcomeRow
from routenlp_plugins.tiers.llama_cpp import smollm2_path

RESULTS = HERE / "results" / "distillation_lora.json"
ARMS = ("none", "random", "uncertainty", "size x gap", "coverage")
SEEDS, BUDGET, BATCH = 2, 150, 16
SIZES = {"traffic": 1000, "calibration": 700, "test": 600}
TOKENS = {"cs_intent": 12, "cs_response": 40}
GIVEN = LoRATraining(epochs=3, longest=320)
TAUGHT = LoRATraining(epochs=2, longest=320)


def main() -> None:
    if sys.argv[1:] == ["table"]:
        table()
        return
    SCRATCH.mkdir(exist_ok=True)
    base = base_from_gguf(smollm2_path(), SCRATCH / "smollm2")
    for seed in range(SEEDS):
        for task in sys.argv[1:] or ("cs_intent", "cs_response"):
            of = setting(task, seed, **SIZES)
            folder = SCRATCH / "lora" / f"{task}-{seed}"
            first = LoRAStudent(base, training=GIVEN, most=TOKENS[task]).taught(
                Course(of.lessons, seed=seed), folder / "none"
            )
            answered = {part: answers(first, of, part, folder / "none") for part in ("calibration", "test", "traffic")}
            release = fitted(of, answered["calibration"], seed)
            keep(task, seed, "none", of, answered, release, {})
            for arm in ARMS[1:]:
                if not done(task, seed, arm):
                    teach(of, first, answered["traffic"], release, arm, seed, folder / arm.replace(" ", "-"))


def teach(
    of: Setting, first: LoRAStudent, traffic: list[OutcomeRow], release: Release, arm: str, seed: int, folder: Path
) -> None:
    chosen, usd = lessons(of, traffic, release, arm, BUDGET, seed)
    begun = time.perf_counter()
    student = LoRAStudent(first.base, first.adapter, TAUGHT, most=first.most, lessons=first.lessons)
    again = rehearsal(of.lessons, BUDGET, seed)
    new = student.taught(Course(chosen, again, seed), folder)
    seconds = time.perf_counter() - begun
    found = {part: answers(new, of, part, folder) for part in ("calibration", "test")}
    facts = {"lessons": len(chosen), "teacher_usd": usd, "seconds": round(seconds)}
    keep(of.task, seed, arm, of, found, fitted(of, found["calibration"], seed), facts)


def answers(student: LoRAStudent, of: Setting, part: str, folder: Path) -> list[OutcomeRow]:
    """What a student says to a part of a setting, from a file if it is there."""
    rows, file = getattr(of, part), folder / f"{part}.json"
    if not file.exists():
        begun = time.perf_counter()
        said = student.answers(queries(rows, of.task), BATCH)
        each = (time.perf_counter() - begun) / len(rows) * 1e3
        kept = [(a.text, a.token_logprobs, a.input_tokens, a.output_tokens, each) for a in said]
        scratch = file.with_suffix(".new")
        scratch.write_text(json.dumps(kept))
        scratch.replace(file)
    made = [_completion(*one) for one in json.loads(file.read_text())]
    return rows_of(of, rows, made)


def _completion(text: str, logprobs: list[float] | None, read: int, said: int, latency: float) -> Completion:
    mean = sum(logprobs) / len(logprobs) if logprobs else None
    each = tuple(logprobs) if logprobs else None
    return Completion(
        text, mean_logprob=mean, token_logprobs=each, input_tokens=read, output_tokens=said, latency_ms=latency
    )


def known() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["arms"] if RESULTS.exists() else []


def done(task: str, seed: int, arm: str) -> bool:
    return any((one["task"], one["seed"], one["arm"]) == (task, seed, arm) for one in known())


def keep(
    task: str,
    seed: int,
    arm: str,
    of: Setting,
    answered: Mapping[str, list[OutcomeRow]],
    release: Release,
    facts: dict[str, Any],
) -> None:
    if done(task, seed, arm):
        return
    test = answered["test"]
    usd, always = costs(of, test, release)
    quality = quality_of(test)
    below = usd < always
    line = {
        "task": task,
        "seed": seed,
        "arm": arm,
        **facts,
        "cost_ratio": float(usd.sum() / always.sum()),
        "kept": float(np.where(below, quality, 1.0).mean()),
        "student_quality": float(quality.mean()),
        "certified": bool(release.certificate and release.certificate.certified),
        # enough to draw queries again, and to ask for other promises: costs in units of the frontier's mean
        "cost": [round(float(c), 4) for c in usd / always.mean()],
        "always": [round(float(c), 4) for c in always / always.mean()],
        "quality": [round(float(q), 3) for q in quality],
        "logprob": [round(row.outcomes["student"].completion.mean_logprob or 0.0, 4) for row in test],
    }
    lists = ("cost", "always", "quality", "logprob")
    print({name: value for name, value in line.items() if name not in lists}, flush=True)
    order = sorted([*known(), line], key=lambda one: (one["task"], one["seed"], ARMS.index(one["arm"])))
    conditions = {"budget": BUDGET, "retention": RETENTION, "delta": 0.1, **SIZES}
    text = ",\n  ".join(json.dumps(one) for one in order)
    RESULTS.write_text(f'{{"conditions": {json.dumps(conditions)}, "arms": [\n  {text}\n]}}\n')


def table() -> None:
    """Certified and hindsight cost of each arm; what it saves against no loop, of drawn queries, 95 % interval."""
    rng = np.random.default_rng(0)
    plain = {(one["task"], one["seed"]): one for one in known() if one["arm"] == "none"}
    for one in known():
        before = plain[one["task"], one["seed"]]
        n = len(one["cost"])
        draws = [rng.integers(0, n, n) for _ in range(1000)]
        saved = np.array([hindsight(before, draw) - hindsight(one, draw) for draw in draws])
        low, high = np.quantile(saved, [0.025, 0.975])
        name = f"{one['task']} {one['seed']} {one['arm']:12}"
        costs_ = f"certified {one['cost_ratio']:.3f} hindsight {hindsight(one, np.arange(n)):.3f}"
        print(
            f"{name} {costs_} saved {saved.mean():+.3f} ({low:+.3f} to {high:+.3f}) USD {one.get('teacher_usd', 0):.3f}"
        )


def hindsight(arm: Mapping[str, Any], rows: NDArray[np.intp]) -> float:
    """Cost ratio of the lowest threshold on the log-probability that keeps the promise on these rows."""
    cost, always, quality, logprob = (np.array(arm[n])[rows] for n in ("cost", "always", "quality", "logprob"))
    own = np.where(cost < always, cost, cost - always)
    order = np.argsort(-logprob, kind="stable")
    kept = np.cumsum(1 - quality[order]) <= (1 - RETENTION[arm["task"]]) * len(rows)
    saved = np.cumsum(always[order])[kept]
    return float((own.sum() + always.sum() - (saved.max() if len(saved) else 0.0)) / always.sum())


def quality_of(rows: list[OutcomeRow]) -> NDArray[np.float64]:
    return np.array([row.outcomes["student"].quality for row in rows], dtype=np.float64)


if __name__ == "__main__":
    main()
