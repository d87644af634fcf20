"""The command line. Exit code 2 is bad input, explained in one sentence on standard error."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from . import releases, stores, distilling, others  # isort: skip  # commands are listed in this order
from .shared import app

__all__ = ["app", "distilling", "main", "others", "releases", "stores"]


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        Console().print(f"routenlp {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Route every query to the cheapest tier that is good enough, with a statistical certificate."""
