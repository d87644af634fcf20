"""What does validity cost? Cost of the certified policy against hindsight, against MAPIE and against no test.

For each number of labels in all (ordering 40 %, reporting 10 %, certification 50 %), draws with replacement from a
population, a whole fit on each. *Hindsight* is the cheapest policy that keeps the promise on the whole population, of
searches there over every set of tiers. *MAPIE* is its `BinaryClassificationController` on the same certification rows:
it controls P(accepted and bad) over thresholds of the cheap tier that is best on the ordering rows, by fixed-sequence
testing.

    ROUTENLP_DATA=... python benchmarks/power.py
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from guarantees import LEVELS, Tally, naive
from local_tiers import folds
from numpy.typing import NDArray
from populations import drawn, only, recorded, synthetic

from routenlp_plugins.cascade.candidate import Candidate
from routenlp_plugins.cascade.certification import Stream, certify
from routenlp_plugins.cascade.risks import Retention, Risk, Violation
from routenlp_plugins.cascade.search import task_paths
from routenlp_plugins.evaluate.table import TaskTable

DELTA, DRAWS, GRID = 0.1, 100, 50
LABELS = (500, 1000, 2000, 5000)


def main() -> None:
    tables = {
        "synthetic, 5 tiers": synthetic(5),
        "medmcqa, 3 tiers": recorded("medmcqa", 3),
        "cs_intent, 3 tiers": folds("cs_intent")[1],
        "legal_clause, 3 tiers": folds("legal_clause")[1],
    }
    jobs = []
    for name, table in tables.items():
        alpha, rho = LEVELS.get(name.split(",")[0], (0.05, 0.97))
        jobs += [(name, table, risk, n) for risk in (Violation(alpha), Retention(rho)) for n in LABELS]
    with get_context("fork").Pool(2) as pool:
        best = pool.starmap(hindsight, [(table, risk) for _, table, risk, n in jobs if n == LABELS[0]], chunksize=1)
        rows = pool.starmap(measured, jobs, chunksize=1)
    rows = [{**row, "hindsight": best[i // len(LABELS)]} for i, row in enumerate(rows)]
    file = Path(__file__).parent / "results" / "power.json"
    file.write_text(json.dumps({"delta": DELTA, "draws": DRAWS, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))


def measured(name: str, population: TaskTable, risk: Risk, n: int) -> dict[str, Any]:
    """Mean cost over the draws, and how many of them broke the promise."""
    warnings.simplefilter("ignore")  # MAPIE warns at each threshold that controls nothing
    rng = np.random.default_rng(n)
    everything = Stream({population.task: population})
    found = {way: Tally(risk) for way in ("certified", "naive", "mapie")}
    for _ in range(DRAWS):
        ordering = drawn(population, int(0.4 * n), rng)
        certification = drawn(population, int(0.5 * n), rng)
        stream = Stream({population.task: certification})
        paths = task_paths(ordering, risk)
        chosen, _ = certify(risk, [(stream, paths)], DELTA)
        points = [point for path in paths for point in path]
        found["certified"].add(everything, chosen)
        found["naive"].add(everything, naive(risk, points, stream))
        if isinstance(risk, Violation):
            candidate = mapie(ordering, certification, risk)
            found["mapie"].add(everything, {} if candidate is None else {population.task: candidate})
    ways = {way: tally.facts() for way, tally in found.items() if tally.cost}
    return {
        "population": name,
        "risk": risk.kind,
        "level": risk.level,
        "labels": n,
        **ways,
    }


def hindsight(population: TaskTable, risk: Risk) -> float:
    """Cost of the cheapest policy that keeps the promise on the whole population, searched over all sets of tiers."""
    everything = Stream({population.task: population})
    below = population.tiers[:-1]
    costs = []
    for of in chain.from_iterable(combinations(below, size) for size in range(1, len(below) + 1)):
        points = [point for path in task_paths(only(population, of), risk) for point in path]
        costs.append(everything.under(naive(risk, points, everything)).cost_ratio)
    return round(min(costs), 4)


def mapie(ordering: TaskTable, certification: TaskTable, risk: Violation) -> Candidate | None:
    """The cheapest threshold that MAPIE's controller finds valid, on the tier that is best on the ordering rows."""
    from mapie.risk_control import BinaryClassificationController, BinaryRisk

    tier = best_tier(ordering, risk)
    if tier is None:
        return None
    column, kind = tier
    score, bad = scores(certification, column, kind)
    grid = np.unique(np.quantile(scores(ordering, column, kind)[0], np.linspace(0, 1, GRID)))
    accepted_and_bad = BinaryRisk(
        lambda truth, accepted: (accepted == 1) & (truth == 1),
        lambda truth, accepted: np.ones_like(accepted, dtype=bool),
        higher_is_better=False,
    )
    controller = BinaryClassificationController(
        lambda x: np.column_stack([1 - x[:, 0], x[:, 0]]),
        accepted_and_bad,
        float(risk.level),
        confidence_level=1 - DELTA,
        best_predict_param_choice=accepted_and_bad,
        list_predict_params=grid,
        fwer_method="fixed_sequence",
    ).calibrate(score[:, None], bad.astype(int))
    valid = [float(value) for value in np.ravel(controller.valid_predict_params)]
    if not valid:
        return None
    return gated(certification, column, kind, min(valid))


def best_tier(ordering: TaskTable, risk: Violation) -> tuple[int, str] | None:
    """The cheap tier and kind of evidence with which one threshold is cheapest on the ordering rows."""
    best, least = None, float(ordering.cost[:, -1].mean())
    for column, tier in enumerate(ordering.tiers[:-1]):
        for kind in ordering.kinds(tier)[:1]:
            score, bad = scores(ordering, column, kind)
            order = np.argsort(-score)
            rate = np.cumsum(bad[order]) / len(score)
            accepted = int((rate <= risk.level).sum())
            cost = float(ordering.cost[:, column].mean() + (1 - accepted / len(score)) * ordering.cost[:, -1].mean())
            if accepted and cost < least:
                best, least = (column, kind), cost
    return best


def scores(table: TaskTable, column: int, kind: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(n,) evidence of a tier, missing as 0, and whether its answer is bad."""
    return np.nan_to_num(table.evidence[table.tiers[column], kind]), ~(table.good[:, column] == 1)


def gated(table: TaskTable, column: int, kind: str, threshold: float) -> Candidate:
    from routenlp_plugins.policy import Confidence, Rung

    tier = table.tiers[column]
    threshold = min(max(threshold - 1e-9, 0.0), 1.0)
    return Candidate((Rung(tier, threshold, (Confidence.plain(tier, kind),)),), "mapie")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| population | promise | labels | hindsight | certified (broken) | MAPIE (broken) | without a test (broken) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:

        def way(name: str, row: Mapping[str, Any] = row) -> str:
            return f"{row[name]['cost_ratio']:.3f} ({row[name]['violating']})" if name in row else ""

        cells = (row["population"], f"{row['risk']} {row['level']:g}", row["labels"], f"{row['hindsight']:.3f}")
        lines.append(f"| {' | '.join(map(str, (*cells, way('certified'), way('mapie'), way('naive'))))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
