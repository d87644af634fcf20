"""Commands about trace stores: import, export, report, and what a release would have done."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from ..errors import DataError
from .shared import (
    AsJson,
    Command,
    SkipBadLines,
    StoreUrl,
    app,
    bad_input,
    since_days,
    valid_release,
    whole_file,
    write_json,
)

__all__ = ["draw", "export", "import_", "labels", "report", "would_have"]


@app.command("import", cls=Command)
def import_(
    files: Annotated[list[Path], typer.Argument(help="JSON lines, .jsonl or .jsonl.gz.", metavar="FILES...")],
    store: StoreUrl,
    form: Annotated[str, typer.Option("--format", help="openai, langsmith or outcomes.")],
    portfolio: Annotated[Path | None, typer.Option(help="Portfolio, YAML: prices, and who the frontier is.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Of records that name none; the portfolio's if it has one, else default.")
    ] = None,
    tier: Annotated[list[str] | None, typer.Option(help="MODEL=TIER, where a model is not the frontier.")] = None,
    redact: Annotated[str | None, typer.Option(help="drop or hash: what becomes of texts.")] = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = None,
) -> None:
    """Read what others have recorded into a trace store."""
    from ..portfolio import Portfolio
    from ..signals.importing import import_traces, reader_of
    from ..signals.records import ImportOptions
    from ..signals.store import TraceStore

    with bad_input(as_json):
        named = dict(one.partition("=")[::2] for one in tier or ())
        for model, name in named.items():
            if not name:
                raise DataError(f"--tier {model}: expected MODEL=TIER")
        known = None if portfolio is None else Portfolio.from_yaml(portfolio)
        # before a store is made
        reader_of(form)
        only = known.tasks[0].name if known is not None and len(known.tasks) == 1 else "default"
        with TraceStore(store, cast("Any", redact)) as opened:
            done = import_traces(opened, files, form, ImportOptions(known, task or only, named, skip_bad_lines))
    if as_json is not None:
        write_json(
            {"traces": done.traces, "known": done.known, "signals": done.signals, "skipped_lines": done.skipped},
            as_json,
        )
        return
    left = f", {done.skipped} lines left out" if done.skipped else ""
    left += f"; {done.known} of the traces were there already and are left as they are" if done.known else ""
    Console().print(f"{done.traces} traces and {done.signals} signals read{left}", highlight=False)


@app.command(cls=Command)
def export(
    outcomes: Annotated[Path, typer.Argument(help="Outcome file to write, .jsonl; must not exist.", metavar="FILE")],
    store: StoreUrl,
    beside: Annotated[str | None, typer.Option(help="Only traces with calls of this purpose: shadow.")] = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Only rows with a quality.")] = False,
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """Write the traces of a store as outcomes; their quality is what audits say."""
    from ..evaluate.outcomes import outcome_line
    from ..signals.store import TraceStore

    with bad_input(as_json):
        rows = known = 0
        with (
            TraceStore(store, create=False) as opened,
            whole_file(outcomes) as file,
        ):
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
    """What happened: calls, cost, what was saved and how sure that is, what was kept, and what a store holds."""
    from ..portfolio import Portfolio
    from ..signals.keeping import kept
    from ..signals.ledger import ledger
    from ..signals.store import TraceStore
    from ..terminal import show_ledger

    with bad_input(as_json):
        known = Portfolio.from_yaml(portfolio)
        with TraceStore(store, create=False) as opened:
            since = since_days(days)
            bill, quality, counts = ledger(opened, known, since), kept(opened, known, since), opened.counts()
    if as_json is not None:
        write_json({"counts": counts.as_dict(), "ledger": bill.as_dict(), "kept": quality.as_dict()}, as_json)
        return
    show_ledger(Console(), bill, quality, counts)


@app.command(cls=Command)
def draw(
    outcomes: Annotated[Path, typer.Argument(help="Outcome file to write, .jsonl; must not exist.", metavar="FILE")],
    store: StoreUrl,
    share: Annotated[float, typer.Option(help="Probability of each query to be audited.")],
    seed: Annotated[int, typer.Option(help="Another one draws others.")] = 0,
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
) -> None:
    """Choose by chance what reviewers look at, and write it as outcomes; the store keeps how probable that was."""
    from ..evaluate.outcomes import outcome_line
    from ..signals.store import TraceStore

    with bad_input(None):
        rows = 0
        with TraceStore(store, create=False) as opened, whole_file(outcomes) as file:
            chosen = {one.id for one in opened.draw(share, since_days(days), seed=seed)}
            for row in opened.outcomes(since=since_days(days)):
                if row.source.removeprefix("trace ") in chosen:
                    file.write(outcome_line(replace(row, query=replace(row.query, id=row.source[6:]))) + "\n")
                    rows += 1
    Console().print(
        f"{outcomes}: {rows} queries to audit; say what is found by store.signal(query_id, 'audit', quality, tier=...)",
        highlight=False,
        markup=False,
    )


@app.command(cls=Command)
def labels(
    store: StoreUrl,
    portfolio: Annotated[Path | None, typer.Option(help="Portfolio, YAML: whose answers are the frontier's.")] = None,
    tau: Annotated[float, typer.Option(help="Quality from which an answer is good.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Chance that a bound of the labels does not hold.")] = 0.05,
    smallest_propensity: Annotated[
        float | None, typer.Option(help="That the design of the audits gives to any query, where it differs.")
    ] = None,
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
            judged = opened.judged(since_days(days))
            model = LabelModel.learn(
                judged, tau=tau, delta=delta, smallest_propensity=smallest_propensity, frontier=frontier
            )
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
    from ..replaying import replay
    from ..signals.store import TraceStore
    from ..terminal import show_replay

    with bad_input(as_json):
        loaded = valid_release(release)
        with TraceStore(store, create=False) as opened:
            since = since_days(days)
            shadowed = partial(opened.outcomes, since=since, beside="shadow", requires=loaded.portfolio.requires)
            rows = list(shadowed())
            if not rows:
                raise DataError(f"{store}: no query ran in the shadow; attach a Shadow to what serves")
            try:
                drawn = list(shadowed(labelled=True))
                reason = "none of them was audited on every tier"
            except DataError as error:
                drawn, reason = [], str(error)
        audited = [row for row in drawn if all(outcome.quality is not None for outcome in row.outcomes.values())]
        cost = replay(rows, loaded)
        quality = replay(audited, loaded) if audited else None
        unwritten = sum(not row.seen.text for row in rows)
    if as_json is not None:
        told = {
            "shadow": cost.as_dict(),
            "without_text": unwritten,
            "audited": None if quality is None else quality.as_dict(),
            "unknown": reason if quality is None else "",
        }
        write_json(told, as_json)
        return
    console = Console()
    ratio = "unknown" if cost.cost_ratio is None else f"{cost.cost_ratio:.3f}"
    console.print(
        f"{cost.queries} queries ran in the shadow: USD {cost.cost_usd:.3g} a query, {ratio} of the frontier alone",
        highlight=False,
    )
    if unwritten and loaded.policy.support:
        console.print(
            f"{unwritten} of them were kept without text, and what is unlike the outcomes goes to the frontier: with "
            "texts it would have been less",
            highlight=False,
        )
    if quality is None:
        console.print(f"What would have been kept is not known: {reason}", highlight=False, markup=False)
        return
    console.print(
        "Those that were audited on every tier; if the release was fitted on them, fresh ones will look worse:",
        highlight=False,
    )
    show_replay(console, quality)
