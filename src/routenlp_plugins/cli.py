"""The command line. Exit code 2 is bad input, explained in one sentence on standard error."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from .errors import DataError, ReleaseError, RiskNotControlledError, RouteNLPError

if TYPE_CHECKING:
    from .evaluate.outcomes import OutcomeRow
    from .portfolio import Portfolio

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

OutcomeFiles = Annotated[list[Path], typer.Argument(help="Outcome files, .jsonl or .jsonl.gz.", metavar="OUTCOMES...")]
AsJson = Annotated[
    str | None, typer.Option("--json", metavar="[FILE]", help="JSON for machines, on standard output or into a file.")
]
SkipBadLines = Annotated[bool, typer.Option(help="Leave malformed lines out, and count and show them.")]


class _Command(TyperCommand):
    """Lets ``--json`` stand alone: its value is left out if a flag, an outcome file or nothing follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--json" in args:
            place = args.index("--json") + 1
            following = args[place] if place < len(args) else "--"
            of_ours = following.endswith((".jsonl", ".jsonl.gz")) or Path(following).is_dir()
            if of_ours or (following.startswith("-") and following != "-"):
                args = [*args[:place], "-", *args[place:]]
        return super().parse_args(ctx, args)


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        Console().print(f"routenlp {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Route every query to the cheapest tier that is good enough, with a statistical certificate."""


@app.command(cls=_Command)
def fit(
    outcomes: OutcomeFiles,
    portfolio: Annotated[Path, typer.Option(help="Portfolio, YAML.")],
    release: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    retention: Annotated[
        float | None, typer.Option(help="For every task: E[quality routed] >= retention * E[quality of the frontier].")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="For every task: P(answer accepted below the frontier and quality < tau) <= alpha."),
    ] = None,
    delta: Annotated[float, typer.Option(help="The promise holds with probability 1 - delta.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    pooled: Annotated[bool, typer.Option("--pooled", help="Promise it for all tasks as one stream.")] = False,
    router: Annotated[
        bool, typer.Option("--router/--no-router", help="Let policies look at what a difficulty router predicts.")
    ] = True,
    smallest_propensity: Annotated[
        float | None, typer.Option(help="That the design gives to any query, where rows carry different propensities.")
    ] = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = None,
) -> None:
    """Find the cheapest policy that can be certified on outcomes, and write it as a release."""
    from .evaluate.outcomes import read_outcomes
    from .fitting import FitOptions
    from .fitting import fit as fit_release
    from .portfolio import Portfolio
    from .routing.difficulty import TrainingOptions
    from .terminal import show_release

    with _bad_input(as_json):
        if release.exists():
            raise ReleaseError(f"{release}: exists already and is not overwritten; choose a new folder")
        skipped: list[DataError] = []
        rows = read_outcomes(outcomes, skip_bad_lines=skip_bad_lines, skipped=skipped)
        _show_skipped(skipped)
        known = Portfolio.from_yaml(portfolio)
        _show_gaps(rows, known)
        try:
            fitted = fit_release(
                rows,
                known,
                alpha=alpha,
                retention=retention,
                delta=delta,
                seed=seed,
                options=FitOptions(
                    pooled=pooled,
                    smallest_propensity=smallest_propensity,
                    router=TrainingOptions() if router else None,
                ),
            )
        except RiskNotControlledError as error:
            fitted = error.release
        fitted.save(release)
    certificate = fitted.certificate
    if certificate is None:
        raise AssertionError("fit always certifies")
    if as_json is not None:
        facts = {"release": str(release), "skipped_lines": len(skipped), "certificate": certificate.as_dict()}
        _write_json(facts, as_json)
        return
    console = Console()
    show_release(console, fitted)
    kept = "" if certificate.certified else "; it keeps every task on the frontier"
    console.print(f"{release}: written{kept}", highlight=False, markup=False)


@app.command(cls=_Command)
def replay(
    outcomes: OutcomeFiles,
    release: Annotated[Path, typer.Option(help="Folder of the release.")],
    portfolio: Annotated[Path | None, typer.Option(help="Your portfolio; a release of another one is refused.")] = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = None,
) -> None:
    """What a release would have cost and kept on outcomes."""
    from .evaluate.outcomes import read_outcomes
    from .evaluate.table import data_hash
    from .release import Release
    from .replaying import replay as replay_release
    from .terminal import show_replay

    with _bad_input(as_json):
        loaded = Release.load(release, portfolio)
        if loaded.policy.void is not None:
            raise ReleaseError(f"{release}: its certificate is void: {loaded.policy.void}")
        skipped: list[DataError] = []
        rows = read_outcomes(outcomes, skip_bad_lines=skip_bad_lines, skipped=skipped)
        _show_skipped(skipped)
        result = replay_release(rows, loaded)
    if as_json is not None:
        _write_json(result.as_dict(), as_json)
        return
    console = Console()
    show_replay(console, result)
    if loaded.certificate is not None and loaded.certificate.data_hash == data_hash(rows):
        console.print(
            "The release was fitted on these outcomes, and its router has learned from some of them: fresh ones will "
            "look worse. The cost ratio of the certificate is of rows that nothing was decided on.",
            highlight=False,
        )


@app.command(cls=_Command)
def show(
    release: Annotated[Path, typer.Argument(help="Folder of the release.")],
    as_json: AsJson = None,
) -> None:
    """What a release decides, what it promises, and what is checked while it serves."""
    from .release import Release
    from .terminal import show_release

    with _bad_input(as_json):
        loaded = Release.load(release)
    if as_json is not None:
        certificate = loaded.certificate
        facts = {"void": loaded.policy.void, "certificate": None if certificate is None else certificate.as_dict()}
        _write_json(facts, as_json)
        return
    show_release(Console(), loaded)


@app.command("import", cls=_Command)
def import_(
    files: Annotated[list[Path], typer.Argument(help="JSON lines, .jsonl or .jsonl.gz.", metavar="FILES...")],
    store: Annotated[str, typer.Option(help="The trace store: sqlite:///FILE or postgresql://USER@HOST/DATABASE.")],
    form: Annotated[str, typer.Option("--format", help="openai, langsmith or outcomes.")],
    portfolio: Annotated[Path | None, typer.Option(help="Portfolio, YAML: prices, and who the frontier is.")] = None,
    task: Annotated[str, typer.Option(help="Of records that name none.")] = "default",
    tier: Annotated[list[str] | None, typer.Option(help="MODEL=TIER, where a model is not the frontier.")] = None,
    redact: Annotated[str | None, typer.Option(help="drop or hash: what becomes of texts.")] = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = None,
) -> None:
    """Read what others have recorded into a trace store."""
    from .portfolio import Portfolio
    from .signals.importing import import_traces
    from .signals.records import ImportOptions
    from .signals.store import TraceStore

    with _bad_input(as_json):
        named = dict(one.partition("=")[::2] for one in tier or ())
        for model, name in named.items():
            if not name:
                raise DataError(f"--tier {model}: expected MODEL=TIER")
        known = None if portfolio is None else Portfolio.from_yaml(portfolio)
        with TraceStore(store, cast("Any", redact)) as opened:
            done = import_traces(opened, files, form, ImportOptions(known, task, named, skip_bad_lines))
    if as_json is not None:
        _write_json({"traces": done.traces, "signals": done.signals, "skipped_lines": done.skipped}, as_json)
        return
    left = f", {done.skipped} lines left out" if done.skipped else ""
    Console().print(f"{done.traces} traces and {done.signals} signals read{left}", highlight=False)


@app.command(cls=_Command)
def export(
    outcomes: Annotated[Path, typer.Argument(help="Outcome file to write, .jsonl; must not exist.", metavar="FILE")],
    store: Annotated[str, typer.Option(help="The trace store: sqlite:///FILE or postgresql://USER@HOST/DATABASE.")],
    beside: Annotated[str | None, typer.Option(help="Only traces with calls of this purpose: shadow or audit.")] = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Only rows with a quality.")] = False,
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """Write the traces of a store as outcomes; their quality is what audits say."""
    from time import time

    from .evaluate.outcomes import outcome_line
    from .signals.store import TraceStore

    with _bad_input(as_json):
        if outcomes.exists():
            raise DataError(f"{outcomes}: exists already and is not overwritten; choose a new file")
        rows = known = 0
        with TraceStore(store, create=False) as opened, outcomes.open("x", encoding="utf-8") as file:
            since = None if days is None else time() - days * 86_400
            for row in opened.outcomes(since=since, beside=beside, labelled=labelled):
                file.write(outcome_line(row) + "\n")
                rows += 1
                known += any(outcome.quality is not None for outcome in row.outcomes.values())
    if as_json is not None:
        _write_json({"rows": rows, "rows_with_quality": known}, as_json)
        return
    Console().print(f"{outcomes}: {rows} rows, {known} of them with a quality", highlight=False, markup=False)


@app.command(cls=_Command)
def report(
    store: Annotated[str, typer.Option(help="The trace store: sqlite:///FILE or postgresql://USER@HOST/DATABASE.")],
    portfolio: Annotated[Path, typer.Option(help="Portfolio, YAML: its prices hold where none was recorded.")],
    days: Annotated[float | None, typer.Option(help="Only the last so many days.")] = None,
    as_json: AsJson = None,
) -> None:
    """What happened: calls, cost, what was saved and how sure that is, and what a store holds."""
    from time import time

    from .portfolio import Portfolio
    from .signals.ledger import ledger
    from .signals.store import TraceStore
    from .terminal import show_ledger

    with _bad_input(as_json):
        known = Portfolio.from_yaml(portfolio)
        with TraceStore(store, create=False) as opened:
            bill = ledger(opened, known, None if days is None else time() - days * 86_400)
            counts = opened.counts()
    if as_json is not None:
        _write_json({"counts": counts.as_dict(), "ledger": bill.as_dict()}, as_json)
        return
    show_ledger(Console(), bill, counts)


@app.command(cls=_Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for outcomes and release; must not exist.")] = Path("demo-output"),
    report: Annotated[Path, typer.Option(help="The HTML report; must not exist.")] = Path("demo-report.html"),
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    frontier_model: Annotated[
        str, typer.Option(help="Model at OPENAI_BASE_URL, if that and a key are set.")
    ] = "gpt-4o",
    frontier_input: Annotated[float, typer.Option(help="Its USD per million input tokens.")] = 2.5,
    frontier_output: Annotated[float, typer.Option(help="Its USD per million output tokens.")] = 10.0,
    as_json: AsJson = None,
) -> None:
    """A chain that exists without us, routed over real local models, from collecting to the next day's bill."""
    from .demo import DemoOptions, run_demo

    with _bad_input(as_json):
        options = DemoOptions(out, report, seed, frontier_model, (frontier_input, frontier_output))
        facts = run_demo(options, Console(stderr=as_json == "-"))
    if as_json is not None:
        _write_json(facts, as_json)


@app.command(cls=_Command)
def doctor(as_json: AsJson = None) -> None:
    """What this installation can do, and the command that installs what it cannot."""
    from .doctor import examine

    with _bad_input(as_json):
        findings = examine()
    if as_json is not None:
        _write_json([finding.as_dict() for finding in findings], as_json)
    else:
        table = Table("what", "found", "to get it")
        for finding in findings:
            table.add_row(finding.name, escape(finding.found or "missing"), escape(finding.fix or ""))
        Console().print(table)
    if any(finding.needed and not finding.found for finding in findings):
        raise typer.Exit(1)


@contextmanager
def _bad_input(as_json: str | None) -> Iterator[None]:
    """Ends with code 2 and a sentence on bad input; a file for the JSON that exists already is looked for first."""
    try:
        if as_json is not None and as_json != "-":
            if Path(as_json).exists():
                raise DataError(f"{as_json}: exists already and is not overwritten; choose a new file")
            if not Path(as_json).absolute().parent.is_dir():
                raise DataError(f"{as_json}: its folder does not exist; make it first")
        yield
    except RouteNLPError as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"{error.filename}: {error.strerror}")


def _show_skipped(skipped: list[DataError]) -> None:
    if skipped:
        console = Console(stderr=True)
        console.print(f"{len(skipped)} malformed lines left out, the first of them:", highlight=False)
        for error in skipped[:5]:
            console.print(f"  {error}", highlight=False, markup=False, soft_wrap=True)


def _show_gaps(rows: Sequence[OutcomeRow], portfolio: Portfolio) -> None:
    """What the outcomes lack, and what follows from that."""
    console = Console(stderr=True)
    answers, unknown = Counter[str](), Counter[str]()
    queries, unwritten = Counter[str](), Counter[str]()
    asked = Counter[tuple[str, str]]()
    known = {task.name for task in portfolio.tasks}
    for row in rows:
        task = row.query.task or ""
        queries[task] += 1
        unwritten[task] += not row.seen.text
        for tier, outcome in row.outcomes.items():
            asked[task, tier] += 1
            if outcome.error is None:
                answers[tier] += 1
                unknown[tier] += outcome.quality is None
    lines = [
        f"{unknown[tier]} of {answers[tier]} answers of {tier} have no quality: where a promise needs it, the worst is "
        "assumed"
        for tier in answers
        if unknown[tier]
    ]
    lines += [
        f"task {task!r}: {unwritten[task]} of {count} queries have no text: no router is learned for the task, and "
        "whether queries are like these is not checked; give the texts, or leave the queries out"
        for task, count in queries.items()
        if unwritten[task]
    ]
    lines += [
        f"task {task!r}: {tier} was asked {asked[task, tier] or 'none'} of {count} queries: "
        + ("where it was not, the worst is assumed" if asked[task, tier] else "it is left out")
        for task, count in queries.items()
        for tier in (portfolio.below_frontier(task) if task in known else ())
        if asked[task, tier] < count
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _write_json(facts: Any, target: str) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        _stop(f"{target}: cannot be written ({error.strerror})")


def _stop(message: str) -> NoReturn:
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)
