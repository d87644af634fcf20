"""What travels through the flow: frozen, without behaviour that needs anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import PortfolioError

__all__ = ["Answer", "Attempt", "Call", "Completion", "Message", "Policy", "Query", "Rung", "ScoreKind", "Trace"]

Message = Mapping[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""

ScoreKind = Literal["confidence", "token_probability", "mean_logprob"]
"""The evidence of one answer that a rung compares with its threshold; see `routenlp_plugins.flow.score`."""


@dataclass(frozen=True, slots=True)
class Query:
    """One user turn.

    Attributes:
        text: the words of the user in this turn.
        task: name of the workload; None if the portfolio has one task only.
        id: stable identity, kept in traces and outcomes.
        messages: the whole conversation where there is more than `text`; None stands for one user message.
        requires: what the answering tier must support beyond text, for example ``{"tools"}``.
        metadata: anything else; not read by the core.
        payload: the request as a framework knows it; opaque to the core.
    """

    text: str
    task: str | None = None
    id: str | None = None
    messages: tuple[Message, ...] | None = None
    requires: frozenset[str] = frozenset()
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
        input_tokens, output_tokens: as counted by the tier.
        cost_usd: USD; None lets the dispatcher price it from the portfolio.
        latency_ms: milliseconds; None lets the dispatcher measure it.
        payload: the answer as a framework knows it; opaque to the core.
    """

    text: str
    confidence: float | None = None
    mean_logprob: float | None = None
    token_logprobs: tuple[float, ...] | None = field(default=None, repr=False)
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    payload: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of one tier within a trace.

    Attributes:
        accepted: whether the answer was returned.
        score: the evidence that was compared, in [0, 1]; None where the tier gave none or failed.
        threshold: what it was compared with; None where every answer of the tier is accepted.
        completion: the answer; None where the tier failed.
        error: the reason of the failure.
    """

    tier: str
    accepted: bool
    score: float | None = None
    threshold: float | None = None
    completion: Completion | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """All attempts of one query and why the last one was returned."""

    query: Query
    task: str | None
    attempts: tuple[Attempt, ...]
    reason: str

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
            "tier": self.attempts[-1].tier,
            "task": self.task,
            "reason": self.reason,
            "requires": sorted(self.query.requires),
            "cost_usd": self.cost_usd,
            "attempts": [_attempt_dict(attempt) for attempt in self.attempts],
        }


def _attempt_dict(attempt: Attempt) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tier": attempt.tier,
        "accepted": attempt.accepted,
        "score": attempt.score,
        "threshold": attempt.threshold,
        "error": attempt.error,
    }
    if attempt.completion is not None:
        for name in ("confidence", "mean_logprob", "input_tokens", "output_tokens", "cost_usd", "latency_ms"):
            facts[name] = getattr(attempt.completion, name)
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
        completion = self.trace.attempts[-1].completion
        return None if completion is None else completion.payload


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a ladder: call `tier`, return its answer if its score reaches `threshold`.

    Attributes:
        threshold: in [0, 1]; None accepts every answer without looking.
        score: which evidence is compared; None only together with threshold None.
    """

    tier: str
    threshold: float | None = None
    score: ScoreKind | None = None

    def __post_init__(self) -> None:
        if self.score not in (None, *get_args(ScoreKind)):
            raise PortfolioError(f"rung {self.tier!r}: score {self.score!r} is unknown")
        if self.threshold is None:
            return
        if (
            isinstance(self.threshold, bool)
            or not isinstance(self.threshold, int | float)
            or not 0 <= self.threshold <= 1
        ):
            raise PortfolioError(f"rung {self.tier!r}: threshold must be a number in [0, 1], got {self.threshold!r}")
        if self.score is None:
            raise PortfolioError(f"rung {self.tier!r}: a threshold needs a score to be compared with it")


@dataclass(frozen=True, slots=True)
class Policy:
    """Frozen decision rules: for each known task the rungs to climb before the frontier.

    Attributes:
        frontier: the tier that answers whatever no rung accepted.
        ladders: task -> rungs, in the order in which they are tried; empty keeps the task on the frontier.
    """

    frontier: str
    ladders: Mapping[str, tuple[Rung, ...]]

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of all tiers that can be called, the frontier last."""
        below = dict.fromkeys(rung.tier for rungs in self.ladders.values() for rung in rungs)
        return (*below, self.frontier)
