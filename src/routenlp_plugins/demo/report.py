"""The HTML report of the demo: what was bought, what it cost, what was proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ..cascade.certificate import Certificate
from ..portfolio import Portfolio

__all__ = ["DayOfTier", "Point", "Report", "known", "tier_days", "write_report"]


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on the cost-quality plot; ratios are against always-frontier on the same queries, None if unknown."""

    name: str
    cost_ratio: float | None
    quality_ratio: float | None

    @property
    def place(self) -> tuple[float, float] | None:
        """Where it stands on the plot, if both are known."""
        if self.cost_ratio is None or self.quality_ratio is None:
            return None
        return self.cost_ratio, self.quality_ratio


@dataclass(frozen=True, slots=True)
class DayOfTier:
    """What one tier did in a day: calls, answers returned, and USD."""

    tier: str
    calls: int
    returned: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows.

    Attributes:
        quality_alone: tier -> mean quality of its answers on the first day, to the tasks it may serve.
        day: the second day, routed.
        before: USD of the second day on the frontier alone.
        tasks: rows of task, queries, share below the frontier, cost ratio, quality ratio.
        search: the first day's outcomes under every policy of the path that was searched.
        points: named policies: always-frontier, both days.
    """

    synthetic: bool
    frontier: str
    portfolio: Portfolio
    certificate: Certificate
    quality_alone: Mapping[str, float]
    day: tuple[DayOfTier, ...]
    before: float
    tasks: tuple[tuple[str, int, float, float | None, float | None], ...]
    search: tuple[Point, ...]
    points: tuple[Point, ...]

    @property
    def cost_usd(self) -> float:
        """USD of the second day, routed."""
        return sum(tier.cost_usd for tier in self.day)

    @property
    def routed(self) -> Point:
        """The second day."""
        return self.points[-1]

    def as_dict(self) -> dict[str, Any]:
        """The numbers in JSON types."""
        names = ("task", "queries", "below_frontier", "cost_ratio", "quality_ratio")
        return {
            "synthetic": self.synthetic,
            "frontier": self.frontier,
            "cost_usd": self.cost_usd,
            "cost_usd_before": self.before,
            "cost_ratio": self.routed.cost_ratio,
            "quality_ratio": self.routed.quality_ratio,
            "tiers": [asdict(tier) | {"quality_alone": self.quality_alone[tier.tier]} for tier in self.day],
            "tasks": [dict(zip(names, task, strict=True)) for task in self.tasks],
            "certificate": self.certificate.as_dict(),
        }


def known(value: float | None, form: str) -> str:
    """A number in this form, or that it is unknown."""
    return "unknown" if value is None else form.format(value)


def tier_days(portfolio: Portfolio, attempts: Sequence[Mapping[str, object]]) -> tuple[DayOfTier, ...]:
    """Count the attempts of a day, as `Trace.as_dict` lists them, by tier."""
    days = []
    for name in portfolio.names:
        own = [attempt for attempt in attempts if attempt["tier"] == name]
        costs = [cost for attempt in own if isinstance(cost := attempt.get("cost_usd"), float)]
        days.append(DayOfTier(name, len(own), sum(bool(attempt["accepted"]) for attempt in own), sum(costs)))
    return tuple(days)


def write_report(report: Report, path: Path) -> None:
    """Render the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("routenlp_plugins.demo", "pages"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(report=report, plot=_plot(report), known=known)
    path.write_text(page, encoding="utf-8")


def _plot(report: Report) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.axhline(1, color="#b8c0c8", linewidth=1, linestyle=":")
    axes.plot(
        *zip(*(point.place for point in report.search if point.place), strict=True),
        color="#8aa4bf",
        marker=".",
        linewidth=1,
        label="policies searched, first day",
    )
    markers = ("s", "D", "o")
    colours = ("#3c4650", "#d08a2e", "#1a7f5a")
    for point, marker, colour in zip(report.points, markers, colours, strict=True):
        if point.place:
            axes.scatter(*point.place, s=70, marker=marker, color=colour, label=point.name, zorder=3)
    axes.set_xlabel("cost against always-frontier")
    axes.set_ylabel("quality against always-frontier")
    axes.set_xlim(0, 1.05)
    axes.grid(color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
