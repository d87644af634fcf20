"""Fingerprints of programs: what they ask beside their inputs, and by which code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any

import dspy
from pydantic import BaseModel

from .tiers import OUTER

__all__ = ["code_of", "digest_of", "prompt_of"]

_DEFAULT_ADAPTER = dspy.ChatAdapter()
_NO_PARTS = ("history", "callbacks", "demos", "traces", "train")


def prompt_of(student: dspy.Module, lm: dspy.BaseLM, options: Mapping[str, Any] | None = None) -> str:
    """Of what a program asks beside its inputs: instructions, fields, demonstrations, adapter, options of the model.

    Args:
        options: of the call that predictors take as such, as ``config``.
    """
    parts: list[Any] = [
        type(dspy.settings.adapter or _DEFAULT_ADAPTER).__name__,
        {name: value for name, value in lm.kwargs.items() if value is not None and name not in _NO_PROMPT},
        [(_shape(one.signature), [dict(demo) for demo in one.demos], one.config) for one in _predictors(student)],
        {n: _shape(value) if n == "signature" else value for n, value in (options or {}).items() if value != {}},
    ]
    return digest_of(parts)


_NO_PROMPT = (*OUTER, "logprobs", "top_logprobs")


def digest_of(value: Any) -> str:
    """The same for the same value in every process, and after DSPy has saved and loaded it."""
    return sha256(json.dumps(value, sort_keys=True, default=_plain).encode("utf-8", "replace")).hexdigest()[:16]


def code_of(one: Any) -> str:
    """What a function, class or object does, as far as its source tells."""
    kind = one if inspect.isfunction(one) or inspect.ismethod(one) or inspect.isclass(one) else type(one)
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        # made where no file is
        return f"{kind.__module__}.{kind.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(map(digest_of, value))
    if isinstance(value, dspy.Example | Mapping):
        return dict(value.items())
    return str(value)


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
    return json.dumps([signature.instructions, fields], sort_keys=True, default=_plain)
