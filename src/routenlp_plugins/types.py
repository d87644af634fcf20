"""What travels through the flow: frozen, without behaviour that needs anything else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time_ns
from typing import Any

from .errors import DataError

__all__ = [
    "Answer",
    "Attempt",
    "Call",
    "Completion",
    "Message",
    "Query",
    "Session",
    "Skipped",
    "Trace",
    "new_id",
]

Message = Mapping[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""


def new_id() -> str:
    """Ordered by time (UUID version 7, RFC 9562), so that an index of a database grows at its end."""
    value = (time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF000 << 64) | (0x7000 << 64)
    value = value & ~(0xC000 << 48) | (0x8000 << 48)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


@dataclass(frozen=True, slots=True)
class Session:
    """What the last call of a conversation left behind.

    Attributes:
        tier: that answered it.
        turn: `turn_key` of the user's turn it belonged to.
        input_tokens, output_tokens: of it, as its tier counted them; its input may be in the tier's prompt cache.
    """

    tier: str
    turn: str
    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DataError(f"session: {name} must be a whole number of tokens, got {value!r}")


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
        session: what the last call of the conversation left behind; None decides without regard to it.
        metadata: anything else; not read by the core.
        payload: the request as a framework knows it; opaque to the core.
    """

    text: str
    task: str | None = None
    id: str | None = None
    messages: tuple[Message, ...] | None = None
    requires: frozenset[str] = frozenset()
    settings: str = ""
    session: Session | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    payload: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.requires, str):
            raise DataError(f"query: requires is a set of names, such as {{{self.requires!r}}}, got {self.requires!r}")
        if not (self.session is None or isinstance(self.session, Session)):
            raise DataError(f"query: session must be a Session, as session_after makes it, got {self.session!r}")

    @classmethod
    def given(cls, query: Query | str) -> Query:
        """The query itself, or that of a text."""
        return cls(query) if isinstance(query, str) else query

    @property
    def chat(self) -> tuple[Message, ...]:
        """The conversation in chat form, never empty."""
        return self.messages or ({"role": "user", "content": self.text},)


@dataclass(frozen=True, slots=True)
class Final:
    """An answer that is returned whatever it says, as long as it is of one of these models and to one of these prompts.

    Attributes:
        models, prompts: as `Completion` names them; empty for any.
        valid: whether it has to be valid too.
    """

    models: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    valid: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A step the flow asks its driver to take: let this tier answer this query.

    Attributes:
        final: under what conditions its answer is returned without being looked at, so that it may be passed on word
            by word; None where it may be rejected.
    """

    tier: str
    query: Query
    final: Final | None = field(default=None, compare=False, repr=False)

    @property
    def payload(self) -> Any:
        """The request as a framework knows it; opaque to the core."""
        return self.query.payload

    @property
    def may_be_passed_over(self) -> bool:
        """Whether another answer may be returned, if this one is rejected, not valid or never comes."""
        return self.final is None or self.final.valid


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of one tier with all evidence it came with; what is unknown is None, never zero.

    Attributes:
        text: the answer.
        confidence: the tier's own score of this answer in [0, 1].
        mean_logprob: mean natural-log probability of the answer's tokens.
        token_logprobs: natural-log probability of each token of the answer.
        scores: further evidence by name, each in [0, 1] and higher for a better answer: ``margin`` and ``certainty``
            from the alternatives of each token, ``self_consistency``, ``p_true``, ``verifier``, or your own. An answer
            whose ``valid`` is 0, such as one that does not parse, is never returned below the frontier.
        model: the exact model that answered, as its server names it; another one voids the certificate.
        prompt: fingerprint of the fixed part of the prompt; another one voids the certificate.
        asked: the words that the tier was asked with, where a chain around it made others of the query's.
        said: the words of the model, where a chain around it made another answer of them; agreement is of these.
        input_tokens, output_tokens: as counted by the tier.
        cached_tokens: of the input tokens, those that were in its prompt cache.
        cost_usd: USD; None lets the dispatcher price it from the portfolio.
        extra_usd: USD beside that, for example of a judge; the dispatcher adds it to the cost.
        judges_usd: the part of `cost_usd` that was added so.
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
    cached_tokens: int | None = None
    cost_usd: float | None = None
    extra_usd: float = 0.0
    judges_usd: float = 0.0
    latency_ms: float | None = None
    payload: Any = field(default=None, repr=False, compare=False)

    @property
    def valid(self) -> bool:
        """Whether it may be returned at all."""
        return self.scores.get("valid", 1.0) > 0

    @property
    def words(self) -> str:
        """The answer as a router in the place of the model sees it."""
        return self.text if self.said is None else self.said


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer that is streamed.

    Attributes:
        text: what comes after the pieces before it.
        model: that answers, as far as it is known by now.
        tier: that answers; the dispatcher fills it in.
        payload: the piece as a framework knows it, or the whole answer where it comes in one piece.
    """

    text: str
    model: str | None = None
    tier: str = ""
    payload: Any = field(default=None, repr=False, compare=False)


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
class Skipped:
    """A tier that was not called, although the ladder has it.

    Attributes:
        belief: in its answer, before any call of it; None where what it needs was missing.
        needed: what the belief was compared with.
    """

    tier: str
    belief: float | None
    needed: float


@dataclass(frozen=True, slots=True)
class Trace:
    """All attempts of one query, in order, and why one of their answers was returned.

    Attributes:
        skipped: the tiers that were passed by without a call, in the order in which that was decided.
        difficulty: what a router predicted before any call: tier -> P(good enough); empty without one.
        id: its own, by which a trace store knows it.
    """

    query: Query
    task: str | None
    attempts: tuple[Attempt, ...]
    reason: str
    skipped: tuple[Skipped, ...] = ()
    difficulty: Mapping[str, float] = field(default_factory=dict)
    id: str = field(default_factory=new_id, compare=False, repr=False)

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
    def tokens(self) -> tuple[int, int] | None:
        """Read and said, of all answers, rejected ones included; None if any of them is unknown."""
        told = [attempt.completion for attempt in self.attempts if attempt.completion is not None]
        read, said = 0, 0
        for one in told:
            if one.input_tokens is None or one.output_tokens is None:
                return None
            read, said = read + one.input_tokens, said + one.output_tokens
        return (read, said) if told else None

    @property
    def escalated(self) -> bool:
        """Whether at least one answer was rejected and passed on."""
        return len(self.attempts) > 1

    def as_dict(self) -> dict[str, Any]:
        """The decision in JSON types, without texts: what adapters put into a framework's metadata."""
        return {
            "id": self.id,
            "tier": self.accepted.tier,
            "task": self.task,
            "reason": self.reason,
            "requires": sorted(self.query.requires),
            "cost_usd": self.cost_usd,
            "attempts": [_attempt_dict(attempt) for attempt in self.attempts],
            "skipped": [{"tier": s.tier, "belief": s.belief, "needed": s.needed} for s in self.skipped],
            "difficulty": dict(self.difficulty),
        }


_FACTS = (
    *("confidence", "mean_logprob", "model", "prompt"),
    *("input_tokens", "cached_tokens", "output_tokens", "cost_usd", "latency_ms"),
)


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
