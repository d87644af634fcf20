"""Tiers that say more about their answers: each wraps a tier and adds a score; what that takes is part of the cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import exp
from typing import Any, Self

from ..comparing import Comparator, same_text
from ..errors import DataError, TierError
from ..types import Call, Completion, Query
from .boundary import TierCallable, async_form, sync_form

__all__ = ["Judgement", "PTrueTier", "ScoredTier", "SelfConsistentTier", "Verifier", "WrappingTier", "parses"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a verifier thinks of an answer, and what asking it cost.

    Attributes:
        score: in [0, 1]; None if it cannot tell.
    """

    score: float | None
    cost_usd: float = 0.0


Verifier = Callable[[Query, str], float | bool | Judgement | None]
"""(query, answer) -> how good the answer is, in [0, 1]; a bool is 0 or 1, None cannot tell."""


def parses(parser: Callable[[str], object]) -> Verifier:
    """A verifier that asks whether an answer can be parsed: 0 if the parser raises ValueError, 1 if not.

    ``json.loads``, ``Model.model_validate_json`` and LangChain's output parsers all raise it.
    """

    def valid(query: Query, answer: str) -> bool:
        try:
            parser(answer)
        except ValueError:
            return False
        return True

    return valid


class WrappingTier:
    """A tier around a tier, which it runs in its own form: sync where it has one, async where that does not block."""

    def __init__(self, tier: TierCallable) -> None:
        self.tier = tier

    @staticmethod
    def innermost(tier: Any) -> Any:
        """What answers inside of a tier that wraps others; any other tier itself."""
        while isinstance(tier, WrappingTier):
            tier = tier.tier
        return tier

    def around(self, tier: TierCallable) -> Self:
        """The same around another tier."""
        other = copy(self)
        other.tier = tier
        return other

    def _run(self, call: Call) -> Completion:
        function = sync_form(self.tier)
        if function is None:
            raise TierError("it is async only: use it with arun", call.tier)
        return function(call)

    async def _arun(self, call: Call) -> Completion:
        function = async_form(self.tier)
        return await asyncio.to_thread(self._run, call) if function is None else await function(call)


class ScoredTier(WrappingTier):
    """Adds the scores of verifiers, judges and parsers to the answers of a tier.

    Args:
        tier: what answers.
        verifiers: name of a score -> verifier. In `arun` they run in a thread.
    """

    def __init__(self, tier: TierCallable, verifiers: Mapping[str, Verifier]) -> None:
        super().__init__(tier)
        self.verifiers = dict(verifiers)

    def __call__(self, call: Call) -> Completion:
        """The tier's answer with the scores."""
        return self._scored(call, self._run(call))

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        return await asyncio.to_thread(self._scored, call, await self._arun(call))

    def _scored(self, call: Call, completion: Completion) -> Completion:
        scores, extra = dict(completion.scores), completion.extra_usd
        for name, verifier in self.verifiers.items():
            found = verifier(call.query, completion.text)
            judgement = found if isinstance(found, Judgement) else Judgement(None if found is None else float(found))
            extra += judgement.cost_usd
            if judgement.score is not None:
                scores[name] = judgement.score
        return replace(completion, scores=scores, extra_usd=extra)


class SelfConsistentTier(WrappingTier):
    """Asks a tier several times and returns the answer that agrees best with the others, and how well that is.

    The score is ``self_consistency``, the mean agreement with the other samples (Wang et al. 2023); the choice is
    minimum Bayes risk decoding (Kumar and Byrne 2004). The tier must sample: with temperature 0 all answers agree.

    Args:
        samples: how often to ask, at least two.
        comparator: agreement of two answers.
    """

    def __init__(self, tier: TierCallable, samples: int = 3, comparator: Comparator = same_text) -> None:
        super().__init__(tier)
        if samples < 2:
            raise DataError(f"samples must be at least 2, got {samples!r}")
        self.samples = samples
        self.comparator = comparator

    def __call__(self, call: Call) -> Completion:
        """The most agreed-with of several answers."""
        return self._most_agreed([self._run(call) for _ in range(self.samples)])

    async def acall(self, call: Call) -> Completion:
        """As calling it, all samples at once."""
        return self._most_agreed(await asyncio.gather(*(self._arun(call) for _ in range(self.samples))))

    def _most_agreed(self, answers: Sequence[Completion]) -> Completion:
        agreement = [
            sum(self.comparator(one.text, other.text) for other in answers if other is not one) / (self.samples - 1)
            for one in answers
        ]
        best = max(range(self.samples), key=lambda i: agreement[i])
        chosen = answers[best]
        return _added(replace(chosen, scores={**chosen.scores, "self_consistency": agreement[best]}), answers)


QUESTION = (
    "Question:\n{question}\n\nProposed answer:\n{answer}\n\n"
    "Is the proposed answer right? Answer with one word, Yes or No."
)


class PTrueTier(WrappingTier):
    """Asks the tier itself whether its answer is right: ``p_true`` is the probability it gives to "Yes".

    P(True) of Kadavath et al. (2022), from the log-probability of the first token; an answer that is neither yes nor
    no, or comes without log-probabilities, leaves the score out.
    """

    def __call__(self, call: Call) -> Completion:
        """The tier's answer with the score."""
        answer = self._run(call)
        return self._scored(answer, self._run(self._question(call, answer)))

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        answer = await self._arun(call)
        return self._scored(answer, await self._arun(self._question(call, answer)))

    def _question(self, call: Call, answer: Completion) -> Call:
        text = QUESTION.format(question=call.query.text, answer=answer.text)
        return Call(call.tier, replace(call.query, text=text, messages=None, payload=None))

    def _scored(self, answer: Completion, verdict: Completion) -> Completion:
        word = verdict.text.strip().casefold()
        score = None
        if verdict.token_logprobs and word.startswith(("yes", "no")):
            said = exp(verdict.token_logprobs[0])
            score = said if word.startswith("yes") else 1 - said
        scores = {**answer.scores} if score is None else {**answer.scores, "p_true": score}
        return _added(replace(answer, scores=scores), [answer, verdict])


def _added(chosen: Completion, calls: Sequence[Completion]) -> Completion:
    """One answer with the tokens and costs of all calls; how long they took together is left to be measured."""

    def total(name: str) -> Any:
        values = [getattr(one, name) for one in calls]
        return None if any(value is None for value in values) else sum(values)

    added = {name: total(name) for name in ("input_tokens", "output_tokens", "cost_usd", "extra_usd")}
    return replace(chosen, latency_ms=None, **added)
