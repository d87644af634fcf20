"""Show 1 with the classifier student: what each way to choose lessons saves, at equal certified retention.

ROUTENLP_DATA=... python benchmarks/distillation.py      about twenty minutes
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from local_tiers import HERE
from numpy.typing import NDArray
from teaching import ARMS, DELTA, RETENTION, Setting, costs, fitted, lessons, queries, rows_of, setting

from routenlp_plugins import ClassifierStudent, Completion
from routenlp_plugins.evaluate.outcomes import OutcomeRow

RESULTS = HERE / "results" / "distillation.json"
SEEDS, DRAWS = 5, 2000
BUDGETS = {"cs_intent": (75, 150, 300, 600), "legal_clause": (75, 150, 300)}
SIZES = {
    "cs_intent": {"traffic": 5000, "calibration": 3000, "test": 3080},
    "legal_clause": {"traffic": 550, "calibration": 550, "test": 614},
}
Costs = tuple[NDArray[np.float64], NDArray[np.float64]]


def main() -> None:
    begun = perf_counter()
    facts: dict[str, Any] = {"conditions": {"retention": RETENTION, "delta": DELTA, "seeds": SEEDS, "sizes": SIZES}}
    for task, budgets in BUDGETS.items():
        found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        for seed in range(SEEDS):
            of = setting(task, seed, **SIZES[task])
            first = ClassifierStudent.train(of.lessons, seed=seed)
            traffic = answered(first, of, "traffic")
            release = fitted(of, answered(first, of, "calibration"), seed)
            found["none", 0].append(measured(first, of, seed))
            for arm in ARMS[1:]:
                for budget in budgets:
                    chosen, usd = lessons(of, traffic, release, arm, budget, seed)
                    student = ClassifierStudent.train((*of.lessons, *chosen), seed=seed)
                    found[arm, budget].append({**measured(student, of, seed), "usd": usd, "lessons": len(chosen)})
                    print(task, seed, arm, budget, f"{ratio(found[arm, budget][-1]['costs']):.4f}", flush=True)
        facts[task] = [line(arm, budget, found) for arm, budget in found]
    facts["seconds"] = round(perf_counter() - begun)
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


def answered(student: ClassifierStudent, of: Setting, part: str) -> list[OutcomeRow]:
    asked = queries(getattr(of, part), of.task)
    labels, confidence = student.tier.predict([query.text for query in asked])
    # a thousandth of a second of a machine: what it takes one by one
    said = [Completion(t, confidence=c, latency_ms=1.0) for t, c in zip(labels, confidence, strict=True)]
    return rows_of(of, getattr(of, part), said)


def measured(student: ClassifierStudent, of: Setting, seed: int) -> dict[str, Any]:
    release = fitted(of, answered(student, of, "calibration"), seed)
    test = answered(student, of, "test")
    usd, always = costs(of, test, release)
    quality = np.array([row.outcomes["student"].quality for row in test], dtype=np.float64)
    kept = float(np.where(usd < always, quality, 1.0).mean())
    return {"costs": (usd, always), "kept": kept, "accuracy": float(quality.mean())}


def ratio(costs: Costs) -> float:
    return float(costs[0].sum() / costs[1].sum())


def line(arm: str, budget: int, found: dict[tuple[str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds; intervals at 95 % by drawing the test queries again."""
    mine, none = found[arm, budget], found["none", 0]
    random = found.get(("random", budget), none)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        places = [rng.integers(0, len(one["costs"][0]), len(one["costs"][0])) for one in none]
        drawn.append([_mean(of, places) for of in (mine, none, random)])
    means = np.array(drawn)
    saving, of_random = means[:, 1] - means[:, 0], means[:, 1] - means[:, 2]
    cost = float(np.mean([ratio(one["costs"]) for one in mine]))
    before, by_random = (float(np.mean([ratio(one["costs"]) for one in of])) for of in (none, random))
    facts: dict[str, Any] = {
        "arm": arm,
        "budget": budget,
        "cost_ratio": round(cost, 4),
        "cost_interval": _interval(means[:, 0]),
        "each_seed": [round(ratio(one["costs"]), 4) for one in mine],
        "kept": [round(one["kept"], 4) for one in mine],
        "accuracy": round(float(np.mean([one["accuracy"] for one in mine])), 4),
    }
    if arm != "none":
        facts |= {
            "saved": round(before - cost, 4),
            "saved_interval": _interval(saving),
            "times_random": round((before - cost) / (before - by_random), 2),
            "times_random_interval": _interval(saving / of_random),
            "teacher_usd": round(float(np.mean([one["usd"] for one in mine])), 4),
            "lessons": float(np.mean([one["lessons"] for one in mine])),
        }
    return facts


def _mean(of: Sequence[dict[str, Any]], places: Sequence[NDArray[np.intp]]) -> float:
    shares = [one["costs"][0][p].sum() / one["costs"][1][p].sum() for one, p in zip(of, places, strict=True)]
    return float(np.mean(shares))


def _interval(values: NDArray[np.float64]) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]


if __name__ == "__main__":
    Path(RESULTS.parent).mkdir(exist_ok=True)
    main()
