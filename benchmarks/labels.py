"""Do promises hold that are certified on labels, or on policies that labels have found? Monte Carlo.

Populations of real answers, and a synthetic one, whose truth is known. Each of 200 draws has 2,000 queries with
replacement; users and a judge speak of every answer, a quarter of the queries is audited. Three ways, each for
P(bad) <= alpha and for a retention of the frontier's quality, delta = 0.1:

- *known error*: thumbs that are up on 95 % of the good answers and 20 % of the bad ones certify; no audits.
- *learned*: `LabelModel` learns from a quarter of the audits what thumbs (90 and 30 %), a judge of five levels and one
  that tosses a coin are worth, bounds the labels' errors on the other audits, and the labels of all other queries
  certify. The bounds take a quarter of delta.
- *ordered*: the learned labels only find the policies; the audits that they were not learned from certify.

A draw breaks a promise if the true risk of what was certified, on the whole population, exceeds it. Among all draws at
most delta may (one-sided binomial test, Holm over the cells).

Beside them, what is not promised: users who forgive confident answers, so that errors depend on what the policy sees
(thumbs up on 20 % of the bad answers of which the tier is least sure, and 70 % of those of which it is most), with
labels certified as if that were not so; and *ordered* for the same users, which does not rest on it.

    ROUTENLP_DATA=... python benchmarks/labels.py     ends with 1 if a promise is broken
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from guarantees import DELTA, Tally, risks
from numpy.typing import NDArray
from populations import drawn, populations
from scipy.stats import binomtest

from routenlp_plugins import DataError, LabelModel, Noise, Signal
from routenlp_plugins.cascade.bounds import holm
from routenlp_plugins.cascade.certification import Stream, certify
from routenlp_plugins.cascade.noise import NoisyRetention, NoisyViolation
from routenlp_plugins.cascade.risks import Retention, Risk, Violation
from routenlp_plugins.cascade.search import task_paths
from routenlp_plugins.evaluate.table import TaskTable
from routenlp_plugins.signals.opinions import Judged, Opinion

DRAWS, QUERIES, AUDITED = 200, 2000, 0.25
KNOWN, THUMBS, FORGIVING = (0.95, 0.2), (0.9, 0.3), 0.7
JUDGE = ((0.05, 0.05, 0.1, 0.3, 0.5), (0.4, 0.2, 0.2, 0.1, 0.1))
"""P(level) where answers are good, and where they are bad."""
NAMES = ("synthetic, 3 tiers", "medmcqa, 3 tiers", "cs_intent, 3 tiers", "legal_clause, 3 tiers", "legal_risk, 3 tiers")
WAYS = ("known error", "learned", "ordered")
Chosen = Mapping[str, Any]


def main() -> None:
    tables = {name: table for name, table in populations().items() if name in NAMES}
    missing = set(NAMES) - set(tables)
    if missing:
        sys.exit(f"no population of this name: {', '.join(sorted(missing))}")
    jobs = [
        (name, table, risk, way, False) for name, table in tables.items() for risk in promised(name) for way in WAYS
    ]
    jobs += [(name, tables[name], Violation(risks(name)[0].level), way, True) for name in NAMES for way in WAYS[1:]]
    with get_context("fork").Pool(2) as pool:
        cells = []
        for one in pool.imap(cell, jobs, chunksize=1):
            cells.append(one)
            print(f"{len(cells)} of {len(jobs)}: {one}", file=sys.stderr, flush=True)
    promises = [one for one in cells if one["promised"]]
    for one, broken in zip(promises, holm([one["p_value"] for one in promises], 0.05), strict=True):
        one["broken"] = bool(broken)
    results = {"delta": DELTA, "draws": DRAWS, "queries": QUERIES, "audited": AUDITED, "cells": cells}
    file = Path(__file__).parent / "results" / "labels.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(markdown(cells))
    if broken := [one["population"] for one in promises if one["broken"]]:
        sys.exit(f"promises are broken: {broken}")


def promised(name: str) -> tuple[Risk, Risk]:
    """A bounded risk and a retention, at the levels of `guarantees`."""
    violation, _, retention = risks(name)
    return violation, retention


def cell(job: tuple[str, TaskTable, Risk, str, bool]) -> dict[str, Any]:
    """Whole fits on draws of one population, by one way of labelling."""
    name, population, risk, way, forgiving = job
    rng = np.random.default_rng(0)
    everything, tally, unlabelled = Stream({population.task: population}), Tally(risk), 0
    for draw in range(DRAWS):
        sample = Sample.of(drawn(population, QUERIES, rng), forgiving, rng)
        try:
            chosen = FITS[way](sample, risk, draw)
        except DataError:
            chosen, unlabelled = {}, unlabelled + 1
        tally.add(everything, chosen)
    facts = tally.facts()
    return {
        "population": name,
        "risk": risk.kind,
        "level": risk.level,
        "way": way,
        "promised": not forgiving or way == "ordered",
        "forgiving_users": forgiving,
        **facts,
        "no_labels": unlabelled,
        "p_value": round(float(binomtest(facts["violating"], DRAWS, DELTA, alternative="greater").pvalue), 4),
    }


@dataclass(frozen=True)
class Sample:
    """Queries, which of their answers are good, what is said of them, and which are audited.

    Attributes:
        good: (n, tiers), as are the signals.
        audited: (n,).
    """

    table: TaskTable
    good: NDArray[np.bool_]
    audited: NDArray[np.bool_]
    known: NDArray[np.float64]
    thumbs: NDArray[np.float64]
    judge: NDArray[np.float64]
    coin: NDArray[np.float64]

    @classmethod
    def of(cls, table: TaskTable, forgiving: bool, rng: np.random.Generator) -> Sample:
        good = table.quality >= table.tau[:, None]
        up = np.where(good, THUMBS[0], THUMBS[1])
        if forgiving:
            up = np.where(good, up, KNOWN[1] + (FORGIVING - KNOWN[1]) * sureness(table))
        known, thumbs, coin = (rng.random(good.shape) < of for of in (np.where(good, KNOWN[0], KNOWN[1]), up, 0.5))
        levels = np.where(good, rng.choice(5, good.shape, p=JUDGE[0]), rng.choice(5, good.shape, p=JUDGE[1]))
        audited = rng.random(len(table)) < AUDITED
        said = (one.astype(np.float64) for one in (known, thumbs, levels / 4, coin))
        return cls(table, good, audited, *said)

    def opinion(self, row: int, tier: int) -> Opinion:
        """What is said of an answer, none of which was returned and each of which was rated by itself."""
        said = (
            Signal("run", "thumbs", float(self.thumbs[row, tier])),
            Signal("run", "judge", float(self.judge[row, tier]), "judge"),
            Signal("run", "judge", float(self.coin[row, tier]), "coin"),
        )
        return Opinion(said, (), None, is_returned=False)

    def judged(self) -> list[Judged]:
        """The audited answers."""
        return [
            Judged(self.opinion(row, tier), float(self.good[row, tier]), name, str(self.table.units[row]), 1 / AUDITED)
            for row in np.flatnonzero(self.audited).tolist()
            for tier, name in enumerate(self.table.tiers)
        ]

    def labelled(self, label: NDArray[np.float64], rows: NDArray[np.bool_]) -> TaskTable:
        """These rows with labels in the place of quality."""
        return replace(self.table, quality=label).take(np.flatnonzero(rows))


def sureness(table: TaskTable) -> NDArray[np.float64]:
    """Rank of a tier's confidence in each answer, in [0, 1]; 0.5 where it has none."""
    found = np.full(table.quality.shape, 0.5)
    for place, tier in enumerate(table.tiers):
        kinds = [values for key, values in table.evidence.items() if key[0] == tier]
        if kinds:
            found[:, place] = np.argsort(np.argsort(kinds[0], kind="stable"), kind="stable") / max(len(table) - 1, 1)
    return found


def noisy(risk: Risk, noise: Noise) -> Risk:
    return (NoisyRetention if isinstance(risk, Retention) else NoisyViolation)(risk.level, noise)


def certified(ordering: TaskTable, sought: Risk, rows: TaskTable, risk: Risk, delta: float) -> Chosen:
    """Find policies on one table, certify them on another."""
    return certify(risk, [(Stream({rows.task: rows}), task_paths(ordering, sought))], delta)[0]


def known_error(sample: Sample, risk: Risk, draw: int) -> Chosen:
    """Thumbs find, thumbs certify."""
    half = np.arange(len(sample.table)) < 0.4 * len(sample.table)
    of_labels = noisy(risk, Noise(*KNOWN))
    return certified(
        sample.labelled(sample.known, half), of_labels, sample.labelled(sample.known, ~half), of_labels, DELTA
    )


def labels_of(sample: Sample, draw: int) -> tuple[LabelModel, NDArray[np.float64]]:
    """Learned labels of all answers."""
    model = LabelModel.learn(sample.judged(), delta=DELTA / 4, seed=draw, frontier=sample.table.tiers[-1])
    label = [[model(sample.opinion(row, tier)) for tier in range(len(sample.table.tiers))] for row in range(QUERIES)]
    return model, np.array(label, dtype=np.float64)


def learned(sample: Sample, risk: Risk, draw: int) -> Chosen:
    """Labels find, labels certify."""
    model, label = labels_of(sample, draw)
    half = np.arange(len(sample.table)) < 0.4 * len(sample.table)
    of_labels = noisy(risk, model.noise)
    ordering, rows = (sample.labelled(label, ~sample.audited & part) for part in (half, ~half))
    return certified(ordering, of_labels, rows, of_labels, DELTA - model.noise.delta)


def ordered(sample: Sample, risk: Risk, draw: int) -> Chosen:
    """Labels find, audits certify."""
    model, label = labels_of(sample, draw)
    new = sample.audited & ~np.isin(sample.table.units, list(model.learned_from))
    return certified(
        sample.labelled(label, ~new), noisy(risk, model.expected), sample.table.take(np.flatnonzero(new)), risk, DELTA
    )


FITS: Mapping[str, Callable[[Sample, Risk, int], Chosen]] = {
    "known error": known_error,
    "learned": learned,
    "ordered": ordered,
}


def markdown(cells: list[dict[str, Any]]) -> str:
    lines = ["| population | promise | way | broken | refused | cost ratio |", "|---|---|---|---|---|---|"]
    for one in cells:
        way = f"{one['way']}, forgiving users" if one["forgiving_users"] else one["way"]
        told = (one["population"], f"{one['risk']} {one['level']:g}", way, f"{one['violating']} of {DRAWS}")
        lines.append(f"| {' | '.join(map(str, (*told, one['refused'], one['cost_ratio'])))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
