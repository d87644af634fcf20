"""A new certificate for tasks whose old one has expired, from the audits that went on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from .auditing import Watch, excess_of
from .cascade.adaptive import AdaptiveLevel, shifted
from .cascade.certificate import Certificate, Proof
from .cascade.certification import Stream, certify
from .cascade.risks import Risk, risk_of
from .cascade.search import Candidate, Path, Point
from .comparing import Comparator
from .errors import DataError, RiskNotControlledError
from .evaluate.outcomes import OutcomeRow
from .evaluate.table import data_hash, task_tables
from .evaluate.units import check_design, one_row_per_unit
from .fitting import Outcomes, outcome_rows
from .release import Release, fingerprint
from .types import Policy

__all__ = ["renew"]

STRICTER = (3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25, 0.0, -0.25, -0.5)
"""Log-odds around the adaptive level, from safe to cheap, at which a ladder is tested again."""


def renew(
    release: Release,
    audits: Outcomes,
    *,
    attempt: int = 1,
    level: AdaptiveLevel | None = None,
    comparators: Mapping[str, Comparator] | None = None,
) -> Release:
    """Certify the ladders of expired tasks again, with thresholds that the audits propose.

    The audits up to the alarm move an adaptive level, which proposes thresholds; those after it, on which nothing was
    decided, test ladders around that level from strict to lenient. Tasks whose certificate holds keep it. What passes
    with few audits is strict; with more of them the next attempt may pass with a cheaper policy. If the old evidence
    tells good answers from bad no more, nothing passes: fit a new release on the fresh audits then.

    Args:
        release: as it was certified, not as it serves.
        audits: the log of an `Auditor`, or all its rows in the order in which they came.
        attempt: 1, 2, ...: how often this was tried. Each try spends its own share of delta, 1 / (k (k + 1)).
        level: step and floor of the adaptive level.

    Raises:
        DataError: no certificate has expired on these audits.
        RiskNotControlledError: nothing passed; its release keeps the expired tasks on the frontier.
    """
    if isinstance(attempt, bool) or not isinstance(attempt, int) or attempt < 1:
        raise DataError(f"attempt must be 1, 2, ..., got {attempt!r}")
    certificate = release.certificate
    rows = outcome_rows(audits)
    check_design(rows, None)
    before, after = _at_the_alarm(release, rows, comparators)
    if certificate is None or not before:
        raise DataError("renew: no certificate has expired on these audits")
    risk = risk_of(certificate.risk, certificate.level)
    proofs: list[Proof] = []
    ladders = dict(release.policy.ladders)
    for proof in certificate.proofs:
        if proof.tasks not in before:
            proofs.append(proof)
            continue
        seen = before[proof.tasks]
        shift = _proposed(release, seen, risk, level or AdaptiveLevel(), comparators)
        ordering = _stream(release, seen, certificate.seed, comparators)
        stream = _stream(release, after[proof.tasks], certificate.seed, comparators)
        share = (proof.delta or certificate.delta) / (attempt * (attempt + 1))
        chosen, (renewed,) = certify(risk, [(stream, [_path(release, proof.tasks, shift, risk, ordering)])], share)
        if chosen and stream.under(chosen).cost_ratio >= 1:
            # what always escalates breaks no promise
            chosen, renewed = (
                {},
                replace(renewed, status="frontier", reason="what passes is no cheaper than the frontier"),
            )
        proofs.append(replace(renewed, tasks=proof.tasks))
        ladders |= {task: chosen[task].rungs if task in chosen else () for task in proof.tasks}
    policy = replace(release.policy, ladders=ladders)
    renewal = replace(release, policy=policy, certificate=_renewed(certificate, tuple(proofs), policy, rows))
    tried = [proof for proof in proofs if proof.tasks in before]
    if not any(proof.status == "certified" for proof in tried):
        reasons = "; ".join(proof.reason for proof in tried)
        raise RiskNotControlledError(f"no expired task can be certified again: {reasons}", renewal)
    return renewal


Parts = dict[tuple[str, ...], list[OutcomeRow]]


def _at_the_alarm(
    release: Release, audits: Sequence[OutcomeRow], comparators: Mapping[str, Comparator] | None
) -> tuple[Parts, Parts]:
    """The audits of expired tasks up to their alarm, and after it."""
    watch = Watch.over(release)
    before: Parts = {tasks: [] for tasks in watch.monitors}
    after: Parts = {tasks: [] for tasks in watch.monitors}
    for row in audits:
        tasks = watch.proof_of(row.query.task)
        if tasks is not None:
            (after if watch.monitors[tasks].expired else before)[tasks].append(row)
            watch = watch.after(row, comparators)
    expired = [tasks for tasks, monitor in watch.monitors.items() if monitor.expired]
    return {tasks: before[tasks] for tasks in expired}, {tasks: after[tasks] for tasks in expired}


def _stream(
    release: Release, rows: Sequence[OutcomeRow], seed: int, comparators: Mapping[str, Comparator] | None
) -> Stream:
    # a pooled proof speaks of several tasks, and a group counts once in it
    rows = one_row_per_unit(rows, seed, pooled=True)
    return Stream(task_tables(rows, release.portfolio, comparators=comparators, policy=release.policy))


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
        ladder = shifted(release.policy.ladders[task], level.shift)
        policy = replace(release.policy, ladders={**release.policy.ladders, task: ladder})
        excess = excess_of(row, replace(release, policy=policy, certificate=None), risk, comparators)
        level = level.update(excess)
    return level.shift


def _path(release: Release, tasks: Sequence[str], shift: float, risk: Risk, seen: Stream) -> Path:
    """The old ladders around the proposed level, from strict to lenient, as they did on the rows before the alarm."""
    points = []
    for extra in STRICTER:
        ladders = {task: shifted(release.policy.ladders[task], shift + extra) for task in tasks}
        routed = {task: Candidate(rungs, 0.0, 0.0, 0.0, "shifted") for task, rungs in ladders.items() if rungs}
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
