"""What audited rows say about a certificate, without any I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .cascade.monitor import Monitor
from .cascade.risks import Answered, Risk, risk_of
from .comparing import Comparator
from .errors import DataError, TierError
from .evaluate.outcomes import OutcomeRow
from .evaluate.table import cost_of
from .release import Release
from .replaying import cost_of_attempts, replayed

__all__ = ["Watch", "charged", "excess_of"]


@dataclass(frozen=True, slots=True)
class Watch:
    """A release and what its audits say about it.

    Attributes:
        monitors: tasks that a proof speaks about -> its monitor.
        unknown: tasks that a proof speaks about -> how many of its audits have an answer of unknown quality.
    """

    release: Release
    monitors: Mapping[tuple[str, ...], Monitor]
    unknown: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    @classmethod
    def over(cls, release: Release, delta: float | None = None) -> Watch:
        """Before the first audit.

        Args:
            delta: chance that a certificate that holds is ever declared expired, shared by its proofs; None takes that
                of the certificate.

        Raises:
            DataError: the release is not certified.
        """
        certificate = release.certificate
        if certificate is None or not certificate.certified or release.policy.void is not None:
            raise DataError("audit: the release has no valid certificate that could expire; fit one")
        if certificate.groups:
            raise DataError(
                "audit: the certificate speaks of a query drawn from a random group, but audits draw queries; fit on "
                "outcomes without groups, one row of each"
            )
        risk = risk_of(certificate.risk, certificate.level)
        proofs = [proof for proof in certificate.proofs if proof.status == "certified"]
        share = (certificate.delta if delta is None else delta) / len(proofs)
        return cls(release, {proof.tasks: Monitor(risk, share) for proof in proofs})

    def after(self, row: OutcomeRow, comparators: Mapping[str, Comparator] | None = None) -> Watch:
        """With one more audited row; one without certified task says nothing.

        Raises:
            DataError: the row was audited under another policy.
        """
        certificate = self.release.certificate
        if certificate is not None and row.policy not in (None, certificate.policy):
            raise DataError(f"{row.source}: was audited under another release; give each its own log")
        tasks = self.proof_of(row.query.task)
        if tasks is None:
            return self
        monitor, tier = self.monitors[tasks], _answering(row, self.release, comparators)
        excess = float(monitor.risk.excess(_answered(row, tier, self.release))[0])
        unknown = tier != self.release.portfolio.frontier and row.outcomes[tier].quality is None
        return replace(
            self,
            monitors={**self.monitors, tasks: monitor.update(excess)},
            unknown={**self.unknown, tasks: self.unknown.get(tasks, 0) + unknown},
        )

    def proof_of(self, task: str | None) -> tuple[str, ...] | None:
        """The tasks of the certified proof that speaks about this one, if there is one."""
        return next((tasks for tasks in self.monitors if task in tasks), None)

    @property
    def expired(self) -> dict[str, str]:
        """Task -> why its certificate has expired."""
        return {
            task: f"{monitor.n} audits show that {monitor.risk.claim} is broken{self._caveat(tasks)}"
            for tasks, monitor in self.monitors.items()
            if monitor.expired
            for task in tasks
        }

    def _caveat(self, tasks: tuple[str, ...]) -> str:
        count = self.unknown.get(tasks, 0)
        return f" (the quality of {count} of them is unknown, which counts as bad)" if count else ""

    @property
    def serving(self) -> Release:
        """The release with its expired tasks on the frontier."""
        return replace(self.release, policy=replace(self.release.policy, expired=self.expired))


def excess_of(
    row: OutcomeRow, release: Release, risk: Risk, comparators: Mapping[str, Comparator] | None = None
) -> float:
    """Of what a release would have answered to an audited query; a frontier that failed gave an unknown answer."""
    return float(risk.excess(_answered(row, _answering(row, release, comparators), release))[0])


def charged(
    row: OutcomeRow,
    release: Release,
    comparators: Mapping[str, Comparator] | None = None,
    difficulty: Mapping[str, float] | None = None,
) -> Answered:
    """What a release does on one row, costs included; a call below the frontier that had failed is a bad answer."""
    frontier = release.portfolio.frontier
    try:
        answer = replayed(row, release, comparators, difficulty)
        tier, attempts = answer.tier, answer.trace.attempts
    except TierError as error:
        tier, attempts = frontier, error.attempts
    failed = any(attempt.error is not None and attempt.tier != frontier for attempt in attempts)
    cost = cost_of_attempts(row, attempts, release.portfolio)
    always = cost_of(row.outcomes[frontier], release.portfolio.tier(frontier), row.source)
    found = _answered(row, tier, release)
    costs = {"cost": np.array([cost]), "always": np.array([always])}
    if not failed:
        return replace(found, **costs)
    bad = {"below": np.array([True]), "good": np.array([False]), "quality": np.zeros(1)}
    quality = row.outcomes[frontier].quality
    return replace(found, **bad, reference=np.array([1.0 if quality is None else quality]), **costs)


def _answering(row: OutcomeRow, release: Release, comparators: Mapping[str, Comparator] | None) -> str:
    """The tier that a release would have answered from."""
    try:
        return replayed(row, release, comparators).tier
    except TierError:
        return release.portfolio.frontier


def _answered(row: OutcomeRow, tier: str, release: Release) -> Answered:
    """What the policy did on one row, as the risks read it."""
    frontier = release.portfolio.frontier
    qualities = (row.outcomes[name].quality for name in (tier, frontier))
    quality, reference = (np.array([np.nan if value is None else value]) for value in qualities)
    tau = release.portfolio.task(row.query.task or "").tau or 1.0
    return Answered.seen(np.array([tier != frontier]), quality, reference, tau, np.zeros(1), np.zeros(1), np.ones(1))
