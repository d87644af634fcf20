"""Fit a release with the new students on labels of their own, and compare it with the one that serves."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

from ..cascade.bounds import betting_p_value
from ..errors import RiskNotControlledError
from ..evaluate.outcomes import OutcomeRow
from ..evaluate.table import quality_floors
from ..evaluate.units import split
from ..fitting import fit
from ..release import Release
from ..replaying import Replay, replay, replayed
from .asking import Asked, rows_of
from .files import read_json, write_json
from .options import Promise
from .student import Student
from .work import Work

__all__ = ["certify"]

LEVEL = 0.05


def certify(work: Work, new: Mapping[str, Student]) -> tuple[dict[str, Any], list[str]]:
    """Fit, and write the release into the round's folder.

    Args:
        new: tier -> the student that passed the gate; the others stay as they are.

    Returns:
        Facts of a `Round`, and why the release must not serve.
    """
    file = work.folder / "certified.json"
    if not file.exists():
        labels = {part: work.labels(part) for part in ("certification", "gate")}
        silent = [why for part, of in labels.items() if (why := work.silence(part, of)) is not None]
        if silent:
            found: dict[str, Any] = {"ended": {}, "refusals": silent}
        else:
            certification = _answered(work, new, "certification", "certify", labels["certification"])
            found = _compared(work, *certification, *_answered(work, new, "gate", "gate", labels["gate"]))
        found["ended"]["unanswered"] = dict(Counter(why for of in labels.values() for why in of.no_answer.values()))
        write_json(file, found)
    facts = read_json(file)
    return facts["ended"], facts["refusals"]


def _answered(
    work: Work, new: Mapping[str, Student], part: str, about: str, frontier: Asked
) -> tuple[list[OutcomeRow], list[OutcomeRow]]:
    """A part, labelled, with the answers of the tiers as they are, and as they would be."""
    old, now = {}, {}
    for name, tier in work.tiers.items():
        if name != work.frontier:
            served = work.judging(name, frontier) if part == "gate" else work.parts[part]
            old[name] = now[name] = work.asked(name, tier, served, f"{about}-old")
            if name in new:
                now[name] = work.asked(name, new[name], served, f"{about}-new")

    def rows(asked: Mapping[str, Asked]) -> list[OutcomeRow]:
        every = {**asked, work.frontier: frontier}
        return rows_of(work.parts[part], every, work.frontier, work.quality, work.portfolio)

    return rows(old), rows(now)


def _compared(
    work: Work, before: list[OutcomeRow], rows: list[OutcomeRow], judged: list[OutcomeRow], judged_new: list[OutcomeRow]
) -> dict[str, Any]:
    promise, how, folder = work.options.promised(work.release, work.number), work.options.fit, work.folder / "release"
    # what an interruption left
    shutil.rmtree(folder, ignore_errors=True)
    left = {row.query.task for row in rows}
    certificate = work.release.certificate
    unseen = [task for task in (certificate.certified if certificate else ()) if task not in left]
    if not rows or unseen:
        about = f" of {', '.join(unseen)}, which would go back to the frontier" if unseen else ""
        return {"ended": {}, "refusals": [f"no fresh query to certify on{about}"]}
    said = {"alpha": promise.alpha, "retention": promise.retention, "delta": promise.delta}
    try:
        release = fit(rows, work.portfolio, **said, seed=work.seed, options=how)  # type: ignore[arg-type]
    except RiskNotControlledError as error:
        return {"ended": {}, "refusals": [f"nothing can be certified: {error}"]}
    release.save(folder)
    reporting = {row.query.id for row in split(rows, how.split, work.seed, pooled=how.pooled)["reporting"]}

    def on_fresh(rows: list[OutcomeRow], judged: list[OutcomeRow], release: Release) -> Replay:
        """Also on those that judged the student: of the policy they have decided nothing, and they are more."""
        return replay([*judged, *(row for row in rows if row.query.id in reporting)], release, how.comparators)

    old, now = on_fresh(before, judged, work.release), on_fresh(rows, judged_new, release)
    broken = _broken(work, [*before, *judged], promise)
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


def _broken(work: Work, rows: Sequence[OutcomeRow], promise: Promise) -> str | None:
    """What shows, on queries that nothing was decided on, that the release that serves does not keep the promise.

    Tests at level .05, Bonferroni over the tasks; a promise that is only just kept is kept.
    """
    found: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    floors = quality_floors(rows, work.portfolio)
    for row, predicted in zip(rows, work.release.difficulty([row.seen for row in rows]), strict=True):
        task = "" if work.options.fit.pooled else row.query.task or ""
        tier = replayed(row, work.release, work.options.fit.comparators, predicted).tier
        quality = row.outcomes[tier].quality or 0.0
        floor = floors[row.query.task or ""]
        found[task].append((tier != work.frontier and quality < (1.0 if floor is None else floor), quality))
    for task, seen in found.items():
        n, level, where = len(seen), LEVEL / len(found), f" of task {task!r}" if task else ""
        bad = sum(below for below, _ in seen)
        if promise.alpha is not None and binom.sf(bad - 1, n, promise.alpha) <= level:
            return f"{bad} of {n} fresh queries{where} were answered badly below the frontier, not {promise.alpha:g}"
        if promise.retention is not None:
            # the frontier agrees with itself: its quality is 1
            kept = np.array([quality for _, quality in seen])
            p = betting_p_value((kept - promise.retention)[:, None], np.array([1 - promise.retention]), level)
            if p[0] <= level:
                return f"it kept {kept.mean():.4f} of the frontier's quality on {n} fresh queries{where}"
    return None
