"""Fit a release with the new students on labels of their own, and compare it with the one that serves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from ..errors import RiskNotControlledError
from ..evaluate.outcomes import OutcomeRow
from ..evaluate.units import split
from ..fitting import fit
from ..release import Release
from ..replaying import Replay, replay
from .asking import rows_of
from .files import read_json, write_json
from .options import Promise
from .student import Student
from .work import Work

__all__ = ["certify"]


def certify(work: Work, new: Mapping[str, Student]) -> tuple[dict[str, Any], list[str]]:
    """Fit, and write the release into the round's folder.

    Args:
        new: tier -> the student that passed the gate; the others stay as they are.

    Returns:
        Facts of a `Round`, and why the release must not serve.
    """
    file = work.folder / "certified.json"
    if not file.exists():
        served = work.parts["certification"]
        frontier = work.of_frontier(served, "certification", again=work.options.ask_again)
        below = {name: tier for name, tier in work.tiers.items() if name != work.frontier}
        old = {name: work.asked(name, tier, served, "certify-old") for name, tier in below.items()}
        now = {name: work.asked(name, new[name], served, "certify-new") if name in new else old[name] for name in below}

        def rows(asked: Mapping[str, Any]) -> list[OutcomeRow]:
            return rows_of(served, {**asked, work.frontier: frontier}, work.frontier, work.quality, work.portfolio)

        write_json(file, _compared(work, rows(old), rows(now)))
    facts = read_json(file)
    return facts["ended"], facts["refusals"]


def _compared(work: Work, before: list[OutcomeRow], rows: list[OutcomeRow]) -> dict[str, Any]:
    promise, how, folder = work.options.promised(work.release), work.options.fit, work.folder / "release"
    # what an interruption left
    shutil.rmtree(folder, ignore_errors=True)
    if not rows:
        return {"ended": {}, "refusals": ["no fresh query to certify on"]}
    said = {"alpha": promise.alpha, "retention": promise.retention, "delta": promise.delta}
    try:
        release = fit(rows, work.portfolio, **said, seed=work.seed, options=how)  # type: ignore[arg-type]
    except RiskNotControlledError as error:
        return {"ended": {}, "refusals": [f"nothing can be certified: {error}"]}
    release.save(folder)
    reporting = {row.query.id for row in split(rows, how.split, work.seed, pooled=how.pooled)["reporting"]}

    def on_fresh(rows: list[OutcomeRow], release: Release) -> Any:
        return replay([row for row in rows if row.query.id in reporting], release, how.comparators)

    old, now = on_fresh(before, work.release), on_fresh(rows, release)
    broken = _broken(replay(before, work.release, how.comparators), promise)
    ended = {
        "before": old.as_dict(),
        "after": now.as_dict(),
        "certified": None if release.certificate is None else release.certificate.claim,
    }
    # what no longer keeps its promise is no bargain
    if broken or now.cost_usd <= old.cost_usd:
        return {"ended": {**ended, "broken": broken}, "refusals": []}
    why = f"it would cost {now.cost_ratio:.4f} of the frontier alone, and what serves costs {old.cost_ratio:.4f}"
    return {"ended": ended, "refusals": [why]}


def _broken(serving: Replay, promise: Promise) -> str | None:
    """What shows, on queries that nothing was decided on, that the release that serves does not keep the promise."""
    if promise.retention is not None and (serving.quality_ratio or 1.0) < promise.retention:
        return f"it kept {serving.quality_ratio:.4f} of the frontier's quality on {serving.queries} fresh queries"
    rates = serving.violation_rate_by_task
    if promise.alpha is not None and rates and max(rates.values()) > promise.alpha:
        return f"it violated {max(rates.values()):.4f} on fresh queries of a task, {serving.queries} in all"
    return None
