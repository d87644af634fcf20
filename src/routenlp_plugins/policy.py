"""What decides, frozen: the terms of a confidence, the rungs of a ladder, the policy for all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from .errors import PortfolioError

__all__ = [
    "DIFFICULTY",
    "Confidence",
    "Offer",
    "Policy",
    "RelativeCost",
    "Rung",
    "Support",
    "Term",
]

DIFFICULTY = "difficulty, predicted"
"""The kind of evidence that is known before any call: a router's P(good enough) of a tier. No score has this name."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a `Confidence`: ``weight * log-odds(evidence kind of tier) * (2 agreement(tier, other) - 1)``.

    Attributes:
        kind: which evidence of the answer of `tier`; None leaves the factor out. Of kind `DIFFICULTY`, the tier need
            not have answered.
        other: the tier whose answer is compared with that of `tier`; None leaves the factor out.
    """

    weight: float
    tier: str
    kind: str | None = None
    other: str | None = None

    def __post_init__(self) -> None:
        if self.kind is None and self.other is None:
            raise PortfolioError(f"term of {self.tier!r}: needs a kind of evidence, another tier, or both")
        _finite_number(self.weight, f"term of {self.tier!r}: weight")


@dataclass(frozen=True, slots=True)
class Confidence:
    """A calibrated confidence in the answer of one tier: a logistic curve or a table over a sum of terms.

    Attributes:
        knots: rising (sum, probability) pairs, interpolated between and constant outside; empty for the logistic
            curve ``1 / (1 + exp(-sum))``.
    """

    tier: str
    terms: tuple[Term, ...]
    intercept: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        _finite_number(self.intercept, f"confidence in {self.tier!r}: intercept")
        if any(after[0] <= before[0] for before, after in zip(self.knots, self.knots[1:], strict=False)):
            raise PortfolioError(f"confidence in {self.tier!r}: knots must rise strictly")
        if not all(isfinite(place) and 0 <= value <= 1 for place, value in self.knots):
            raise PortfolioError(f"confidence in {self.tier!r}: knots must be finite, with probabilities in [0, 1]")

    @property
    def predicted(self) -> bool:
        """Whether it looks at what a router predicted."""
        return any(term.kind == DIFFICULTY for term in self.terms)

    @property
    def read(self) -> set[str]:
        """All tiers whose answers its terms look at."""
        terms = [term for term in self.terms if term.kind != DIFFICULTY or term.other is not None]
        return {name for term in terms for name in (term.tier, term.other) if name is not None}

    @property
    def tiers(self) -> set[str]:
        """The tier it speaks of, and all whose answers it looks at."""
        return {self.tier, *self.read}

    @classmethod
    def plain(cls, tier: str, kind: str = "confidence") -> Confidence:
        """One kind of evidence as it is."""
        return cls(tier, (Term(1.0, tier, kind),))


@dataclass(frozen=True, slots=True)
class RelativeCost:
    """What the frontier's answer to a text is expected to cost, in units of its mean cost: a line in the text's length.

    Attributes:
        least, most: no text is expected to cost less, or more.
    """

    intercept: float
    per_character: float
    least: float = 0.2
    most: float | None = None

    def __post_init__(self) -> None:
        for name in ("intercept", "per_character", "least"):
            _finite_number(getattr(self, name), f"relative cost: {name}")
        if self.least <= 0:
            raise PortfolioError(f"relative cost: least must be above 0, got {self.least!r}")
        if self.most is not None:
            _finite_number(self.most, "relative cost: most")
            if self.most < self.least:
                raise PortfolioError(f"relative cost: most is {self.most!r}, below the least {self.least!r}")

    def of(self, text: str) -> float:
        """Of one text, above 0."""
        expected = max(self.intercept + self.per_character * len(text), self.least)
        return expected if self.most is None else min(expected, self.most)


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a ladder: call `tier`, then return the best answer there is if its confidence reaches `threshold`.

    Attributes:
        threshold: in [0, 1]; None accepts the answer of `tier` without looking.
        confidences: of the answers that may be returned at this step: that of `tier`, or of any tier before it too;
            none with a threshold of 1 where the answer is only evidence for a later step.
        after: the tiers that have answered before, exactly, or the step is passed over; None: whichever they are.
        belief: in the answer of `tier` before it is called: by what a router predicted and by the answers so far.
        level: what the belief has to reach for the call to be made.
        lossless: the confidence at which nothing is expected to be lost. If it is given, thresholds and levels are
            tolerated losses, and the more the frontier's answer is expected to cost, the more may be lost:
            ``lossless - (lossless - threshold) * relative cost`` is what a confidence has to reach.
    """

    tier: str
    threshold: float | None = None
    confidences: tuple[Confidence, ...] = ()
    after: tuple[str, ...] | None = None
    belief: Confidence | None = None
    level: float = 0.0
    lossless: float | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "level", "lossless"):
            self._check(name)
        if self.threshold is not None and self.threshold < 1 and not self.confidences:
            raise PortfolioError(f"rung {self.tier!r}: a threshold needs a confidence to be compared with it")
        if self.belief is not None and self.belief.tier != self.tier:
            raise PortfolioError(f"rung {self.tier!r}: its belief is about {self.belief.tier!r}")

    def _check(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        _finite_number(value, f"rung {self.tier!r}: {name}")
        # a tolerated loss in units of the relative cost has no such bounds
        if not 0 <= value <= 1 and (self.lossless is None or name == "lossless"):
            raise PortfolioError(f"rung {self.tier!r}: {name} must be a number in [0, 1], got {value!r}")

    def needed(self, threshold: float, relative_cost: float) -> float:
        """What a confidence has to reach where the frontier's answer is expected to cost this much."""
        return threshold if self.lossless is None else self.lossless - (self.lossless - threshold) * relative_cost


@dataclass(frozen=True, slots=True)
class Offer:
    """A tier at which a climb may begin: it begins at that with the most ``belief - price * relative cost``.

    Attributes:
        belief: in its answer before any call.
        price: what calling it costs on average, in units of belief.
    """

    tier: str
    belief: Confidence
    price: float

    def __post_init__(self) -> None:
        _finite_number(self.price, f"offer of {self.tier!r}: price")
        if self.belief.read:
            raise PortfolioError(f"offer of {self.tier!r}: looks at answers before any call")
        if self.belief.tier != self.tier:
            raise PortfolioError(f"offer of {self.tier!r}: its belief is about {self.belief.tier!r}")


@dataclass(frozen=True, slots=True)
class Support:
    """What the calibration texts of a task looked like; see `routenlp_plugins.support`.

    Attributes:
        trigrams: base64 of the table of character trigrams that were seen.
        largest_novelty: share of unseen trigrams above which a text is unlike them.
    """

    trigrams: str = field(repr=False)
    largest_novelty: float


@dataclass(frozen=True, slots=True)
class Policy:
    """Frozen decision rules: for each known task the rungs to climb before the frontier.

    Attributes:
        frontier: the tier that answers whatever no rung accepted.
        ladders: task -> rungs, in the order in which they are tried; empty keeps the task on the frontier.
        comparators: task -> name of what tells whether two answers agree; see `routenlp_plugins.evidence`.
        models: tier -> the models its answers may come from; a tier that is not named may be any.
        prompts: task -> fingerprints of the prompts that were certified; a task that is not named may have any.
        support: task -> what its queries look like; one that is unlike them is answered by the frontier.
        expired: task -> why the frontier answers it although a certificate once said otherwise.
        void: why the frontier answers everything, or None.
        router: digest of the router whose predictions are evidence of kind `DIFFICULTY`; None without one.
        offers: task -> tiers at which its climb may begin; the rungs before the best of them are passed over, all of
            them if that is the frontier. A task that is not named begins with its first rung.
        relative_cost: task -> what the frontier's answer to a text is expected to cost; 1 for a task not named.
        requires: task -> what its calls may ask for beyond text; a call that asks for more is the frontier's.
    """

    frontier: str
    ladders: Mapping[str, tuple[Rung, ...]]
    comparators: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    support: Mapping[str, Support] = field(default_factory=dict)
    expired: Mapping[str, str] = field(default_factory=dict)
    void: str | None = None
    router: str | None = None
    offers: Mapping[str, tuple[Offer, ...]] = field(default_factory=dict)
    relative_cost: Mapping[str, RelativeCost] = field(default_factory=dict)
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task, rungs in self.ladders.items():
            above: list[Rung] = []
            for rung in rungs:
                _check_rung(f"task {task!r}", rung, above, self.frontier)
                above.append(rung)
            tiers = {rung.tier for rung in rungs} | {self.frontier}
            offered = [offer.tier for offer in self.offers.get(task, ())]
            unknown = [tier for tier in offered if tier not in tiers]
            if len(set(offered)) < len(offered):
                raise PortfolioError(f"task {task!r}: one tier is offered twice")
            if unknown:
                raise PortfolioError(f"task {task!r}: the climb may begin at {unknown[0]!r}, which has no rung")
        strange = sorted({*self.offers, *self.relative_cost} - set(self.ladders))
        if strange:
            raise PortfolioError(f"task {strange[0]!r}: has offers or a relative cost, and no ladder")
        if self.router is None and any(c.predicted for c in self._confidences):
            raise PortfolioError("the policy looks at predicted difficulties and names no router")

    @property
    def _confidences(self) -> Iterator[Confidence]:
        for rungs in self.ladders.values():
            for rung in rungs:
                yield from rung.confidences
                if rung.belief is not None:
                    yield rung.belief
        for offers in self.offers.values():
            yield from (offer.belief for offer in offers)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of all tiers that can be called, the frontier last."""
        below = dict.fromkeys(rung.tier for rungs in self.ladders.values() for rung in rungs)
        return (*below, self.frontier)


def _check_rung(where: str, rung: Rung, above: Sequence[Rung], frontier: str) -> None:
    same = [other for other in above if other.tier == rung.tier]
    if rung.tier == frontier or any(rung.after is None or other.after in (None, rung.after) for other in same):
        raise PortfolioError(f"{where}: tier {rung.tier!r} is called twice")
    where = f"{where}: rung {rung.tier!r}"
    reached = {other.tier for other in above}
    before = reached if rung.after is None else set(rung.after)
    if not before <= reached or rung.tier in before:
        raise PortfolioError(f"{where} cannot come after {', '.join(sorted(before - reached) or [rung.tier])}")
    needed = {name for confidence in rung.confidences for name in confidence.tiers} - before - {rung.tier}
    needed |= set() if rung.belief is None else rung.belief.read - before
    if needed:
        raise PortfolioError(f"{where} looks at {', '.join(sorted(needed))} before it is called")


def _finite_number(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise PortfolioError(f"{what} must be a number, got {value!r}")
