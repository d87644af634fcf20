"""How long a fit and a decision take on one core, beside reading the outcomes in the same run.

Answers, confidences and costs are those of the synthetic population in `populations.py`; five tiers with joint
thresholds on 5,000 queries, four on 100,000. Each fit runs in a process of its own, whose peak of memory is told. The
decision is what the flow does between an answer and the next step, three rungs of a fitted policy, comparators apart.

    python benchmarks/speed.py
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from populations import OF_TIERS, only, synthetic

from routenlp_plugins import Completion, Portfolio, Query, Release, Task, Tier, fit
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow, outcome_line, read_outcomes
from routenlp_plugins.evaluate.table import TaskTable
from routenlp_plugins.flow import route

FITS = {"5,000 queries x 5 tiers": (5_000, 5), "100,000 queries x 4 tiers": (100_000, 4)}
DECISIONS = 20_000
ANSWERS = ("yes", "no", "perhaps", "never")


def main() -> None:
    results: dict[str, object] = {}
    with TemporaryDirectory() as scratch:
        for name, (n, tiers) in FITS.items():
            folder = Path(scratch) / str(n)
            folder.mkdir()
            with get_context("spawn").Pool(1) as pool:
                results[name] = pool.apply(measured, (n, tiers, str(folder)))
            print(name, results[name], flush=True)
        results["decision after a call"] = decision(Release.load(Path(scratch) / "5000" / "release"))
    print(results["decision after a call"])
    file = Path(__file__).parent / "results" / "speed.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measured(n: int, tiers: int, folder: str) -> dict[str, float]:
    """Seconds and memory of a fit of the outcomes in a file."""
    file = Path(folder) / "outcomes.jsonl"
    table = synthetic(5, n)
    if tiers < 5:
        table = only(table, tuple(table.tiers[i] for i in OF_TIERS[5][: tiers - 1]))
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(outcome_line(row) + "\n" for row in rows_of(table))
    names = table.tiers
    del table
    start = perf_counter()
    rows = read_outcomes(file)
    reading = perf_counter() - start
    portfolio = Portfolio(tuple(Tier(name, version="1") for name in names), names[-1], (Task("synthetic"),))
    start = perf_counter()
    release = fit(rows, portfolio, alpha=0.05)
    seconds = perf_counter() - start
    release.save(Path(folder) / "release")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "fit_s": round(seconds, 2),
        "ratio_to_reading": round(seconds / reading, 2),
        "peak_gb": round(peak, 2),
        "cost_ratio": round(release.certificate.proofs[0].cost_ratio or 1.0, 3) if release.certificate else 1.0,
    }


def rows_of(table: TaskTable) -> Sequence[OutcomeRow]:
    """The table as outcomes: tiers that agree give the same answer."""
    below = table.tiers[:-1]
    rng = np.random.default_rng(1)
    rows = []
    for i in range(len(table)):
        outcomes = {}
        for k, name in enumerate(table.tiers):
            good = bool(table.quality[i, k])
            sure = float(table.evidence[name, "confidence"][i]) if name in below else None
            text = "right" if good else ANSWERS[rng.integers(len(ANSWERS))]
            done = Completion(text, confidence=sure, cost_usd=float(table.cost[i, k]), model=name)
            outcomes[name] = Outcome(float(good), done)
        words = " ".join(f"w{word}" for word in rng.integers(500, size=12))
        rows.append(OutcomeRow(Query(words, "synthetic", f"q{i}"), outcomes))
    return rows


def decision(release: Release) -> dict[str, float]:
    """Microseconds of the flow between an answer and the next step."""
    rungs = release.policy.ladders["synthetic"]
    rng = np.random.default_rng(2)
    times: list[float] = []
    start = perf_counter()
    for _ in range(DECISIONS):
        np.linalg.norm(ANSWER_VECTOR)
    reference = (perf_counter() - start) / DECISIONS * 1e6
    for _ in range(DECISIONS):
        flow = route(release.policy, Query(TEXT, "synthetic"))
        step = next(flow)
        try:
            while True:
                sure = float(rng.random())
                completion = Completion(ANSWERS[int(4 * sure)], confidence=sure, cost_usd=1.0, model=step.tier)
                start = perf_counter()
                step = flow.send(completion)
                times.append((perf_counter() - start) * 1e6)
        except StopIteration:
            times.append((perf_counter() - start) * 1e6)
    return {
        "rungs": len(rungs),
        "median_us": round(median(times), 1),
        "p99_us": round(float(np.quantile(times, 0.99)), 1),
        "norm_of_1000_us": round(reference, 2),
    }


ANSWER_VECTOR = np.ones(1000)
TEXT = " ".join(f"w{i}" for i in range(12))

if __name__ == "__main__":
    main()
