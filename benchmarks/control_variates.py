"""How many labels could unlabelled traffic replace? The variance that confidences explain of what is tested.

A control variate (prediction-powered inference: Angelopoulos et al. 2023) that explains a share R2 of the variance of a
row's excess replaces at most that share of the labels. The policy is the cheapest on the population that is within
four fifths of the promise; R2 of the confidence of its answer is in sample, that of boosted trees over the confidences
at all steps cross-validated.

    ROUTENLP_DATA=... python benchmarks/control_variates.py
"""

from __future__ import annotations

import json

import numpy as np
from guarantees import LEVELS
from local_tiers import HERE, folds
from populations import recorded, synthetic
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import cross_val_score

from routenlp_plugins.cascade.calibration import confidences
from routenlp_plugins.cascade.candidate import Candidate
from routenlp_plugins.cascade.ladders import best_answer
from routenlp_plugins.cascade.risks import Answered, Retention, Risk, Violation
from routenlp_plugins.cascade.search import task_paths
from routenlp_plugins.evaluate.table import TaskTable

SLACK = 0.2


def main() -> None:
    populations = {
        "cs_intent": folds("cs_intent")[1],
        "legal_risk": folds("legal_risk")[1],
        "medmcqa": recorded("medmcqa", 3),
        "synthetic": synthetic(3, 5000),
    }
    rows = []
    for name, population in populations.items():
        alpha, rho = LEVELS.get(name, (0.05, 0.97))
        for risk in (Violation(alpha), Retention(rho)):
            linear, boosted = explained(population, risk)
            rows.append({"population": name, "risk": risk.kind, "confidence": linear, "boosted": boosted})
            print(f"{name}, {risk.kind}: R2 {linear} of its confidence, {boosted} of boosted trees")
    (HERE / "results" / "control_variates.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def explained(population: TaskTable, risk: Risk) -> tuple[float, float]:
    candidate = within(population, risk)
    column, cost = candidate.climb(population)
    judged = [[(c.tier, confidences(population, c)) for c in rung.confidences] for rung in candidate.rungs]
    best = [best_answer(population, of) for of in judged if of]
    seen = np.column_stack([confidence for _, confidence in best])
    given = np.column_stack([np.where(tier == column, confidence, 0.0) for tier, confidence in best])
    rows = Answered.of(population, column, cost)
    of_answer = np.where(rows.below, given.max(axis=1), 1.0)
    excess = risk.excess(rows)
    own = np.column_stack([np.where(rows.below, 1 - of_answer, 0.0), rows.below])
    everything = np.column_stack([np.nan_to_num(seen, neginf=-1.0), column])
    trees = HistGradientBoostingRegressor(max_depth=3, max_iter=60)
    boosted = cross_val_score(trees, everything, excess, cv=5, scoring="r2").mean()
    return round(float(LinearRegression().fit(own, excess).score(own, excess)), 3), round(float(boosted), 3)


def within(population: TaskTable, risk: Risk) -> Candidate:
    """The cheapest cascade of the search on the whole population that leaves some slack."""
    _, cascades = task_paths(population, risk)
    unit = min(risk.level, 1 - risk.level)
    safe = [point for point in cascades if point.excess <= -SLACK * unit]
    return min(safe, key=lambda point: point.cost).candidates[population.task]


if __name__ == "__main__":
    main()
