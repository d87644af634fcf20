"""What all commands share: the application, options, and how bad input and JSON are handled."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from typer.core import TyperCommand

from ..errors import DataError, ReleaseError, RouteNLPError

if TYPE_CHECKING:
    from ..release import Release

__all__ = [
    "AsJson",
    "Command",
    "OutcomeFiles",
    "SkipBadLines",
    "StoreUrl",
    "app",
    "bad_input",
    "show_skipped",
    "since_days",
    "stop",
    "valid_release",
    "whole_file",
    "write_json",
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

OutcomeFiles = Annotated[list[Path], typer.Argument(help="Outcome files, .jsonl or .jsonl.gz.", metavar="OUTCOMES...")]
AsJson = Annotated[
    str | None, typer.Option("--json", metavar="[FILE]", help="JSON for machines, on standard output or into a file.")
]
SkipBadLines = Annotated[bool, typer.Option(help="Leave malformed lines out, and count and show them.")]
StoreUrl = Annotated[
    str, typer.Option("--store", help="The trace store: sqlite:///FILE or postgresql://USER@HOST/DATABASE.")
]


class Command(TyperCommand):
    """Lets ``--json`` stand alone: its value is left out if a flag, an outcome file or nothing follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in the value that was left out."""
        if "--json" in args:
            place = args.index("--json") + 1
            following = args[place] if place < len(args) else "--"
            of_ours = following.endswith((".jsonl", ".jsonl.gz")) or Path(following).is_dir()
            if of_ours or (following.startswith("-") and following != "-"):
                args = [*args[:place], "-", *args[place:]]
        return super().parse_args(ctx, args)


@contextmanager
def bad_input(as_json: str | None) -> Iterator[None]:
    """Ends with code 2 and a sentence on bad input; a file for the JSON that exists already is looked for first."""
    try:
        if as_json is not None and as_json != "-":
            if Path(as_json).exists():
                raise DataError(f"{as_json}: exists already and is not overwritten; choose a new file")
            if not Path(as_json).absolute().parent.is_dir():
                raise DataError(f"{as_json}: its folder does not exist; make it first")
        yield
    except RouteNLPError as error:
        stop(str(error))
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}")


def show_skipped(skipped: list[DataError]) -> None:
    """How many lines were left out, and the first of them."""
    if skipped:
        console = Console(stderr=True)
        console.print(f"{len(skipped)} malformed lines left out, the first of them:", highlight=False)
        for error in skipped[:5]:
            console.print(f"  {error}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A new file to write, which is taken away again if that does not come to its end."""
    if path.exists():
        raise DataError(f"{path}: exists already and is not overwritten; choose a new file")
    with path.open("x", encoding="utf-8") as file:
        try:
            yield file
        except (RouteNLPError, OSError, KeyboardInterrupt):
            path.unlink()
            raise


def valid_release(folder: Path, portfolio: Path | None = None) -> Release:
    """The release of a folder, of this portfolio if one is given.

    Raises:
        ReleaseError: it cannot be read, or its certificate is void.
    """
    from ..release import Release

    loaded = Release.load(folder, portfolio)
    if loaded.policy.void is not None:
        raise ReleaseError(f"{folder}: its certificate is void: {loaded.policy.void}")
    return loaded


def since_days(days: float | None) -> float | None:
    """Seconds since 1970 so many days ago; None is ever."""
    if days is not None and not 0 < days < inf:
        raise DataError(f"--days must be above 0, got {days:g}")
    return None if days is None else time() - days * 86_400


def write_json(facts: Any, target: str) -> None:
    """To standard output or into a file."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        stop(f"{target}: cannot be written ({error.strerror})")


def stop(message: str) -> NoReturn:
    """End with code 2 and a sentence."""
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)
