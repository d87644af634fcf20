"""A new certificate for tasks whose old one has expired, from the audits that went on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cascade.adaptive import AdaptiveLevel, shifted
from .cascade.candidate import Candidate
from .cascade.certificate import Certificate, Proof
from .cascade.certification import Stream, certify
from .cascade.risks import Answered, Risk, risk_of
from .cascade.search import Path as Candidates
from .cascade.search import Point
from .comparing import Comparator
from .errors import DataError, RiskNotControlledError
from .evaluate.outcomes import OutcomeRow, Outcomes, outcome_rows
from .evaluate.table import data_hash, task_tables
from .evaluate.units import check_design, unit_interval
from .policy import Policy
from .release import Release, fingerprint
from .watching import Watch, charged, excess_of

__all__ = ["audits_after_alarm", "renew"]
GROWTH = 1.5
"""From one look at the fresh audits to the next."""
STRICTER = (3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25, 0.0, -0.25, -0.5)
"""Log-odds around the adaptive level, from safe to cheap, at which a ladder is tested again."""


def renew(
    release: Release | str | Path,
    audits: Outcomes,
    *,
    delta: float | None = None,
    level: AdaptiveLevel | None = None,
    comparators: Mapping[str, Comparator] | None = None,
) -> Release:
    """Certify the ladders of expired tasks again, with thresholds that the audits propose.

    The audits up to the alarm move an adaptive level, which proposes thresholds; those after it, on which nothing was
    decided, test ladders around that level from strict to lenient. Tasks whose certificate holds keep it.

    It may be called as often as you like while audits come in. The fresh ones are looked at when they are just enough
    for a proof and whenever they have grown by half; look k = 1, 2, ... spends 1 / (k (k + 1)) of the task's delta on
    the audits up to there, so that all looks that are ever taken spend no more than delta. Of the policies that passed
    at any look the cheapest is taken: what passes with few audits is strict. If the old evidence tells good answers
    from bad no more, nothing passes: fit a new release on `audits_after_alarm` then.

    Args:
        release: as it was certified, not as it serves, or the folder it was saved in.
        audits: the log of an `Auditor`, or all its rows in the order in which they came.
        delta: that of the auditor's options, if it was given there.
        level: step and floor of the adaptive level.

    Raises:
        DataError: no certificate has expired on these audits, or they are of another release.
        RiskNotControlledError: nothing passed; its release keeps the expired tasks on the frontier.
    """
    release = Release.given(release)
    certificate = release.certificate
    rows = outcome_rows(audits)
    check_design(rows, None)
    before, after = _at_the_alarm(release, rows, delta, comparators)
    if certificate is None or not before:
        raise DataError("renew: no certificate has expired on these audits")
    risk = risk_of(certificate.risk, certificate.level)
    proofs: list[Proof] = []
    climbing = _climbing(release.policy)
    for proof in certificate.proofs:
        if proof.tasks not in before:
            proofs.append(proof)
            continue
        seen, share = before[proof.tasks], proof.delta or certificate.delta
        shift = _proposed(release, seen, risk, level or AdaptiveLevel(), comparators)
        path = _path(release, proof.tasks, shift, risk, _Replays(release, seen, comparators))
        replays = _Replays(release, after[proof.tasks], comparators)
        looks = [_Look.of(replays, n) for n in _sizes(risk, len(replays.rows), share)]
        chosen, renewed = _cheapest(risk, looks, path, share)
        proofs.append(replace(renewed, tasks=proof.tasks, delta=share))
        climbing = {task: candidate for task, candidate in climbing.items() if task not in proof.tasks} | dict(chosen)
    policy = Candidate.policy(release.policy, climbing)
    renewal = replace(release, policy=policy, certificate=_renewed(certificate, tuple(proofs), policy, rows))
    tried = [proof for proof in proofs if proof.tasks in before]
    if not any(proof.status == "certified" for proof in tried):
        reasons = "; ".join(proof.reason for proof in tried)
        raise RiskNotControlledError(f"no expired task can be certified again: {reasons}", renewal)
    return renewal


def audits_after_alarm(
    release: Release | str | Path,
    audits: Outcomes,
    *,
    delta: float | None = None,
    comparators: Mapping[str, Comparator] | None = None,
) -> list[OutcomeRow]:
    """The audits of each expired task since its alarm: what a new release may be fitted on.

    Those before it are partly of the time when all was well, and a certificate on them would speak of that time too.

    Args:
        release, audits, delta: as for `renew`.

    Raises:
        DataError: no certificate has expired on these audits, or they are of another release.
    """
    rows = outcome_rows(audits)
    _, after = _at_the_alarm(Release.given(release), rows, delta, comparators)
    if not after:
        raise DataError("audits_after_alarm: no certificate has expired on these audits")
    fresh = {row.query.id for of in after.values() for row in of}
    return [row for row in rows if row.query.id in fresh]


Parts = dict[tuple[str, ...], list[OutcomeRow]]


def _at_the_alarm(
    release: Release,
    audits: Sequence[OutcomeRow],
    delta: float | None,
    comparators: Mapping[str, Comparator] | None,
) -> tuple[Parts, Parts]:
    """The audits of expired tasks up to their alarm, and after it."""
    watch = Watch.over(release, delta)
    before: Parts = {tasks: [] for tasks in watch.monitors}
    after: Parts = {tasks: [] for tasks in watch.monitors}
    for row in audits:
        tasks = watch.proof_of(row.query.task)
        if tasks is not None:
            (after if watch.monitors[tasks].expired else before)[tasks].append(row)
            watch = watch.after(row, comparators)
    expired = [tasks for tasks, monitor in watch.monitors.items() if monitor.expired]
    return {tasks: before[tasks] for tasks in expired}, {tasks: after[tasks] for tasks in expired}


class _Replays:
    """What ladders do on audited rows, by the flow itself, so that what is tested is what will serve.

    A cheap call that failed is charged as `fit` does: it might come next time, and be anything.
    """

    def __init__(
        self, release: Release, rows: Sequence[OutcomeRow], comparators: Mapping[str, Comparator] | None
    ) -> None:
        self.release = release
        self.rows = rows
        self.comparators = comparators
        self._difficulty = release.difficulty([row.seen for row in rows])
        self._known: dict[tuple[tuple[str, Candidate], ...], Answered] = {}

    def under(self, candidates: Mapping[str, Candidate]) -> Answered:
        """In the order of the rows; a task without a candidate stays on the frontier."""
        key = tuple(sorted(candidates.items(), key=lambda item: item[0]))
        if key not in self._known:
            serving = replace(self.release, policy=Candidate.policy(self.release.policy, candidates), certificate=None)
            parts = [
                charged(row, serving, self.comparators, predicted)
                for row, predicted in zip(self.rows, self._difficulty, strict=True)
            ]
            self._known[key] = Answered.together(parts, np.arange(len(parts)))
        return self._known[key]


@dataclass(frozen=True, kw_only=True)
class _Look(Stream):
    """The first rows of what came in, in order of a hash."""

    replays: _Replays
    places: NDArray[np.intp]

    @classmethod
    def of(cls, replays: _Replays, n: int) -> _Look:
        rows, release = replays.rows[:n], replays.release
        draws = unit_interval([row.unit for row in rows], 0, "order of audits")
        tables = task_tables(rows, release.portfolio, comparators=replays.comparators, policy=release.policy)
        return cls(tables, replays=replays, places=np.argsort(draws, kind="stable"))

    def under(self, candidate: Mapping[str, Candidate]) -> Answered:
        return Answered.together([self.replays.under(candidate)], self.places)


def _sizes(risk: Risk, n: int, delta: float) -> list[int]:
    """How many rows there were at each look up to now; all there are before the first."""
    sizes = []
    size = float(risk.fewest_rows(delta / 2))
    while ceil(size) <= n:
        sizes.append(ceil(size))
        size *= GROWTH
    return sizes or [n]


def _cheapest(
    risk: Risk, looks: Sequence[_Look], path: Candidates, delta: float
) -> tuple[Mapping[str, Candidate], Proof]:
    """What is cheapest of all that passed at some look; where nothing did, why not at the last."""
    best: tuple[Mapping[str, Candidate], Proof] | None = None
    least = 1.0  # what always escalates breaks no promise
    reason = ""
    for k, stream in enumerate(looks, start=1):
        chosen, (proof,) = certify(risk, [(stream, [path])], delta / (k * (k + 1)))
        if not chosen:
            reason = proof.reason
            continue
        # to take less than passed is always allowed, whatever it is judged by
        rows = looks[-1].replays.under(chosen)
        if rows.mean(risk.excess(rows)) > 0:
            reason = f"what passed with {len(stream)} audits does not keep the promise on all {len(rows.cost)}"
        elif rows.cost_ratio >= 1:
            reason = "what passes is no cheaper than the frontier"
        elif rows.cost_ratio < least:
            best, least = (chosen, proof), rows.cost_ratio
    return best or ({}, replace(proof, status="frontier", reason=reason))


def _proposed(
    release: Release,
    rows: Sequence[OutcomeRow],
    risk: Risk,
    level: AdaptiveLevel,
    comparators: Mapping[str, Comparator] | None,
) -> float:
    """Where the adaptive level stands after these rows."""
    for row in rows:
        task = row.query.task or ""
        moved = {task: shifted(Candidate.of(release.policy, task), level.shift)}
        policy = Candidate.policy(release.policy, _climbing(release.policy) | moved)
        excess = excess_of(row, replace(release, policy=policy, certificate=None), risk, comparators)
        level = level.update(excess)
    return level.shift


def _climbing(policy: Policy) -> dict[str, Candidate]:
    """What the tasks do that leave the frontier."""
    return {task: Candidate.of(policy, task) for task, rungs in policy.ladders.items() if rungs}


def _path(release: Release, tasks: Sequence[str], shift: float, risk: Risk, seen: _Replays) -> Candidates:
    """The old ladders around the proposed level, from strict to lenient, as they did on the rows before the alarm."""
    points = []
    for extra in STRICTER:
        moved = {task: shifted(Candidate.of(release.policy, task), shift + extra) for task in tasks}
        routed = {task: candidate for task, candidate in moved.items() if candidate.rungs}
        rows = seen.under(routed)
        excess = risk.excess(rows)
        if routed:
            points.append(Point(routed, rows.mean(excess), rows.mean(excess**2), rows.mean(rows.cost)))
    return tuple(points)


def _renewed(
    certificate: Certificate, proofs: tuple[Proof, ...], policy: Policy, audits: Sequence[OutcomeRow]
) -> Certificate:
    return replace(
        certificate,
        proofs=proofs,
        policy=fingerprint(policy),
        data_hash=data_hash(audits),
        date=datetime.now(UTC).date().isoformat(),
    )
