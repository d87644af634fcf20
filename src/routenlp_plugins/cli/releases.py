"""Commands about releases: find, replay, show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import DataError, ReleaseError, RiskNotControlledError
from .shared import AsJson, Command, OutcomeFiles, SkipBadLines, app, bad_input, show_skipped, valid_release, write_json

if TYPE_CHECKING:
    from ..evaluate.outcomes import OutcomeRow
    from ..portfolio import Portfolio

__all__ = ["fit", "replay", "show"]


@app.command(cls=Command)
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
    from ..evaluate.outcomes import read_outcomes
    from ..fitting import FitOptions
    from ..fitting import fit as fit_release
    from ..portfolio import Portfolio
    from ..routing.difficulty import TrainingOptions
    from ..terminal import show_release

    with bad_input(as_json):
        if release.exists():
            raise ReleaseError(f"{release}: exists already and is not overwritten; choose a new folder")
        skipped: list[DataError] = []
        rows = read_outcomes(outcomes, skip_bad_lines=skip_bad_lines, skipped=skipped)
        show_skipped(skipped)
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
        write_json(facts, as_json)
        return
    console = Console()
    show_release(console, fitted)
    kept = "" if certificate.certified else "; it keeps every task on the frontier"
    console.print(f"{release}: written{kept}", highlight=False, markup=False)


@app.command(cls=Command)
def replay(
    outcomes: OutcomeFiles,
    release: Annotated[Path, typer.Option(help="Folder of the release.")],
    portfolio: Annotated[Path | None, typer.Option(help="Your portfolio; a release of another one is refused.")] = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = None,
) -> None:
    """What a release would have cost and kept on outcomes."""
    from ..evaluate.outcomes import read_outcomes
    from ..evaluate.table import data_hash
    from ..replaying import replay as replay_release
    from ..terminal import show_replay

    with bad_input(as_json):
        loaded = valid_release(release, portfolio)
        skipped: list[DataError] = []
        rows = read_outcomes(outcomes, skip_bad_lines=skip_bad_lines, skipped=skipped)
        show_skipped(skipped)
        result = replay_release(rows, loaded)
    if as_json is not None:
        write_json(result.as_dict(), as_json)
        return
    console = Console()
    show_replay(console, result)
    if loaded.certificate is not None and loaded.certificate.data_hash == data_hash(rows):
        console.print(
            "The release was fitted on these outcomes, and its router has learned from some of them: fresh ones will "
            "look worse. The cost ratio of the certificate is of rows that nothing was decided on.",
            highlight=False,
        )


@app.command(cls=Command)
def show(
    release: Annotated[Path, typer.Argument(help="Folder of the release.")],
    as_json: AsJson = None,
) -> None:
    """What a release decides, what it promises, and what is checked while it serves."""
    from ..release import Release
    from ..terminal import show_release

    with bad_input(as_json):
        loaded = Release.load(release)
    if as_json is not None:
        certificate = loaded.certificate
        facts = {"void": loaded.policy.void, "certificate": None if certificate is None else certificate.as_dict()}
        write_json(facts, as_json)
        return
    show_release(Console(), loaded)


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
