"""What travels through the flow: frozen, without behaviour that needs anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from .errors import PortfolioError

__all__ = [
    "Answer",
    "Attempt",
    "Call",
    "Completion",
    "Confidence",
    "Message",
    "Policy",
    "Query",
    "Rung",
    "Support",
    "Term",
    "Trace",
]

Message = Mapping[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True, slots=True)
class Query:
    """One user turn.

    Attributes:
        text: the words of the user in this turn.
        task: name of the workload; None if the portfolio has one task only.
        id: stable identity, kept in traces and outcomes.
        messages: the whole conversation where there is more than `text`; None stands for one user message.
        requires: what the answering tier must support beyond text, for example ``{"tools"}``.
        settings: options of the call that change answers, in any fixed notation; others are another prompt.
        metadata: anything else; not read by the core.
        payload: the request as a framework knows it; opaque to the core.
    """

    text: str
    task: str | None = None
    id: str | None = None
    messages: tuple[Message, ...] | None = None
    requires: frozenset[str] = frozenset()
    settings: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    payload: Any = field(default=None, repr=False, compare=False)

    @property
    def chat(self) -> tuple[Message, ...]:
        """The conversation in chat form, never empty."""
        return self.messages or ({"role": "user", "content": self.text},)


@dataclass(frozen=True, slots=True)
class Call:
    """A step the flow asks its driver to take: let this tier answer this query."""

    tier: str
    query: Query

    @property
    def payload(self) -> Any:
        """The request as a framework knows it; opaque to the core."""
        return self.query.payload


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of one tier with all evidence it came with; what is unknown is None, never zero.

    Attributes:
        text: the answer.
        confidence: the tier's own score of this answer in [0, 1].
        mean_logprob: mean natural-log probability of the answer's tokens.
        token_logprobs: natural-log probability of each token of the answer.
        scores: further evidence by name, each in [0, 1] and higher for a better answer: ``margin`` and ``certainty``
            from the alternatives of each token, ``self_consistency``, ``p_true``, ``verifier``, ``valid``, or your own.
        model: the exact model that answered, as its server names it; another one voids the certificate.
        prompt: fingerprint of the fixed part of the prompt; another one voids the certificate.
        asked: the words that the tier was asked with, where a chain around it made others of the query's.
        said: the words of the model, where a chain around it made another answer of them; agreement is of these.
        input_tokens, output_tokens: as counted by the tier.
        cost_usd: USD; None lets the dispatcher price it from the portfolio.
        extra_usd: USD beside that, for example of a judge; the dispatcher adds it to the cost.
        latency_ms: milliseconds; None lets the dispatcher measure it.
        payload: the answer as a framework knows it; opaque to the core.
    """

    text: str
    confidence: float | None = None
    mean_logprob: float | None = None
    token_logprobs: tuple[float, ...] | None = field(default=None, repr=False)
    scores: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None
    prompt: str | None = None
    asked: str | None = field(default=None, repr=False)
    said: str | None = field(default=None, repr=False)
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    extra_usd: float = 0.0
    latency_ms: float | None = None
    payload: Any = field(default=None, repr=False, compare=False)

    @property
    def words(self) -> str:
        """The answer as a router in the place of the model sees it."""
        return self.text if self.said is None else self.said


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of one tier within a trace.

    Attributes:
        accepted: whether the answer was returned.
        confidence: calibrated confidence in this answer when the last decision about it was made, in [0, 1]; None
            where the evidence it needs was missing, or nobody asked.
        threshold: what the best answer of this step was compared with; None where it was accepted without looking.
        completion: the answer; None where the tier failed.
        error: the reason of the failure.
    """

    tier: str
    accepted: bool
    confidence: float | None = None
    threshold: float | None = None
    completion: Completion | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """All attempts of one query, in order, and why one of their answers was returned."""

    query: Query
    task: str | None
    attempts: tuple[Attempt, ...]
    reason: str

    @property
    def accepted(self) -> Attempt:
        """The attempt whose answer was returned; the last one if none was."""
        return next((attempt for attempt in self.attempts if attempt.accepted), self.attempts[-1])

    @property
    def cost_usd(self) -> float | None:
        """USD of all answers, rejected ones included; None if any of them has no known cost.

        An attempt that failed came without usage and is not counted.
        """
        costs = [attempt.completion.cost_usd for attempt in self.attempts if attempt.completion is not None]
        return None if any(cost is None for cost in costs) else sum(cost for cost in costs if cost is not None)

    @property
    def escalated(self) -> bool:
        """Whether at least one answer was rejected and passed on."""
        return len(self.attempts) > 1

    def as_dict(self) -> dict[str, Any]:
        """The decision in JSON types, without texts: what adapters put into a framework's metadata."""
        return {
            "tier": self.accepted.tier,
            "task": self.task,
            "reason": self.reason,
            "requires": sorted(self.query.requires),
            "cost_usd": self.cost_usd,
            "attempts": [_attempt_dict(attempt) for attempt in self.attempts],
        }


_FACTS = ("confidence", "mean_logprob", "model", "prompt", "input_tokens", "output_tokens", "cost_usd", "latency_ms")


def _attempt_dict(attempt: Attempt) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tier": attempt.tier,
        "accepted": attempt.accepted,
        "calibrated_confidence": attempt.confidence,
        "threshold": attempt.threshold,
        "error": attempt.error,
    }
    if attempt.completion is not None:
        facts |= {name: getattr(attempt.completion, name) for name in _FACTS}
        facts["scores"] = dict(attempt.completion.scores)
    return facts


@dataclass(frozen=True, slots=True)
class Answer:
    """What the user of a dispatcher gets back."""

    text: str
    tier: str
    trace: Trace

    @property
    def payload(self) -> Any:
        """The accepted answer as a framework knows it; opaque to the core."""
        completion = self.trace.accepted.completion
        return None if completion is None else completion.payload


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a `Confidence`: ``weight * log-odds(evidence kind of tier) * (2 agreement(tier, other) - 1)``.

    Attributes:
        kind: which evidence of the answer of `tier`; None leaves the factor out.
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
    def tiers(self) -> set[str]:
        """All tiers whose answers it looks at."""
        return {self.tier, *(t.tier for t in self.terms), *(t.other for t in self.terms if t.other is not None)}

    @classmethod
    def plain(cls, tier: str, kind: str = "confidence") -> Confidence:
        """One kind of evidence as it is."""
        return cls(tier, (Term(1.0, tier, kind),))


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a ladder: call `tier`, then return the best answer there is if its confidence reaches `threshold`.

    Attributes:
        threshold: in [0, 1]; None accepts the answer of `tier` without looking.
        confidences: of the answers that may be returned at this step: that of `tier`, or of any tier before it too;
            none with a threshold of 1 where the answer is only evidence for a later step.
    """

    tier: str
    threshold: float | None = None
    confidences: tuple[Confidence, ...] = ()

    def __post_init__(self) -> None:
        if self.threshold is None:
            return
        _finite_number(self.threshold, f"rung {self.tier!r}: threshold")
        if not 0 <= self.threshold <= 1:
            raise PortfolioError(f"rung {self.tier!r}: threshold must be a number in [0, 1], got {self.threshold!r}")
        if self.threshold < 1 and not self.confidences:
            raise PortfolioError(f"rung {self.tier!r}: a threshold needs a confidence to be compared with it")


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
    """

    frontier: str
    ladders: Mapping[str, tuple[Rung, ...]]
    comparators: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    support: Mapping[str, Support] = field(default_factory=dict)
    expired: Mapping[str, str] = field(default_factory=dict)
    void: str | None = None

    def __post_init__(self) -> None:
        for task, rungs in self.ladders.items():
            called: set[str] = set()
            for rung in rungs:
                if rung.tier in called or rung.tier == self.frontier:
                    raise PortfolioError(f"task {task!r}: tier {rung.tier!r} is called twice")
                called.add(rung.tier)
                needed = {name for confidence in rung.confidences for name in confidence.tiers} - called
                if needed:
                    raise PortfolioError(
                        f"task {task!r}: rung {rung.tier!r} looks at {', '.join(sorted(needed))} before it is called"
                    )

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of all tiers that can be called, the frontier last."""
        below = dict.fromkeys(rung.tier for rungs in self.ladders.values() for rung in rungs)
        return (*below, self.frontier)


def _finite_number(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise PortfolioError(f"{what} must be a number, got {value!r}")
