"""The page of a loop: what was escalated, what was taught of it, what the gate saw, what it saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .clusters import ELSEWHERE
from .gate import Check
from .lessons import read_lessons
from .loop import DistillationLoop
from .results import ClusterFacts, Round, Taught

__all__ = ["write_report"]

MOST = 4000
"""Queries of a map."""


@dataclass(frozen=True, slots=True)
class Map:
    """Queries of one task in the plane.

    Attributes:
        points: (n, 2).
        clusters: (n,) numbers.
        taught: (n,) whether a lesson was made of the query.
    """

    task: str
    points: NDArray[np.float64]
    clusters: NDArray[np.intp]
    taught: NDArray[np.bool_]


def write_report(loop: DistillationLoop, path: str | Path) -> Path:
    """Render the rounds of a loop as one HTML page.

    Raises:
        DataError: there is no finished round, or something at `path` already.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    target = Path(path)
    if target.exists():
        raise DataError(f"{target}: exists already and is not overwritten; choose a new file")
    rounds = loop.rounds
    if not rounds:
        raise DataError(f"{loop.folder}: no finished round to tell of")
    environment = Environment(
        loader=PackageLoader("routenlp_plugins.distill", "pages"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    told = [{"round": one, "maps": [_svg(found) for found in _maps(loop, one)]} for one in reversed(rounds)]
    page = environment.get_template("rounds.html").render(
        rounds=told, course=rounds, serving=loop.serving, number=_number, judged=_judged, checks=_checks
    )
    target.write_text(page, encoding="utf-8")
    return target


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "unknown" if value is None else form.format(value)


def _checks(taught: Taught) -> list[Check]:
    """What had to be shown; harm is told with its cluster, and where it was found."""
    checks = () if taught.verdict is None else taught.verdict.checks
    return [check for check in checks if check.kind != "harm" or not check.passed]


def _judged(taught: Taught, cluster: ClusterFacts) -> Check | None:
    """What the gate saw of a cluster, on fresh queries."""
    about = f"cluster {cluster.number} ({cluster.label})"
    checks = () if taught.verdict is None else taught.verdict.checks
    return next((check for check in checks if check.about == about), None)


def _maps(loop: DistillationLoop, done: Round) -> list[Map]:
    """What went to the frontier in the teaching part, a map for each task."""
    work = loop.work(done.number)
    if work.clusters is None:
        return []
    lessons = {
        lesson.id
        for taught in done.students
        if (file := work.file("lessons", taught.tier, "jsonl")).exists()
        for lesson in read_lessons(file)
    }
    shown = [one for one in work.parts["teaching"] if one.returned == work.frontier][:MOST]
    found = []
    for task in dict.fromkeys(work.clusters.tasks):
        of_task = [one for one in shown if one.row.query.task == task]
        texts = [one.row.query.text for one in of_task]
        taught = np.array([one.trace_id in lessons for one in of_task], dtype=np.bool_)
        number = work.clusters.assign(texts, [task] * len(texts))
        found.append(Map(task, work.clusters.map(texts, task), number, taught))
    return found


def _svg(of: Map) -> Mapping[str, Any]:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab20"]
    for number in np.unique(of.clusters).tolist():
        mine = of.clusters == number
        colour = "#c9d0d6" if number == ELSEWHERE else colours(number % 20)
        x, y = of.points.T
        rest, taught = mine & ~of.taught, mine & of.taught
        axes.scatter(x[rest], y[rest], s=9, color=colour, alpha=0.55, linewidths=0)
        axes.scatter(x[taught], y[taught], s=26, color=colour, edgecolors="#1c2530", linewidths=0.8, zorder=3)
        if number != ELSEWHERE:
            middle = of.points[mine].mean(axis=0)
            axes.annotate(str(number), middle, fontsize=9, weight="bold", ha="center", va="center", zorder=4)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return {"task": of.task, "svg": svg[svg.index("<svg") :], "taught": int(of.taught.sum()), "n": len(of.points)}
