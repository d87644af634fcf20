"""What limits a router: how much of the difference in quality between tiers can be known, and what could be shown.

Of each tier below the frontier, on one half of each file: the share of the variance of (quality - quality of the
frontier) that is explained, cross-fitted, by the task, by task and words as three encoders read them, by words and the
tier's own answer, and by words and the answers of all tiers below the frontier. The mean over tiers, weighted by that
variance. The oracle knows all of it, so that the gap to it is mostly what none of these can know: chance in an answer,
or a signal that was not recorded.

And from `results/routers.json`: the smallest share of the gap between the best of the others and the oracle that ten
halves could have shown, first step of Holm's method over all cells.

    ROUTENLP_DATA=... python benchmarks/limits.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from curves import TARGETS, markdown
from local_tiers import HERE
from numpy.typing import NDArray
from routers import FILES, HALVES, halves_of, taken
from scipy import stats

from routenlp_plugins import HashedNgrams, StaticEmbeddings, TrainingOptions, TransformerEncoder
from routenlp_plugins.cascade.calibration import FOLDS, calibrate
from routenlp_plugins.cascade.ordering import Ordering
from routenlp_plugins.cascade.risks import Retention
from routenlp_plugins.evaluate.table import TaskTable
from routenlp_plugins.evaluate.units import unit_interval
from routenlp_plugins.routing.encoders import Encoder
from routenlp_plugins.routing.foresight import learned

ENCODERS: Mapping[str, Callable[[], Encoder]] = {
    "words": HashedNgrams,
    "words, static embeddings": StaticEmbeddings.wordllama,
    "words, MiniLM": TransformerEncoder.minilm,
}
KNOWN = ("task", *ENCODERS, "words, own answer", "words, all cheap answers")
Array = NDArray[np.float64]


def main() -> None:
    explained = {name: explained_in(name) for name in FILES}
    measured = json.loads((HERE / "results" / "routers.json").read_text(encoding="utf-8"))["files"]
    shown = {name: detectable(measured[name], cells=len(measured) * len(TARGETS)) for name in FILES}
    results = {"explained": explained, "smallest share of the gap that could be shown": shown}
    (HERE / "results" / "limits.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    rows = [
        [f"`{name}`", *(f"{explained[name][known]:.3f}" for known in KNOWN), *(cell(at) for at in shown[name].values())]
        for name in FILES
    ]
    print(markdown(["file", *KNOWN, *(f"shown at {target:.0%}" for target in TARGETS)], rows))


def cell(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def explained_in(name: str) -> dict[str, float]:
    """Share of the variance that is explained, by what is known."""
    data, fit, _ = halves_of(name, 0)
    tables = taken(data, fit)
    by_task = foretold(tables, TrainingOptions(("task means",)))
    read = [foretold(tables, replace(TrainingOptions(), encoder=encoder())) for encoder in ENCODERS.values()]
    table, allowed = read[0].table, read[0].allowed
    folds = (unit_interval(table.units, 0, "fold") * FOLDS).astype(np.intp)
    below = table.tiers[:-1]
    lost, whole = np.zeros(len(KNOWN)), 0.0
    for column, tier in enumerate(below):
        target = Retention(TARGETS[0]).target(table, column)
        rows = allowed[:, column] & np.isfinite(target)
        words = expected(table, tier)
        guesses = [expected(known.table, tier) for known in (by_task, *read)]
        for called in ((tier,), below):
            found = calibrate(table, tier, called, target, folds, predicted=True)
            guesses.append(words if found is None else np.where(np.isnan(found.held_out), words, found.held_out))
        lost += [((target - guess)[rows] ** 2).sum() for guess in guesses]
        whole += ((target - target[rows].mean())[rows] ** 2).sum()
    return dict(zip(KNOWN, (1 - lost / whole).round(4).tolist(), strict=True))


def foretold(tables: Mapping[str, TaskTable], options: TrainingOptions) -> Ordering:
    found = learned(tables, options, graded=True, stream=True)
    assert found is not None
    return Ordering.of(found[1])


def expected(table: TaskTable, tier: str) -> Array:
    """(n,) predicted (1 + quality - quality of the frontier) / 2."""
    difference: Array = table.difficulty[tier] - table.difficulty[table.tiers[-1]]
    return (1 + difference) / 2


def detectable(file: Mapping[str, Any], cells: int) -> dict[str, float | None]:
    """Smallest share of the gap between the best of the others and the oracle that would have been significant."""
    found: dict[str, float | None] = {}
    for i, (target, of) in enumerate(file["against the best"].items()):
        best, oracle = (file["methods"][method]["hindsight"][i] for method in (of["best"], "oracle"))
        gap = best - oracle
        t = stats.t.ppf(of["p_not_better"], HALVES - 1)
        if not t or not gap:
            found[target] = None
            continue
        found[target] = round(float(stats.t.isf(0.05 / cells, HALVES - 1) * of["difference"] / t / gap), 3)
    return found


if __name__ == "__main__":
    main()
