"""Whole programs as tiers: a student program, run on the language model of a tier."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import dspy
from dspy.lm15 import Response

from routenlp_plugins import Call, Completion, PortfolioError, WrappingTier

from .messages import completion_of
from .tiers import provider_of

__all__ = ["ProgramCall", "ProgramTier", "Reading", "Result", "completion_of_entry", "prompt_of"]


def inputs_as_text(inputs: Mapping[str, Any]) -> str:
    """The only input as it is, several as ``name: value`` lines."""
    if len(inputs) == 1:
        return _said(next(iter(inputs.values())))
    return "\n".join(f"{name}: {_said(value)}" for name, value in inputs.items())


_BESIDE = ("reasoning", "rationale", "logprobs")


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
    """What a `RouterModule` was asked: the payload of its queries."""

    students: Mapping[str, dspy.Module]
    inputs: Mapping[str, Any]
    reading: Reading


@dataclass(frozen=True, slots=True)
class Result:
    """What a program did: the payload of its completions. Its trace is DSPy's, for optimisers."""

    prediction: dspy.Prediction
    trace: list[Any]


@dataclass(frozen=True, slots=True)
class ProgramTier:
    """A program on one language model.

    Nothing of an attempt reaches DSPy's trace, or whoever streams: of the accepted one the trace is in the `Result`.
    Its log-probabilities and tokens are those of all calls it made, other evidence that of its only one. An answer that
    DSPy cannot parse is not valid: it is paid for and passed over.
    """

    lm: dspy.BaseLM

    @classmethod
    def of(cls, name: str, tier: Any) -> Any:
        """An LM as a core tier, also inside a tier that adds scores.

        Raises:
            PortfolioError: it is none.
        """
        if isinstance(tier, WrappingTier):
            return tier.around(cls.of(name, tier.tier))
        if not isinstance(tier, dspy.BaseLM):
            raise PortfolioError(
                f"tiers: {name} must be a dspy.LM, got {type(tier).__name__}; anything else answers inside a "
                "RouterEngine"
            )
        return cls(tier)

    def __call__(self, call: Call) -> Completion:
        """Run the program."""
        asked: ProgramCall = call.payload
        student = asked.students[call.tier]
        with self._attempt(call) as attempt:
            attempt.prediction = student(**asked.inputs)
        return attempt.completion(asked.reading, student, self.lm)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        asked: ProgramCall = call.payload
        student = asked.students[call.tier]
        with self._attempt(call) as attempt:
            attempt.prediction = await student.acall(**asked.inputs)
        return attempt.completion(asked.reading, student, self.lm)

    @contextmanager
    def _attempt(self, call: Call) -> Iterator[_Attempt]:
        settings = dspy.settings
        if settings.disable_history or settings.max_history_size == 0:
            raise PortfolioError(
                "log-probabilities and token counts are read from DSPy's history: route with disable_history=False "
                "and max_history_size above 0"
            )
        attempt = _Attempt()
        own = {"lm": self.lm, "trace": attempt.trace, "caller_modules": [*(settings.caller_modules or ()), attempt]}
        # only what nothing can reject may be seen before it is whole
        final = call.final is not None and not (call.final.models or call.final.prompts or call.final.valid)
        with dspy.context(**own, **({} if final else {"send_stream": None})):
            try:
                yield attempt
            except dspy.AdapterParseError:
                if final:
                    raise


@dataclass(slots=True)
class _Attempt:
    """Stands among the modules that call, so that it hears what the models said, of this attempt only.

    Attributes:
        history: of calls, as DSPy keeps it.
        trace: of predictors.
        prediction: None where it could not be parsed.
    """

    history: list[Mapping[str, Any]] = field(default_factory=list)
    trace: list[Any] = field(default_factory=list)
    prediction: dspy.Prediction | None = None

    def completion(self, reading: Reading, student: dspy.Module, lm: dspy.BaseLM) -> Completion:
        told = [completion_of_entry(entry, provider_of(lm)) for entry in self.history]
        models = sorted({one.model for one in told if one.model is not None})
        tokens = [one.token_logprobs for one in told]
        whole = tuple(value for each in tokens if each for value in each) if all(tokens) else ()
        alone = told[0] if len(told) == 1 else Completion("")
        made = Completion(
            "",
            confidence=alone.confidence,
            mean_logprob=sum(whole) / len(whole) if whole else alone.mean_logprob,
            token_logprobs=whole or None,
            scores=alone.scores,
            model=" + ".join(models) or None,
            prompt=prompt_of(student),
            input_tokens=_total(one.input_tokens for one in told),
            output_tokens=_total(one.output_tokens for one in told),
            cached_tokens=sum(one.cached_tokens or 0 for one in told),
        )
        if self.prediction is None:
            return replace(made, scores={"valid": 0.0})
        return replace(made, text=reading.answer(self.prediction), payload=Result(self.prediction, self.trace))


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


def prompt_of(student: dspy.Module) -> str:
    """Fingerprint of what a program asks beside its inputs: instructions, fields, demonstrations, adapter."""
    parts: list[Any] = [type(dspy.settings.adapter or _DEFAULT_ADAPTER).__name__]
    for predictor in _predictors(student):
        parts.append((_shape(predictor.signature), [dict(demo) for demo in predictor.demos], predictor.config))
    return sha256(json.dumps(parts, sort_keys=True, default=repr).encode("utf-8", "replace")).hexdigest()[:16]


_DEFAULT_ADAPTER = dspy.ChatAdapter()
_NO_PARTS = ("history", "callbacks", "demos", "traces", "train")


def _predictors(module: dspy.Module) -> Iterator[dspy.Predict]:
    """Of a program, in order, those of parts that are compiled too. DSPy's own walk goes through all that a program
    has ever said."""
    if isinstance(module, dspy.Predict):
        yield module
    for name, value in vars(module).items():
        if name in _NO_PARTS:
            continue
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for one in several:
            if isinstance(one, dspy.Module):
                yield from _predictors(one)


@lru_cache(maxsize=1024)
def _shape(signature: type[dspy.Signature]) -> str:
    fields = [(name, str(of.annotation), of.json_schema_extra) for name, of in signature.fields.items()]
    return json.dumps([signature.instructions, fields], sort_keys=True, default=repr)


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if not known or None in known else sum(count for count in known if count is not None)


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if hasattr(value, "model_dump_json"):
        return str(value.model_dump_json())
    return str(value)
