"""The demo and the doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .shared import AsJson, Command, app, bad_input, write_json

__all__ = ["demo", "doctor"]


@app.command(cls=Command)
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
    from ..demo import DemoOptions, run_demo

    with bad_input(as_json):
        options = DemoOptions(out, report, seed, frontier_model, (frontier_input, frontier_output))
        facts = run_demo(options, Console(stderr=as_json == "-"))
    if as_json is not None:
        write_json(facts, as_json)


@app.command(cls=Command)
def doctor(as_json: AsJson = None) -> None:
    """What this installation can do, and the command that installs what it cannot."""
    from ..doctor import examine

    with bad_input(as_json):
        findings = examine()
    if as_json is not None:
        write_json([finding.as_dict() for finding in findings], as_json)
    else:
        table = Table("what", "found")
        # what is copied is on one line
        table.add_column("to get it", no_wrap=True)
        for finding in findings:
            table.add_row(finding.name, escape(finding.found or "missing"), escape(finding.fix or ""))
        Console().print(table)
    if any(finding.needed and not finding.found for finding in findings):
        raise typer.Exit(1)
