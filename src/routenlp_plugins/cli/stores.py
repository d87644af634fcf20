"""Commands about trace stores: import, export, report, and what a release would have done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from ..errors import DataError, ReleaseError
from .shared import AsJson, Command, SkipBadLines, StoreUrl, app, bad_input, since_days, write_json

__all__ = ["export", "import_", "labels", "report", "would_have"]


@app.command("import", cls=Command)
def import_(
    files: Annotated[list[Path], typer.Argument(help="JSON lines, .jsonl or .jsonl.gz.", metavar="FILES...")],
    store: StoreUrl,
    form: Annotated[str, typer.Option("--format", help="openai, langsmith or outcomes.")],
    portfolio: Annotated[Path | None, typer.Option(help="Portfolio, YAML: prices, and who the frontier is.")] = None,
    task: Annotated[str, typer.Option(help="Of records that name none.")] = "default",
    tier: Annotated[list[str] | None, typer.Option(help="MODEL=TIER, where a model is not the frontier.")] = None,
    redact: Annotated[str | None, typer.Option(help="drop or hash: what becomes of texts.")] = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = None,
) -> None:
    """Read what others have recorded into a trace store."""
    from ..portfolio import Portfolio
    from ..signals.importing import import_traces
    from ..signals.records import ImportOptions
    from ..signals.store import TraceStore

    with bad_input(as_json):
        named = dict(one.partition("=")[::2] for one in tier or ())
        for model, name in named.items():
            if not name:
                raise DataError(f"--tier {model}: expected MODEL=TIER")
        known = None if portfolio is None else Portfolio.from_yaml(portfolio)
        with TraceStore(store, cast("Any", redact)) as opened:
            done = import_traces(opened, files, form, ImportOptions(known, task, named, skip_bad_lines))
    if as_json is not None:
        write_json({"traces": done.traces, "signals": done.signals, "skipped_lines": done.skipped}, as_json)
        return
    left = f", {done.skipped} lines left out" if done.skipped else ""
    Console().print(f"{done.traces} traces and {done.signals} signals read{left}", highlight=False)


@app.command(cls=Command)
def export(
    outcomes: Annotated[Path, typer.Argument(help="Outcome file to write, .jsonl; must not exist.", metavar="FILE")],
    store: StoreUrl,
    beside: Annotated[str | None, typer.Option(help="Only traces with calls of this purpose: shadow or audit.")] = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Only rows with a quality.")] = False,
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """Write the traces of a store as outcomes; their quality is what audits say."""
    from ..evaluate.outcomes import outcome_line
    from ..signals.store import TraceStore

    with bad_input(as_json):
        if outcomes.exists():
            raise DataError(f"{outcomes}: exists already and is not overwritten; choose a new file")
        rows = known = 0
        with TraceStore(store, create=False) as opened, outcomes.open("x", encoding="utf-8") as file:
            for row in opened.outcomes(since=since_days(days), beside=beside, labelled=labelled):
                file.write(outcome_line(row) + "\n")
                rows += 1
                known += any(outcome.quality is not None for outcome in row.outcomes.values())
    if as_json is not None:
        write_json({"rows": rows, "rows_with_quality": known}, as_json)
        return
    Console().print(f"{outcomes}: {rows} rows, {known} of them with a quality", highlight=False, markup=False)


@app.command(cls=Command)
def report(
    store: StoreUrl,
    portfolio: Annotated[Path, typer.Option(help="Portfolio, YAML: its prices hold where none was recorded.")],
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """What happened: calls, cost, what was saved and how sure that is, and what a store holds."""
    from ..portfolio import Portfolio
    from ..signals.ledger import ledger
    from ..signals.store import TraceStore
    from ..terminal import show_ledger

    with bad_input(as_json):
        known = Portfolio.from_yaml(portfolio)
        with TraceStore(store, create=False) as opened:
            bill = ledger(opened, known, since_days(days))
            counts = opened.counts()
    if as_json is not None:
        write_json({"counts": counts.as_dict(), "ledger": bill.as_dict()}, as_json)
        return
    show_ledger(Console(), bill, counts)


@app.command(cls=Command)
def labels(
    store: StoreUrl,
    portfolio: Annotated[Path | None, typer.Option(help="Portfolio, YAML: whose answers are the frontier's.")] = None,
    tau: Annotated[float, typer.Option(help="Quality from which an answer is good.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Chance that a bound of the labels does not hold.")] = 0.05,
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """What each source of signals is worth, compared with audits, and what labels made of them would say."""
    from ..portfolio import Portfolio
    from ..signals.labels import LabelModel
    from ..signals.store import TraceStore
    from ..terminal import show_labels

    with bad_input(as_json):
        frontier = None if portfolio is None else Portfolio.from_yaml(portfolio).frontier
        with TraceStore(store, create=False) as opened:
            model = LabelModel.learn(opened.judged(since_days(days)), tau=tau, delta=delta, frontier=frontier)
    if as_json is not None:
        write_json(model.as_dict(), as_json)
        return
    show_labels(Console(), model)


@app.command("would-have", cls=Command)
def would_have(
    store: StoreUrl,
    release: Annotated[Path, typer.Option(help="Folder of the release.")],
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """What a release would have cost, had it served the queries that ran in the shadow, and kept of those audited."""
    from ..release import Release
    from ..replaying import replay
    from ..signals.store import TraceStore
    from ..terminal import show_replay

    with bad_input(as_json):
        loaded = Release.load(release)
        if loaded.policy.void is not None:
            raise ReleaseError(f"{release}: its certificate is void: {loaded.policy.void}")
        with TraceStore(store, create=False) as opened:
            rows = list(opened.outcomes(since=since_days(days), beside="shadow"))
        if not rows:
            raise DataError(f"{store}: no query ran in the shadow; attach a Shadow to what serves")
        audited = [row for row in rows if all(outcome.quality is not None for outcome in row.outcomes.values())]
        cost = replay(rows, loaded)
        quality = replay(audited, loaded) if audited else None
    if as_json is not None:
        told = {"shadow": cost.as_dict(), "audited": None if quality is None else quality.as_dict()}
        write_json(told, as_json)
        return
    console = Console()
    ratio = "unknown" if cost.cost_ratio is None else f"{cost.cost_ratio:.3f}"
    console.print(
        f"{cost.queries} queries ran in the shadow: USD {cost.cost_usd:.3g} a query, {ratio} of the frontier alone",
        highlight=False,
    )
    if quality is None:
        console.print("None of them was audited on every tier: what would have been kept is not known", highlight=False)
        return
    console.print("Those that were audited on every tier:", highlight=False)
    show_replay(console, quality)
