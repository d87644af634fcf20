"""Two days of the demo, told on the terminal."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..cascade.risks import Retention
from ..cascade.search import pooled_paths
from ..collecting import collect
from ..errors import PortfolioError, RiskNotControlledError
from ..evaluate.metrics import METRICS
from ..evaluate.outcomes import OutcomeRow, read_outcomes
from ..evaluate.table import task_tables
from ..fitting import fit
from ..release import Release
from ..replaying import replay
from ..terminal import show_release
from ..testing import ScriptedServer
from ..tiers.boundary import TierCallable, call_tier, sync_form
from ..tiers.llama_cpp import LlamaCppTier
from ..tiers.text_classifier import TextClassifierTier
from ..types import Call
from . import DemoChain, DemoOptions
from .report import Point, Report, known, tier_days, write_report
from .workload import FRONTIER, Workload, load_workload

__all__ = ["tell"]

ALPHA, DELTA = 0.05, 0.1
LEAST_RETENTION = 0.9
CLASSIFIERS = {"intent-classifier": "cs_intent", "clause-classifier": "legal_clause", "risk-classifier": "legal_risk"}


def tell(options: DemoOptions, chain_type: type[DemoChain], console: Console) -> Report:
    """Run both days and write outcomes, release and report."""
    start = time.perf_counter()
    workload = load_workload(options.seed, options.frontier_usd_per_mtok)
    kind = "synthetic, from a seeded generator" if workload.synthetic else "real, from ROUTENLP_DATA"
    sizes = f"{len(workload.first_day)} queries on the first day, {len(workload.second_day)} on the second"
    console.print(f"[bold]Workload[/bold]  {kind}: {sizes}")
    local = _local_tiers(console, workload)
    with _frontier(console, options, workload) as (base_url, api_key, model):
        chain = chain_type(base_url, api_key, model, workload.instructions)
        console.print("\n[bold]The chain you have[/bold]")
        console.print("  " + chain.code[0], highlight=False, markup=False)

        console.print(
            "\n[bold]First day[/bold]  the frontier answers; every tier answers too, so that there are outcomes"
        )
        pinned = chain.on_each_tier({**local, FRONTIER: None})
        outcomes = options.out / "outcomes.jsonl"
        collect(workload.first_day, pinned, outcomes, portfolio=workload.portfolio)
        rows = read_outcomes(outcomes)
        _print_tiers(console, rows, workload)

        release = _fit(console, outcomes, workload, options)

        console.print("\n[bold]Second day[/bold]  one line changed")
        console.print("  " + chain.code[1].format(out=options.out), highlight=False, markup=False)
        chain.swap_in(local, release)
        day = _second_day(chain, pinned[FRONTIER], workload)
    report = _report(workload, release, rows, day, reference_frontier=model == FRONTIER)
    write_report(report, options.report)
    _print_report(console, report)
    console.print(
        f"\n{options.report} and {options.out} written in {time.perf_counter() - start:.0f} s", highlight=False
    )
    return report


@dataclass(frozen=True, slots=True)
class _Answered:
    """One query of the second day: routed, and on the frontier alone."""

    task: str
    decision: Mapping[str, Any]
    quality: float
    frontier_quality: float
    frontier_cost: float


def _local_tiers(console: Console, workload: Workload) -> dict[str, Any]:
    tiers: dict[str, Any] = {}
    for name, task in CLASSIFIERS.items():
        known = [reference for reference in workload.history if reference.query.task == task]
        begin = time.perf_counter()
        tiers[name] = TextClassifierTier.train([r.query.text for r in known], [r.reference for r in known])
        seconds = time.perf_counter() - begin
        console.print(f"[bold]Tier[/bold]      {name}: trained on {len(known)} labelled queries in {seconds:.0f} s")
    tiers["smollm2-135m"] = LlamaCppTier(request={"max_tokens": 32})
    console.print("[bold]Tier[/bold]      smollm2-135m: SmolLM2-135M through llama.cpp, in this process")
    return tiers


@contextmanager
def _frontier(console: Console, options: DemoOptions, workload: Workload) -> Iterator[tuple[str, str, str]]:
    """Base URL, key and model name: the user's endpoint, or a server that replays the references."""
    url, key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    prices = "USD {} / {} a million tokens".format(*options.frontier_usd_per_mtok)
    if url and key:
        calls = len(workload.first_day) + 2 * len(workload.second_day)
        console.print(
            f"[bold]Frontier[/bold]  {options.frontier_model} at OPENAI_BASE_URL, {prices}; up to {calls} calls"
        )
        yield url, key, options.frontier_model
        return
    console.print(f"[bold]Frontier[/bold]  a local server that replays the references, priced as {prices}")
    replies = {reference.query.text: reference.reference for reference in (*workload.first_day, *workload.second_day)}
    with ScriptedServer(replies) as server:
        yield server.url, "none", FRONTIER


def _fit(console: Console, outcomes: Path, workload: Workload, options: DemoOptions) -> Release:
    console.print(f"\n[bold]Fit[/bold]  fit(outcomes, portfolio, alpha={ALPHA}, delta={DELTA})", highlight=False)
    try:
        release = fit(outcomes, workload.portfolio, alpha=ALPHA, delta=DELTA, seed=options.seed)
    except RiskNotControlledError as error:
        release = error.release
    release.save(options.out / "release")
    show_release(console, release)
    return release


def _second_day(chain: DemoChain, frontier: TierCallable, workload: Workload) -> list[_Answered]:
    alone = sync_form(frontier)
    if alone is None:
        raise AssertionError("a demo chain answers without an event loop")
    tier = workload.portfolio.tier(FRONTIER)
    console = Console(stderr=True)
    day = []
    for reference in track(workload.second_day, "second day", console=console, disable=not console.is_terminal):
        score = METRICS[workload.portfolio.task(reference.query.task or "").metric or "accuracy"]
        text, decision = chain.ask(reference.query)
        baseline = call_tier(tier, alone, Call(FRONTIER, reference.query))
        day.append(
            _Answered(
                task=reference.query.task or "",
                decision=decision,
                quality=score(text, reference.reference),
                frontier_quality=score(baseline.text, reference.reference),
                frontier_cost=_priced(baseline.cost_usd),
            )
        )
    return day


def _report(
    workload: Workload,
    release: Release,
    rows: Sequence[OutcomeRow],
    day: Sequence[_Answered],
    *,
    reference_frontier: bool,
) -> Report:
    if release.certificate is None:
        raise AssertionError("fit always certifies")
    by_task: dict[str, list[_Answered]] = defaultdict(list)
    for answered in day:
        by_task[answered.task].append(answered)
    first = replay(rows, release)
    return Report(
        synthetic=workload.synthetic,
        frontier="reference" if reference_frontier else "endpoint",
        portfolio=workload.portfolio,
        certificate=release.certificate,
        quality_alone={name: _mean_quality(rows, name) for name in workload.portfolio.names},
        day=tier_days(workload.portfolio, [attempt for one in day for attempt in one.decision["attempts"]]),
        before=sum(one.frontier_cost for one in day),
        tasks=tuple((task, len(of), _below(of), *_ratios(of)) for task, of in sorted(by_task.items())),
        search=_search(workload, rows),
        points=(
            Point("always-frontier", 1.0, 1.0),
            Point("first day, replayed with the release", first.cost_ratio, first.quality_ratio),
            Point("second day, routed", *_ratios(day)),
        ),
    )


def _below(day: Sequence[_Answered]) -> float:
    return float(np.mean([one.decision["tier"] != FRONTIER for one in day]))


def _ratios(day: Sequence[_Answered]) -> tuple[float | None, float | None]:
    """Cost and quality against the frontier alone; None where that is 0."""
    cost = sum(_priced(one.decision["cost_usd"]) for one in day)
    before = sum(one.frontier_cost for one in day)
    quality, reference = sum(one.quality for one in day), sum(one.frontier_quality for one in day)
    return cost / before if before else None, quality / reference if reference else None


def _priced(cost: float | None) -> float:
    if cost is None:
        raise PortfolioError("a call has no known cost: the endpoint reported no token usage")
    return cost


def _search(workload: Workload, rows: Sequence[OutcomeRow]) -> tuple[Point, ...]:
    """Cost and quality of the first day under the joint policies that no other beats in both, from safe to cheap."""
    paths = pooled_paths(task_tables(rows, workload.portfolio), Retention(LEAST_RETENTION))
    release = Release.frontier_only(workload.portfolio)
    found: list[Point] = []
    for policy in sorted((point for path in paths for point in path), key=lambda point: point.cost):
        ladders = {task: candidate.rungs for task, candidate in policy.candidates.items()}
        routed = replace(release.policy, ladders={**release.policy.ladders, **ladders})
        result = replay(rows, replace(release, policy=routed))
        beaten = result.quality_ratio is None or any((p.quality_ratio or 0) >= result.quality_ratio for p in found)
        if not beaten:
            found.append(Point("", result.cost_ratio, result.quality_ratio))
    return (Point("frontier", 1.0, 1.0), *reversed(found))


def _mean_quality(rows: Sequence[OutcomeRow], tier: str) -> float:
    """A tier that failed counts as 0."""
    return float(np.mean([row.outcomes[tier].quality or 0.0 for row in rows if tier in row.outcomes]))


def _print_tiers(console: Console, rows: Sequence[OutcomeRow], workload: Workload) -> None:
    table = Table("tier", "queries", "mean quality", "USD a query")
    for name in workload.portfolio.names:
        own = [row.outcomes[name] for row in rows if name in row.outcomes]
        quality = _mean_quality(rows, name)
        cost = np.mean([outcome.completion.cost_usd or 0.0 for outcome in own])
        table.add_row(name, str(len(own)), f"{quality:.3f}", f"{cost:.2g}")
    console.print(table)


def _print_report(console: Console, report: Report) -> None:
    table = Table("tier", "calls", "answers returned", "passed on", "USD")
    for tier in report.day:
        passed_on = str(tier.calls - tier.returned)
        table.add_row(tier.tier, str(tier.calls), str(tier.returned), passed_on, f"{tier.cost_usd:.6f}")
    console.print(table)
    table = Table("task", "queries", "below the frontier", "quality ratio", "cost ratio")
    for task, queries, below, cost, quality in report.tasks:
        table.add_row(task, str(queries), f"{below:.1%}", known(quality, "{:.3f}"), known(cost, "{:.3f}"))
    console.print(table)
    routed = report.routed
    label = " (synthetic queries)" if report.synthetic else ""
    frontier = "the reference frontier" if report.frontier == "reference" else "the frontier"
    console.print(
        f"[bold green]{known(routed.cost_ratio, '{:.1%}')} of the cost and "
        f"{known(routed.quality_ratio, '{:.1%}')} of the quality of "
        f"{frontier} alone{label}[/bold green]: USD {report.cost_usd:.4f} instead of {report.before:.4f}",
        highlight=False,
    )
