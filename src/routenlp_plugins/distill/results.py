"""What a round did, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from .gate import Verdict

__all__ = ["Bill", "ClusterFacts", "Round", "Taught"]


@dataclass(frozen=True, slots=True)
class Bill:
    """What a round cost, in USD.

    Attributes:
        teacher: answers of the frontier that were bought to be taught.
        labels: answers of the frontier that were bought to judge and to certify.
        students: answers of students, old and new, and of the other tiers, for the same.
        training: of the machine, or of whoever trained.
        unknown: students whose training was paid to others, nobody knows how much.
    """

    teacher: float = 0.0
    labels: float = 0.0
    students: float = 0.0
    training: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """All of it."""
        return self.teacher + self.labels + self.students + self.training


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """A cluster of what was escalated, and what became of it.

    Attributes:
        label: its distinctive terms.
        size: escalated queries of the teaching part.
        gap: mean shortfall of the student's answers among them.
        expected_usd: what its lessons were expected to save of every query of the traffic.
        lessons: taught of it.
    """

    number: int
    task: str
    label: str
    exemplars: tuple[str, ...]
    size: int
    gap: float
    expected_usd: float
    lessons: int


@dataclass(frozen=True, slots=True)
class Taught:
    """What a student was taught in a round.

    Attributes:
        lessons, rehearsal: that it heard.
        already_paid: of the lessons, those whose answer had been paid for when it was served.
        dropped: why answers of the teacher were not taught -> how many.
        seconds: of training.
        usd: of whoever trained it elsewhere; None where that is not known.
        skipped: why it was not taught; None if it was.
        verdict: of the gate; None if it was not taught.
    """

    tier: str
    lessons: int = 0
    rehearsal: int = 0
    already_paid: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    clusters: tuple[ClusterFacts, ...] = ()
    seconds: float = 0.0
    usd: float | None = 0.0
    skipped: str | None = None
    verdict: Verdict | None = None

    @property
    def passed(self) -> bool:
        """Whether the gate lets the new student pass."""
        return self.verdict is not None and self.verdict.promoted

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why the student stays as it was; () if it does not."""
        if self.skipped is not None:
            return (self.skipped,)
        return () if self.verdict is None else self.verdict.refusals

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Taught:
        """From its fields in JSON types."""
        clusters = tuple(ClusterFacts(**{**one, "exemplars": tuple(one["exemplars"])}) for one in facts["clusters"])
        verdict = None if facts["verdict"] is None else Verdict.from_dict(facts["verdict"])
        return cls(**{**facts, "clusters": clusters, "verdict": verdict})


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round.

    Attributes:
        since, until: of the traffic, seconds since 1970; None is ever.
        queries: of the traffic that were looked at.
        left_out: why others were not -> how many.
        promoted: version that serves since; None if none was promoted.
        refusals: why none was, or why a student stayed as it was.
        before, after: what the release that served, and the one that was certified, would have cost and kept on fresh
            queries on which no policy was decided; see `routenlp_plugins.Replay`. Most of them judged the student, who
            looks a little better on them for it. None where nothing was certified.
        broken: why what served before is taken not to keep the promise any more, whatever it costs; None if it is not.
        certified: claim of the new certificate.
        unanswered: why the frontier has no label of queries that were to judge and to certify -> how many of them.
    """

    number: int
    since: float | None
    until: float
    queries: int
    left_out: Mapping[str, int]
    students: tuple[Taught, ...]
    promoted: int | None
    refusals: tuple[str, ...]
    bill: Bill
    seconds: float
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    broken: str | None = None
    certified: str | None = None
    unanswered: Mapping[str, int] = field(default_factory=dict)

    @property
    def change(self) -> float | None:
        """Of the cost ratio, by what was promoted; None if nothing was, or the frontier costs nothing."""
        if self.promoted is None or self.before is None or self.after is None:
            return None
        old, new = self.before["cost_ratio"], self.after["cost_ratio"]
        return None if old is None or new is None else new - old

    @property
    def saving_usd(self) -> float | None:
        """Per query, of what was promoted; None if nothing was."""
        if self.promoted is None or self.before is None or self.after is None:
            return None
        return float(self.before["cost_usd"] - self.after["cost_usd"])

    @property
    def break_even(self) -> int | None:
        """Queries after which the round has earned what it cost; None if it never does, or that is not known."""
        saving = None if self.bill.unknown else self.saving_usd
        return ceil(self.bill.total / saving) if saving is not None and saving > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """In JSON types; `from_dict` reads it back."""
        return {**asdict(self), "break_even": self.break_even, "cost_usd": self.bill.total}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Round:
        """From what `as_dict` wrote."""
        own = {name: value for name, value in facts.items() if name not in ("break_even", "cost_usd")}
        students = tuple(Taught.from_dict(one) for one in own["students"])
        return cls(**{**own, "students": students, "refusals": tuple(own["refusals"]), "bill": _bill(own["bill"])})


def _bill(facts: Mapping[str, Any]) -> Bill:
    return Bill(**{**facts, "unknown": tuple(facts["unknown"])})
