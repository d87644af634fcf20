"""The violation rate by the number of labels: the experiment of RouteNLP's appendix D, as a mean over resamples.

Six tasks, alpha = 5 %. Candidates are ordered on fold A; n labels are drawn from fold B with replacement, 200 times;
what is chosen with them is judged on the whole of fold B. *Tested* is what `fit` does (Learn then Test, delta = 10 %):
few draws may be above alpha. *Conformal risk control* promises the mean only. *Without a test* is the cheapest policy
that keeps alpha on the n labels themselves.

    python benchmarks/calibration_size.py     needs no data beside tables/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np
from local_tiers import HERE, TASKS, folds
from numpy.typing import NDArray
from populations import drawn

from routenlp_plugins.cascade.bounds import conformal_risk_control, monotonized
from routenlp_plugins.cascade.certification import Stream, certify
from routenlp_plugins.cascade.risks import Violation
from routenlp_plugins.cascade.search import task_paths

ALPHA, DELTA, DRAWS = 0.05, 0.1, 200
PAPER = {100: 0.072, 250: 0.058, 500: 0.042, 1000: 0.039}
"""Labels -> violation rate that the paper reports, each seen once."""
WAYS = ("tested", "conformal_risk_control", "without_a_test")


def main() -> None:
    jobs = [(task, n) for task in TASKS for n in PAPER]
    with get_context("fork").Pool(2) as pool:
        rows = pool.starmap(measured, jobs, chunksize=1)
    results = {"alpha": ALPHA, "delta": DELTA, "draws": DRAWS, "paper": PAPER, "rows": rows}
    file = HERE / "results" / "calibration_size.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))


def measured(task: str, n: int) -> dict[str, Any]:
    """True risk and cost of what each way chooses, over the draws."""
    risk = Violation(ALPHA)
    ordering, population = folds(task)
    paths = task_paths(ordering, risk)
    everything = Stream({task: population})
    points = sorted((point for path in paths for point in path), key=lambda point: -point.cost)
    at = [everything.under(point.candidates) for point in points]
    always = everything.under({})
    # rows of a stream are in its own order, those of a draw come from the table
    inverse = np.argsort(everything.order)
    losses = np.column_stack([rows.violation for rows in at])[inverse].astype(np.float64) if at else None
    rng = np.random.default_rng(n)
    seen: dict[str, list[tuple[float, float, bool]]] = {way: [] for way in WAYS}
    for _ in range(DRAWS):
        places = rng.integers(len(population), size=n)
        chosen, _ = certify(risk, [(Stream({task: drawn(population, n, rng, places)}), paths)], DELTA)
        found = everything.under(chosen)
        seen["tested"].append((risk.estimate(found), found.cost_ratio, not chosen))
        for way, place in zip(WAYS[1:], untested(losses, places), strict=True):
            rows = always if place is None else at[place]
            seen[way].append((risk.estimate(rows), rows.cost_ratio, place is None))
    return {"task": task, "labels": n, **{way: facts(draws) for way, draws in seen.items()}}


def untested(losses: NDArray[np.float64] | None, places: NDArray[np.intp]) -> tuple[int | None, int | None]:
    """Places on the path, dearest first, that conformal risk control and the bare estimate choose."""
    if losses is None:
        return None, None
    rows = losses[places]
    keeping = np.flatnonzero(rows.mean(axis=0) <= ALPHA)
    return conformal_risk_control(monotonized(rows), ALPHA), int(keeping[-1]) if len(keeping) else None


def facts(draws: list[tuple[float, float, bool]]) -> dict[str, Any]:
    risks, costs, refused = np.array(draws, dtype=np.float64).T
    return {
        "violation_rate": round(float(risks.mean()), 4),
        "standard_error": round(float(risks.std() / np.sqrt(len(risks))), 5),
        "above_alpha": int((risks > ALPHA).sum()),
        "refused": int(refused.sum()),
        "cost_ratio": round(float(costs.mean()), 4),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | labels | tested: rate, above alpha, refused, cost | conformal risk control | without a test |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{way['violation_rate']:.1%}, {way['above_alpha']}, {way['refused']}, {way['cost_ratio']:.2f}"
            for way in (row[name] for name in WAYS)
        ]
        lines.append(f"| {row['task']} | {row['labels']} | {' | '.join(cells)} |")
    lines += ["", "| labels | paper | tested | conformal risk control | without a test |", "|---|---|---|---|---|"]
    for n, reported in PAPER.items():
        means = [np.mean([row[way]["violation_rate"] for row in rows if row["labels"] == n]) for way in WAYS]
        lines.append(f"| {n} | {reported:.1%} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
