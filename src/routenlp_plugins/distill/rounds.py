"""One round, step by step. Each step leaves a file, so that a round that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from ..evaluate.outcomes import read_outcomes
from .certifying import certify
from .files import file_name, read_json, write_json
from .registry import ReleaseRegistry, Version, loaded
from .results import Bill, Round, Taught
from .teaching import new_student, teach
from .work import Work

__all__ = ["run_round"]


def run_round(work: Work, registry: ReleaseRegistry) -> Round:
    """Harvest, choose, teach, judge, certify, promote; or what is left of that."""
    file = work.folder / "round.json"
    if file.exists():
        return Round.from_dict(read_json(file))
    begun = perf_counter()
    told = [teach(work, tier) for tier in work.students]
    refusals = [f"{one.tier}: {why}" for one in told for why in one.refusals]
    if not told:
        refusals.append("no tier below the frontier can be taught: give it as a student")
    passed = {one.tier: new_student(work, one.tier) for one in told if one.passed}
    ended: dict[str, Any] = {}
    version = None
    # what routes nothing yet may do so with the students as they are
    if passed or not any(work.release.policy.ladders.values()):
        ended, against = certify(work, passed)
        if not against:
            version, against = _promoted(work, registry)
        refusals += against
    done = Round(
        number=work.number,
        since=work.window[0],
        until=work.window[1],
        queries=len(work.harvested.served),
        left_out=work.harvested.left_out,
        students=tuple(told),
        promoted=None if version is None else version.number,
        refusals=tuple(refusals),
        bill=_bill(work, told),
        seconds=perf_counter() - begun,
        **ended,
    )
    write_json(file, done.as_dict())
    return done


def _promoted(work: Work, registry: ReleaseRegistry) -> tuple[Version | None, list[str]]:
    """Keep and promote, once; not against what somebody has decided meanwhile."""
    note = f"round {work.number}, {work.id}"
    known = next((version for version in registry.versions if version.note == note), None)
    if known is None:
        students = {tier: new_student(work, tier) for tier in work.students}
        known = registry.add(loaded(work.folder / "release", *work.options.encoders), students, note)
    if registry.promote(known.number, instead_of=work.base.number):
        return known, []
    return None, [
        f"version {known.number} was made and is kept, but version {work.base.number}, with which the round began, "
        f"serves no longer, or was returned to; `routenlp promote {known.number}` if you want it"
    ]


def _bill(work: Work, told: Sequence[Taught]) -> Bill:
    """From the files of the round, so that no interruption loses anything."""
    spent = {"teacher": 0.0, "labels": 0.0, "students": 0.0}
    frontier = file_name(work.frontier)
    of_frontier = {f"teacher-{file_name(tier)}-{frontier}": "teacher" for tier in work.students}
    of_frontier |= {f"{part}-{frontier}": "labels" for part in ("gate", "certification")}
    asked = ("teacher-", "teaching-", "gate-", "certification-", "certify-")
    for file in sorted(work.folder.glob("*.jsonl")):
        if file.name.startswith(asked):
            usd = sum(o.completion.cost_usd or 0.0 for row in read_outcomes(file) for o in row.outcomes.values())
            spent[of_frontier.get(file.stem, "students")] += usd
    # waiting for others to train is no use of a machine
    local = [one for one in told if not hasattr(work.students[one.tier], "training_usd")]
    here = sum(one.seconds for one in local) / 3600 * work.options.usd_per_hour
    unknown = tuple(one.tier for one in told if one.usd is None)
    return Bill(**spent, training=here + sum(one.usd or 0.0 for one in told), unknown=unknown)
