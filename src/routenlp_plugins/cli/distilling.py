"""Commands about the distillation loop: run rounds, look at versions, promote and roll back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import DataError
from .shared import AsJson, Command, StoreUrl, app, bad_input, write_json

if TYPE_CHECKING:
    from ..distill.registry import ReleaseRegistry
    from ..distill.student import Student

__all__ = ["distill", "promote", "rollback", "status"]

Folder = Annotated[Path, typer.Option("--folder", help="Of the versions and rounds.")]
FOLDER = Path("distillation")


@app.command(cls=Command)
def distill(
    store: StoreUrl,
    frontier: Annotated[str, typer.Option(help="Name of the frontier's model at an OpenAI-compatible endpoint.")],
    base_url: Annotated[str | None, typer.Option(help="Of that endpoint; else OPENAI_BASE_URL.")] = None,
    tier: Annotated[list[str] | None, typer.Option(help="TIER=MODEL: another tier, at the same endpoint.")] = None,
    release: Annotated[Path | None, typer.Option(help="Folder of the first release; once, at the beginning.")] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="TIER=PATH: the folder of a student (what its save writes), or the file of a text classifier; once, "
            "at the beginning."
        ),
    ] = None,
    folder: Folder = FOLDER,
    rounds: Annotated[
        int, typer.Option(min=1, help="At most, as long as the cost ratio changes and there is traffic.")
    ] = 1,
    abandon: Annotated[bool, typer.Option("--abandon", help="First give up a round that was begun.")] = False,
    lessons: Annotated[int, typer.Option(help="That a student is taught in a round, at most.")] = 400,
    usd: Annotated[float | None, typer.Option(help="For answers of the frontier that were not paid already.")] = None,
    retention: Annotated[
        float | None, typer.Option(help="What releases keep, as of fit; else as the first one.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="What releases keep, as of fit; else as the first one.")] = None,
    delta: Annotated[float, typer.Option(help="With --retention or --alpha: the promise holds with 1 - delta.")] = 0.1,
    usd_per_hour: Annotated[float, typer.Option(help="Of the machine that trains.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of whatever is random.")] = 0,
    html: Annotated[Path | None, typer.Option(help="A page of all rounds to write; must not exist.")] = None,
    as_json: AsJson = None,
) -> None:
    """Teach the cheap tiers what they had to escalate; what passes the gate and is certified serves from then on."""
    from ..distill.loop import DistillationLoop
    from ..distill.options import LoopOptions, Promise
    from ..distill.report import write_report
    from ..distill.selection import Budget
    from ..signals.store import TraceStore
    from ..terminal import show_round
    from ..tiers.boundary import TierCallable
    from ..tiers.openai_compatible import OpenAICompatibleTier

    with bad_input(as_json):
        if html is not None and html.exists():
            raise DataError(f"{html}: exists already and is not overwritten; choose a new file")
        if release is None and not folder.exists():
            raise DataError(f"{folder}: no such folder; give --release DIR, the release that serves, to begin one")
        promise = None if retention is None and alpha is None else Promise(alpha, retention, delta)
        options = LoopOptions(
            promise=promise, budget=Budget(lessons, usd), usd_per_hour=usd_per_hour, seed=seed, workers=4
        )
        tiers: dict[str, TierCallable] = {name: _student(path) for name, path in _pairs("--student", student or [])}
        tiers |= {name: OpenAICompatibleTier(model, base_url=base_url) for name, model in _pairs("--tier", tier or [])}
        with TraceStore(store, create=False) as opened:
            name = _frontier(folder, release)
            tiers[name] = OpenAICompatibleTier(frontier, base_url=base_url)
            loop = DistillationLoop(folder, opened, tiers, release, options)
            if abandon:
                loop.abandon()
            done = []
            for one in loop.run(rounds):
                done.append(one)
                if as_json is None:
                    show_round(Console(), one)
            if html is not None:
                write_report(loop, html)
    if as_json is not None:
        write_json([one.as_dict() for one in done], as_json)


@app.command(cls=Command)
def status(folder: Folder = FOLDER, as_json: AsJson = None) -> None:
    """Which version serves, which others there are, and what became of the rounds."""
    from ..terminal import show_versions

    with bad_input(as_json):
        registry, rounds = _registry(folder), _rounds(folder)
        serving = registry.serving
        facts = {
            "serving": None if serving is None else serving.number,
            "versions": [{"version": v.number, "created": v.created, "note": v.note} for v in registry.versions],
            "changes": [dict(change) for change in registry.changes],
            "rounds": rounds,
            "unfinished": _unfinished(folder),
        }
    if as_json is not None:
        write_json(facts, as_json)
        return
    show_versions(Console(), facts)


@app.command(cls=Command)
def promote(
    version: Annotated[int, typer.Argument(help="Number of the version.", metavar="VERSION")], folder: Folder = FOLDER
) -> None:
    """Let a version serve, whatever serves now."""
    with bad_input(None):
        _registry(folder).promote(version)
    Console().print(f"version {version} serves", highlight=False, markup=False)


@app.command(cls=Command)
def rollback(folder: Folder = FOLDER) -> None:
    """Let the version serve that did before."""
    with bad_input(None):
        found = _registry(folder).rollback()
    Console().print(f"version {found.number} serves: {found.folder}", highlight=False, markup=False, soft_wrap=True)


def _registry(folder: Path) -> ReleaseRegistry:
    from ..distill.registry import ReleaseRegistry

    if not (folder / "versions").is_dir():
        raise DataError(f"{folder}: no versions there; give the folder of a distillation loop as --folder")
    return ReleaseRegistry(folder)


def _rounds(folder: Path) -> list[dict[str, object]]:
    from ..distill.files import read_json

    names = ("number", "queries", "promoted", "refusals", "cost_usd", "break_even")
    files = sorted((folder / "rounds").glob("[0-9]*/round.json"))
    told = [read_json(file, *names, "before", "after") for file in files]
    return [
        {name: one[name] for name in names}
        | {"broken": one.get("broken")}
        | {when: one[when] and one[when]["cost_ratio"] for when in ("before", "after")}
        for one in told
    ]


def _unfinished(folder: Path) -> list[int]:
    begun = sorted((folder / "rounds").glob("[0-9]*/begun.json"))
    return [int(file.parent.name) for file in begun if not (file.parent / "round.json").exists()]


def _frontier(folder: Path, release: Path | None) -> str:
    from ..distill.registry import ReleaseRegistry
    from ..release import Release

    serving = ReleaseRegistry(folder).serving if folder.exists() else None
    if serving is not None:
        return serving.release().portfolio.frontier
    if release is None:
        raise DataError(f"{folder}: no version serves yet; give --release DIR, the release that serves, to begin one")
    return Release.load(release).portfolio.frontier


def _student(path: str) -> Student:
    from ..distill.classifier import ClassifierStudent
    from ..distill.student import load_student
    from ..tiers.text_classifier import TextClassifierTier

    where = Path(path)
    return ClassifierStudent(TextClassifierTier.load(where)) if where.is_file() else load_student(where)


def _pairs(option: str, given: list[str]) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, _, value in (one.partition("=") for one in given)]
    bad = next((f"{name}={value}" for name, value in pairs if not name or not value), None)
    if bad is not None:
        raise DataError(f"{option} {bad.strip('=')}: expected TIER=...")
    return pairs
