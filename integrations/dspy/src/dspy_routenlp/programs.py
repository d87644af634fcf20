"""Whole programs as tiers: a student program, run on the language model of a tier."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import TracebackType
from typing import Any

import dspy
from dspy.lm15 import Response

from routenlp_plugins import Call, Completion, DataError, PortfolioError, SelfConsistentTier, WrappingTier

from .messages import completion_of
from .prompts import prompt_of
from .tiers import LMTier, provider_of

__all__ = ["OPTIONS", "ProgramCall", "ProgramTier", "Reading", "Result", "completion_of_entry"]

logger = logging.getLogger(__name__)

OPTIONS = ("config", "demos", "signature")
"""Inputs that predictors take as options of the call."""
_BESIDE = ("reasoning", "rationale", "logprobs", "trajectory")
"""Outputs that come beside an answer."""


def inputs_as_text(inputs: Mapping[str, Any]) -> str:
    """The only input as it is, several as ``name: value`` lines."""
    if len(inputs) == 1:
        return _said(next(iter(inputs.values())))
    return "\n".join(f"{name}: {_said(value)}" for name, value in inputs.items())


def outputs_as_text(prediction: dspy.Prediction) -> str:
    """The only output as it is, several as JSON; reasoning before them and evidence beside them are none."""
    told = {name: value for name, value in prediction.items() if name not in _BESIDE}
    if len(told) == 1:
        return _said(next(iter(told.values())))
    return json.dumps(told, sort_keys=True, ensure_ascii=False, default=_said)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a program is read.

    Attributes:
        query: from the inputs to the words of the query, by which routers decide.
        answer: from a prediction to the answer: answers that are equal in it agree.
        task: of every call; an input ``routenlp_task`` goes first. May be left out if the release knows one task only.
    """

    query: Callable[[Mapping[str, Any]], str] = inputs_as_text
    answer: Callable[[dspy.Prediction], str] = outputs_as_text
    task: str | None = None


@dataclass(frozen=True, slots=True)
class ProgramCall:
    """What a `RouterModule` was asked, and under which settings of DSPy: the payload of its queries."""

    students: Mapping[str, dspy.Module]
    inputs: Mapping[str, Any]
    reading: Reading
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What a program did: the payload of its completions. Its trace is DSPy's, for optimisers."""

    prediction: dspy.Prediction
    trace: list[Any]


@dataclass(frozen=True, slots=True)
class ProgramTier:
    """A program on one language model.

    Nothing of an attempt reaches DSPy's trace, or whoever streams: of the accepted one the trace is in the `Result`.
    Its log-probabilities and tokens are those of all calls it made, other evidence that of its only one. Calls of other
    models within cost what DSPy says they do; where it does not know, the cost is unknown. A program that fails after
    its model answered, as where DSPy cannot parse the answer, gave none that is valid: it is paid for and passed over.
    """

    lm: dspy.BaseLM

    @classmethod
    def of(cls, name: str, tier: Any) -> Any:
        """An LM as a core tier, also inside a tier that adds scores.

        Raises:
            PortfolioError: it is none.
        """
        if isinstance(tier, WrappingTier):
            inner = cls.of(name, tier.tier)
            if isinstance(tier, SelfConsistentTier) and isinstance(inner, cls):
                # a cache would answer every sample with the first
                inner = cls(inner.lm.copy(cache=False))
            return tier.around(inner)
        if not isinstance(tier, dspy.BaseLM):
            raise PortfolioError(
                f"tiers: {name} must be a dspy.LM, got {type(tier).__name__}; anything else answers inside a "
                "RouterEngine, or as tier_lm(...)"
            )
        return cls(tier)

    def __call__(self, call: Call) -> Completion:
        """Run the program."""
        asked = call.payload
        if not isinstance(asked, ProgramCall):
            # a question of our own, such as whether an answer is right
            return LMTier(self.lm)(call)
        student = asked.students[call.tier]
        with _Attempt(self.lm, call, asked.settings) as attempt:
            attempt.prediction = student(**asked.inputs)
        with attempt.settled():
            return attempt.completion(asked, student)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        asked = call.payload
        if not isinstance(asked, ProgramCall):
            return await LMTier(self.lm).acall(call)
        student = asked.students[call.tier]
        with _Attempt(self.lm, call, asked.settings) as attempt:
            attempt.prediction = await student.acall(**asked.inputs)
        with attempt.settled():
            return attempt.completion(asked, student)


class _History(list[Mapping[str, Any]]):
    """Of one attempt: DSPy trims those that are long, and this one counts."""

    def pop(self, *_: Any) -> Any:
        return None


@dataclass(slots=True)
class _Attempt:
    """Stands among the modules that call, so that it hears what the models said, of this attempt only.

    Attributes:
        settings: of DSPy, when the query was asked.
        history: of calls, as DSPy keeps it.
        trace: of predictors.
        prediction: None where there was none.
    """

    lm: dspy.BaseLM
    call: Call
    settings: Mapping[str, Any]
    history: _History = field(default_factory=_History)
    trace: list[Any] = field(default_factory=list)
    prediction: Any = None
    _context: Any = None

    def __enter__(self) -> _Attempt:
        settings = {**self.settings}
        if settings["caller_modules"] is not dspy.settings.caller_modules:
            # an audit, in a thread of its own after the answer was returned: nobody counts or keeps its calls as theirs
            settings |= {"caller_modules": None, "callbacks": [], "usage_tracker": None}
        if settings["disable_history"] or settings["max_history_size"] == 0:
            raise PortfolioError(
                "log-probabilities and token counts are read from DSPy's history: route with disable_history=False "
                "and max_history_size above 0"
            )
        settings |= {"lm": self.lm, "trace": self.trace}
        settings["caller_modules"] = [*(settings["caller_modules"] or ()), self]
        if not self._final:
            # only what nothing can reject may be seen before it is whole
            settings["send_stream"] = None
        self.settings = settings
        self._context = self.settled()
        self._context.__enter__()
        return self

    def settled(self) -> AbstractContextManager[None]:
        """Within it the settings are those of the attempt: its prompt is read under them too."""
        context: AbstractContextManager[None] = dspy.context(**self.settings)
        return context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._context.__exit__(kind, error, trace)
        # models that fail are tiers that fail; whatever else goes wrong after an answer speaks against the answer
        own = isinstance(error, Exception) and not isinstance(error, dspy.LMError | PortfolioError)
        return own and bool(self.history) and not self._final

    @property
    def _final(self) -> bool:
        final = self.call.final
        return final is not None and not (final.models or final.prompts or final.valid)

    def completion(self, asked: ProgramCall, student: dspy.Module) -> Completion:
        """Of the whole attempt."""
        told = [completion_of_entry(entry, provider_of(self.lm)) for entry in self.history]
        own = [one for one, entry in zip(told, self.history, strict=True) if entry["model"] == self.lm.model]
        others = [entry["cost"] for entry in self.history if entry["model"] != self.lm.model]
        known = None not in others
        if told and not own:
            _tell_unasked(self.call.tier, self.history[-1]["model"])
        models = sorted({one.model for one in told if one.model is not None})
        tokens = [one.token_logprobs for one in told]
        whole = tuple(value for each in tokens if each for value in each) if all(tokens) else ()
        alone = told[0] if len(told) == 1 else Completion("")
        options = {name: asked.inputs[name] for name in OPTIONS if name in asked.inputs}
        made = Completion(
            "",
            confidence=alone.confidence,
            mean_logprob=sum(whole) / len(whole) if whole else alone.mean_logprob,
            token_logprobs=whole or None,
            scores=alone.scores,
            model=" + ".join(models) or None,
            prompt=prompt_of(student, self.lm, options),
            input_tokens=_total(one.input_tokens for one in own) if known else None,
            output_tokens=_total(one.output_tokens for one in own) if known else None,
            cached_tokens=sum(one.cached_tokens or 0 for one in own) if known else None,
            extra_usd=sum(cost for cost in others if cost is not None),
        )
        if self.prediction is None:
            return replace(made, scores={"valid": 0.0})
        if not isinstance(self.prediction, dspy.Prediction):
            raise DataError(
                f"{type(student).__name__} returned a {type(self.prediction).__name__}; a program returns a "
                "dspy.Prediction"
            )
        return replace(made, text=asked.reading.answer(self.prediction), payload=Result(self.prediction, self.trace))


@lru_cache(maxsize=256)
def _tell_unasked(tier: str, model: str) -> None:
    """Once: a program may have reasons to ask others only, now and then."""
    logger.warning(
        "tier %s was not asked, its program asked %s: predictors with an LM of their own keep it until set_lm(None)",
        tier,
        model,
    )


def completion_of_entry(entry: Mapping[str, Any], provider: str) -> Completion:
    """Of one call, as DSPy's history has it: typed where DSPy speaks to the provider itself, else in OpenAI's form."""
    told = entry["response"]
    responses = [told] if isinstance(told, Response) else told
    if isinstance(responses, list | tuple) and responses and isinstance(responses[0], Response):
        every = [completion_of(one, provider) for one in responses]
        read = _total(one.input_tokens for one in every)
        return replace(every[0], input_tokens=read, output_tokens=_total(one.output_tokens for one in every))
    output = entry["outputs"][0] if entry["outputs"] else None
    facts = output if isinstance(output, Mapping) else {"text": output}
    tokens = (facts.get("logprobs") or {}).get("content") or []
    logprobs = tuple(min(float(token["logprob"]), 0.0) for token in tokens)
    usage = entry["usage"] or {}
    return Completion(
        str(facts.get("text") or ""),
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        token_logprobs=logprobs or None,
        model=entry.get("response_model"),
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
    )


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if not known or None in known else sum(count for count in known if count is not None)


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if hasattr(value, "model_dump_json") and not isinstance(value, type):
        return str(value.model_dump_json())
    return str(value)
