"""Do the promises hold? Monte Carlo over whole fits on populations whose risks are known exactly.

For each population 300 times: draw an ordering and a certification sample with replacement, search, certify, and
compute the risk of what was certified on the whole population. Among all draws, refused ones included, at most
delta = 10 % may be certified and break the promise (one-sided binomial test, Holm over the cells). Beside it, what
happens without a test: the cheapest policy whose promise holds on all the labels of the draw. A policy that never
leaves the frontier breaks no promise, so each cell also has a cost it must stay below.

    ROUTENLP_DATA=... python benchmarks/guarantees.py     ends with 1 if a promise is broken
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from populations import drawn, drawn_stream, foretold_populations, populations
from scipy.stats import binomtest

from routenlp_plugins.cascade.bounds import (
    betting_p_value,
    binomial_p_value,
    conformal_risk_control,
    holm,
    monotonized,
)
from routenlp_plugins.cascade.certification import Stream, certify
from routenlp_plugins.cascade.risks import Retention, Risk, SelectiveViolation, Violation
from routenlp_plugins.cascade.search import Point, pooled_paths, task_paths
from routenlp_plugins.evaluate.table import TaskTable

DELTA, DRAWS = 0.1, 300
ORDERING, CERTIFICATION = 400, 600
LEVELS: Mapping[str, tuple[float, float]] = {
    "medmcqa": (0.1, 0.95),
    "cs_response": (0.05, 0.95),
}
"""alpha and rho by population; the others take 0.05 and 0.97. Set before the first run."""
FLOOR = 0.97
"""Mean cost ratio that every cell must stay below."""


def risks(name: str) -> tuple[Risk, ...]:
    """The promises that a population is tested on."""
    alpha, rho = LEVELS.get(name.split(",")[0], (0.05, 0.97))
    return Violation(alpha), SelectiveViolation(2 * alpha), Retention(rho)


def main() -> None:
    tables = populations()
    every: dict[str, Mapping[str, TaskTable]] = {name: {table.task: table} for name, table in tables.items()}
    every.update(foretold_populations())
    jobs = [(name, of, risk) for name, of in every.items() for risk in risks(name)]
    jobs.sort(key=lambda job: -max(len(table.tiers) for table in job[1].values()))  # the longest first
    with get_context("fork").Pool(2) as pool:
        cells = []
        for one in pool.imap_unordered(cell_of, jobs, chunksize=1):
            cells.append(one)
            print(f"{len(cells)} of {len(jobs)}: {one['population']}, {one['risk']}", file=sys.stderr, flush=True)
    cells.sort(key=lambda one: (list(every).index(one["population"]), one["risk"]))
    cells += boundary_cells()
    in_expectation = [expectation(name, table) for name, table in tables.items()]
    rejected = holm([one["p_value"] for one in cells], 0.05)
    for one, broken in zip(cells, rejected, strict=True):
        one["broken"] = bool(broken)
    results = {
        "delta": DELTA,
        "draws": DRAWS,
        "ordering": ORDERING,
        "certification": CERTIFICATION,
        "cells": cells,
        "conformal_risk_control": in_expectation,
    }
    file = Path(__file__).parent / "results" / "guarantees.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(markdown(results))
    broken = [one["population"] for one in cells if one["broken"]]
    above = [one["population"] for one in in_expectation if one["mean_risk"] > one["alpha"] + 2 * one["standard_error"]]
    if broken or above:
        sys.exit(f"promises are broken: {broken + above}")


def cell_of(job: tuple[str, Mapping[str, TaskTable], Risk]) -> dict[str, Any]:
    return cell(*job)


def cell(name: str, population: Mapping[str, TaskTable], risk: Risk) -> dict[str, Any]:
    """Whole fits on draws of one population: a task, or a stream of tasks under one promise."""
    rng = np.random.default_rng(0)
    everything = Stream(population)
    found = {way: Tally(risk) for way in ("certified", "naive")}
    for _ in range(DRAWS):
        ordering = drawn_stream(population, ORDERING, rng)
        stream = Stream(drawn_stream(population, CERTIFICATION, rng))
        paths = pooled_paths(ordering, risk)
        chosen, _ = certify(risk, [(stream, paths)], DELTA)
        found["certified"].add(everything, chosen)
        found["naive"].add(everything, naive(risk, [point for path in paths for point in path], stream))
    certified = found["certified"].facts()
    return {
        "population": name,
        "risk": risk.kind,
        "level": risk.level,
        **certified,
        "p_value": p_value(certified["violating"]),
        "above_floor": certified["cost_ratio"] > FLOOR,
        "naive": found["naive"].facts(),
    }


class Tally:
    """What the policies of all draws did on the population."""

    def __init__(self, risk: Risk) -> None:
        self.risk = risk
        self.violating = self.refused = 0
        self.cost: list[float] = []
        self.kept: list[float] = []

    def add(self, everything: Stream, chosen: Mapping[str, Any]) -> None:
        rows = everything.under(chosen)
        self.refused += not chosen
        self.violating += bool(chosen) and rows.mean(self.risk.excess(rows)) > 1e-12
        self.cost.append(rows.cost_ratio)
        self.kept.append(1 - self.risk.lost(rows) if isinstance(self.risk, Retention) else self.risk.estimate(rows))

    def facts(self) -> dict[str, Any]:
        return {
            "violating": self.violating,
            "refused": self.refused,
            "cost_ratio": round(float(np.mean(self.cost)), 4),
            "mean_estimate": round(float(np.mean(self.kept)), 4),
        }


def naive(risk: Risk, points: list[Point], certification: Stream) -> Mapping[str, Any]:
    """The cheapest policy that keeps the promise on the certification sample itself, without any test."""
    keeping = [point for point in points if excess_of(point, risk, certification) <= 0]
    return min(keeping, key=lambda point: point.cost).candidates if keeping else {}


def excess_of(point: Point, risk: Risk, stream: Stream) -> float:
    rows = stream.under(point.candidates)
    return rows.mean(risk.excess(rows))


def p_value(violating: int, draws: int = DRAWS) -> float:
    """One-sided test of "at most a share delta of the draws is certified and breaks its promise"."""
    return round(float(binomtest(violating, draws, DELTA, alternative="greater").pvalue), 4)


def boundary_cells(draws: int = 5000) -> list[dict[str, Any]]:
    """Policies whose true risk is exactly what may just not be certified: the tests alone, many draws."""
    rng = np.random.default_rng(0)
    n, alpha, rho = CERTIFICATION, 0.05, 0.97
    counts = rng.binomial(n, alpha, draws)
    exact = int((binomial_p_value(counts, n, alpha) <= DELTA).sum())
    cells = [boundary("violation", alpha, exact, draws)]
    for right, discordant in ((0.8, 0.06), (0.95, 0.04)):
        # P(frontier right, routed wrong) - P(the other way round) = (1 - rho) P(frontier right)
        lost = (discordant + (1 - rho) * right) / 2
        u = rng.random((n, draws))
        frontier = u < right
        routed = (frontier & (u >= lost)) | ((u >= right) & (u < right + discordant - lost))
        excess = rho * frontier - routed
        moment = np.full(draws, (excess**2).mean()) * np.exp(0.3 * rng.standard_normal(draws))
        betting = int((betting_p_value(excess, rho, DELTA, moment) <= DELTA).sum())
        cells.append(boundary(f"retention, frontier {right:g} right, {discordant:g} discordant", rho, betting, draws))
    return cells


def boundary(what: str, level: float, violating: int, draws: int) -> dict[str, Any]:
    return {
        "population": f"boundary: {what}",
        "risk": what.split(",")[0],
        "level": level,
        "violating": violating,
        "draws": draws,
        "refused": draws - violating,
        "p_value": p_value(violating, draws),
    }


def expectation(name: str, population: TaskTable) -> dict[str, Any]:
    """Conformal risk control on the path of joint policies, its losses made monotone: E[risk] <= alpha."""
    alpha = LEVELS.get(name.split(",")[0], (0.05, 0.97))[0]
    rng = np.random.default_rng(0)
    risk = Violation(alpha)
    everything = Stream({population.task: population})
    path = [point for part in task_paths(drawn(population, ORDERING, rng), risk) for point in part]
    path.sort(key=lambda point: -point.cost)
    if not path:
        return {"population": name, "alpha": alpha, "mean_risk": 0.0, "standard_error": 0.0, "cost_ratio": 1.0}
    true = [everything.under(point.candidates) for point in path]
    losses = np.column_stack([rows.violation for rows in true]).astype(np.float64)
    order = everything.order
    inverse = np.argsort(order)
    seen, cost = [], []
    for _ in range(DRAWS):
        rows = inverse[rng.integers(len(population), size=CERTIFICATION)]
        found = conformal_risk_control(monotonized(losses[rows]), alpha)
        seen.append(0.0 if found is None else float(true[found].violation.mean()))
        cost.append(1.0 if found is None else true[found].cost_ratio)
    return {
        "population": name,
        "alpha": alpha,
        "mean_risk": round(float(np.mean(seen)), 4),
        "standard_error": round(float(np.std(seen) / np.sqrt(DRAWS)), 5),
        "share_above": round(float(np.mean(np.array(seen) > alpha)), 3),
        "cost_ratio": round(float(np.mean(cost)), 4),
    }


def markdown(results: Mapping[str, Any]) -> str:
    lines = [
        "| population | promise | broken | p | refused | cost ratio | without a test: broken | cost ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results["cells"]:
        untested = one.get("naive", {})
        cells = (
            one["population"],
            f"{one['risk']} {one['level']:g}",
            f"{one['violating']} of {one.get('draws', DRAWS)}",
            one["p_value"],
            one["refused"],
            one.get("cost_ratio", ""),
            untested.get("violating", ""),
            untested.get("cost_ratio", ""),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| population | alpha | mean risk (conformal risk control) | cost ratio |", "|---|---|---|---|"]
    for one in results["conformal_risk_control"]:
        lines.append(f"| {one['population']} | {one['alpha']} | {one['mean_risk']} | {one['cost_ratio']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
