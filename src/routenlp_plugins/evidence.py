"""What is known about an answer once it is there, and the calibrated confidence that follows from it.

Evidence is a number in [0, 1], higher for a better answer, or None: what a tier did not supply is unknown, not zero.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, exp, log
from operator import itemgetter

from .comparing import Comparator
from .policy import DIFFICULTY, Confidence
from .types import Completion

__all__ = [
    "TOKEN_KINDS",
    "Answers",
    "certainty",
    "confidence_in",
    "evidence",
    "kinds",
    "least_token_probability",
    "log_odds",
    "low_token_probability",
    "miss_probability",
    "sequence_probability",
    "top_two_margin",
]
LOW_QUANTILE = 0.1


def miss_probability(logprobs: Sequence[float]) -> float:
    """Mean of ``1 - p(token)``: the uncertainty u of RouteNLP (arXiv 2604.23577)."""
    return 1 - sum(map(exp, logprobs)) / len(logprobs)


def sequence_probability(logprobs: Sequence[float]) -> float:
    """Geometric mean of the token probabilities, ``exp(mean log p)``."""
    return exp(sum(logprobs) / len(logprobs))


def least_token_probability(logprobs: Sequence[float]) -> float:
    """Probability of the least probable token."""
    return exp(min(logprobs))


def low_token_probability(logprobs: Sequence[float]) -> float:
    """The tenth of the tokens that are least probable begins here: a minimum that one odd token does not decide."""
    return exp(sorted(logprobs)[ceil(LOW_QUANTILE * len(logprobs)) - 1])


def top_two_margin(alternatives: Sequence[Sequence[float]]) -> float:
    """Mean over the tokens of the probability of the likeliest alternative less that of the second.

    Args:
        alternatives: per token the log-probabilities of its likeliest alternatives (``top_logprobs``), at least two.
    """
    margins = [exp(first) - exp(second) for first, second, *_ in (sorted(some, reverse=True) for some in alternatives)]
    return min(max(sum(margins) / len(margins), 0.0), 1.0)


def certainty(alternatives: Sequence[Sequence[float]]) -> float:
    """One less the mean entropy of the tokens, in units of the largest possible; all else counts as one alternative.

    Args:
        alternatives: as for `top_two_margin`.
    """
    entropies = []
    for some in alternatives:
        probabilities = [exp(logprob) for logprob in some]
        probabilities.append(max(1 - sum(probabilities), 0.0))
        entropies.append(-sum(p * log(p) for p in probabilities if p > 0) / log(len(probabilities)))
    return min(max(1 - sum(entropies) / len(entropies), 0.0), 1.0)


TOKEN_KINDS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "token_probability": lambda logprobs: 1 - miss_probability(logprobs),
    "mean_logprob": sequence_probability,
    "least_token_probability": least_token_probability,
    "low_token_probability": low_token_probability,
}
"""Evidence from the log-probabilities of an answer's tokens, by name."""


def evidence(completion: Completion, kind: str) -> float | None:
    """One kind of evidence of an answer: the tier's own ``confidence``, one of `TOKEN_KINDS`, or one of its scores."""
    if kind == "confidence":
        return completion.confidence
    if kind == "mean_logprob" and completion.mean_logprob is not None:
        return exp(completion.mean_logprob)
    if kind in TOKEN_KINDS:
        return TOKEN_KINDS[kind](completion.token_logprobs) if completion.token_logprobs else None
    return completion.scores.get(kind)


def kinds(completions: Iterable[Completion]) -> tuple[str, ...]:
    """All kinds of evidence that may be found among these answers: the tier's own, of tokens, then its scores."""
    named = sorted({name for completion in completions for name in completion.scores})
    return ("confidence", *TOKEN_KINDS, *named)


def log_odds(probability: float) -> float:
    """``log(p / (1 - p))`` of a probability, which is kept `SMALLEST` away from 0 and 1."""
    inside = min(max(probability, SMALLEST), 1 - SMALLEST)
    return log(inside / (1 - inside))


SMALLEST = 1e-7


class Answers:
    """What is known of one query so far; what is worked out is kept for the next decision.

    Args:
        difficulty: tier -> P(good enough), predicted before any call.
    """

    def __init__(self, compare: Comparator, difficulty: Mapping[str, float] | None = None) -> None:
        self.difficulty = dict(difficulty or {})
        self._compare = compare
        self._completions: dict[str, Completion] = {}
        # of all tiers from the beginning, whether they answer or not
        self._log_odds: dict[tuple[str, str], float | None] = {
            (tier, DIFFICULTY): log_odds(predicted) for tier, predicted in self.difficulty.items()
        }
        self._agreement: dict[tuple[str, str], float | None] = {}

    def add(self, tier: str, completion: Completion) -> None:
        """Note the answer of a tier."""
        self._completions[tier] = completion

    @property
    def tiers(self) -> set[str]:
        """The tiers that have answered."""
        return set(self._completions)

    def log_odds(self, tier: str, kind: str) -> float | None:
        """Of one kind of evidence; None if it is missing."""
        key = (tier, kind)
        if key not in self._log_odds:
            completion = self._completions.get(tier)
            value = None if completion is None else evidence(completion, kind)
            self._log_odds[key] = None if value is None else log_odds(value)
        return self._log_odds[key]

    def agreement(self, tier: str, other: str) -> float | None:
        """``2 a - 1`` of the agreement a of two answers; None if one of them is missing or empty."""
        key = (tier, other) if tier <= other else (other, tier)
        if key not in self._agreement:
            texts = [c.words for name in key if (c := self._completions.get(name)) is not None and c.words]
            self._agreement[key] = 2 * self._compare(*texts) - 1 if len(texts) == 2 else None
        return self._agreement[key]


def confidence_in(confidence: Confidence, answers: Answers) -> float | None:
    """The calibrated confidence in an answer, in [0, 1]; None if any evidence it needs is missing."""
    total = confidence.intercept
    for term in confidence.terms:
        value = term.weight
        if term.kind is not None:
            known = answers.log_odds(term.tier, term.kind)
            if known is None:
                return None
            value *= known
        if term.other is not None:
            agreed = answers.agreement(term.tier, term.other)
            if agreed is None:
                return None
            value *= agreed
        total += value
    return _on_curve(confidence.knots, total)


def _on_curve(knots: Sequence[tuple[float, float]], total: float) -> float:
    if not knots:
        return 1 / (1 + exp(-min(max(total, -30.0), 30.0)))
    if total <= knots[0][0]:
        return knots[0][1]
    if total >= knots[-1][0]:
        return knots[-1][1]
    after = bisect_right(knots, total, key=itemgetter(0))
    (x0, y0), (x1, y1) = knots[after - 1], knots[after]
    return y0 + (y1 - y0) * (total - x0) / (x1 - x0)
