"""From what happened to rows of the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any

from ..errors import DataError
from ..types import Attempt, Query, Trace, new_id
from .redaction import Redaction, writable
from .signal import Signal

__all__ = [
    "ORIGINS",
    "PURPOSES",
    "Extra",
    "Recorded",
    "row_of_signal",
    "rows_of_extra",
    "rows_of_runs",
    "rows_of_trace",
]

ORIGINS = ("served", "collected", "imported")
"""Of a trace: a policy decided, a chain ran without one, another system recorded it."""
PURPOSES = ("answer", "audit", "shadow", "judge", "distillation")
"""What a call was made for."""

LATEST = 253_402_300_799.0
"""The end of the year 9999, in seconds: what is later are milliseconds."""

Rows = dict[str, list[dict[str, Any]]]
"""Table -> rows to insert."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A trace as it was handed to the store.

    Attributes:
        runs: other ids by which the trace is known, or with a position one of its calls.
        propensity: probability with which its unit was to be audited; None where that is not known.
        drawn: whether it is; None where only audits tell.
        beside: calls that were made beside those of the trace, by what for; only of a trace that was read.
    """

    id: str
    at: float
    trace: Trace
    origin: str = "served"
    unit: str | None = None
    propensity: float | None = None
    runs: Mapping[str, int | None] = field(default_factory=dict)
    beside: Mapping[str, tuple[Attempt, ...]] = field(default_factory=dict)
    drawn: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.trace, Trace):
            raise DataError(f"record: expected the trace of an answer, got {type(self.trace).__name__}")
        if self.origin not in ORIGINS:
            raise DataError(f"record: origin must be one of {', '.join(ORIGINS)}, got {self.origin!r}")
        names = {"run_id": self.id, "unit": self.unit, "task": self.trace.task, "query id": self.trace.query.id}
        for name, value in {**names, **{f"runs: {run!r}": run for run in self.runs}}.items():
            most = 64 if name == "run_id" else 256
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= most):
                raise DataError(f"record: {name} must be a string of 1 to {most} characters, got {value!r}")
            if value is not None and writable(value) != value:
                raise DataError(f"record: {name} has characters that no database keeps: {value!r}")
        if self.propensity is not None and not (_is_number(self.propensity) and 0 < self.propensity <= 1):
            raise DataError(f"record: propensity must be in (0, 1], or None where unknown, got {self.propensity!r}")
        if not (_is_number(self.at) and 0 <= self.at <= LATEST):
            raise DataError(f"record: at must be seconds since 1970, got {self.at!r}")


@dataclass(frozen=True, slots=True)
class Extra:
    """Calls beside those that answered: for an audit, a shadow run, a judge, distillation."""

    trace_id: str
    purpose: str
    attempts: tuple[Attempt, ...]
    id: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        if self.purpose not in PURPOSES[1:]:
            raise DataError(f"purpose must be one of {', '.join(PURPOSES[1:])}, got {self.purpose!r}")


def rows_of_trace(recorded: Recorded, redaction: Redaction) -> Rows:
    """All rows of a trace."""
    trace = recorded.trace
    calls, answers = _calls(recorded.id, 0, ("answer", ""), trace.attempts, redaction)
    accepted = [attempt.tier for attempt in trace.attempts if attempt.accepted]
    return {
        "traces": [
            {
                "id": recorded.id,
                "at": recorded.at,
                "origin": recorded.origin,
                "query_id": trace.query.id,
                "task": trace.task,
                "requires": ",".join(sorted(trace.query.requires)) or None,
                "unit": recorded.unit,
                "tier": accepted[0] if accepted else None,
                "reason": redaction.reason(trace.reason),
                "propensity": recorded.propensity,
                "drawn": recorded.drawn,
            }
        ],
        "calls": calls,
        "contents": _contents(recorded.id, trace.query, answers, redaction),
        "runs": rows_of_runs(recorded),
    }


def rows_of_runs(recorded: Recorded) -> list[dict[str, Any]]:
    """The names by which a trace is known beside its identity."""
    named = recorded.trace.query.id
    known = {**({named: None} if named else {}), **recorded.runs}
    return [
        {"run_id": run, "trace_id": recorded.id, "position": position}
        for run, position in known.items()
        if run != recorded.id
    ]


def rows_of_extra(extra: Extra, first: int, redaction: Redaction) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The calls, from this position on, and position -> texts of their answers."""
    return _calls(extra.trace_id, first, (extra.purpose, extra.id), extra.attempts, redaction)


def row_of_signal(signal: Signal, at: float) -> dict[str, Any]:
    """The row of a signal that was given at this time."""
    return {
        "run_id": signal.run_id,
        "kind": signal.kind,
        "source": signal.source,
        "tier": signal.tier or "",
        "other": signal.other or "",
        "value": float(signal.value),
        "given": 1,
        "at": float(at if signal.at is None else signal.at),
    }


def _calls(
    trace_id: str, first: int, purpose: tuple[str, str], attempts: Sequence[Attempt], redaction: Redaction
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    calls, answers = [], {}
    for position, attempt in enumerate(attempts, start=first):
        made = attempt.completion
        calls.append(
            {
                "trace_id": trace_id,
                "position": position,
                "purpose": purpose[0],
                "batch": purpose[1] or None,
                "tier": attempt.tier,
                "accepted": attempt.accepted,
                "confidence": attempt.confidence,
                "threshold": attempt.threshold,
                "model": made and made.model and writable(made.model)[:256],
                "prompt": made and made.prompt and writable(made.prompt)[:64],
                "input_tokens": made and made.input_tokens,
                "cached_tokens": made and made.cached_tokens,
                "output_tokens": made and made.output_tokens,
                "cost_usd": made and made.cost_usd,
                "judges_usd": made.judges_usd if made else 0.0,
                "latency_ms": made and made.latency_ms,
                "error": redaction.error(attempt.error),
                "evidence": None if made is None else _evidence(made),
            }
        )
        if made is not None:
            texts = {"text": made.text, "said": made.said, "asked": made.asked}
            kept = {name: kept for name, words in texts.items() if (kept := redaction.text(words)) is not None}
            if kept:
                answers[str(position)] = kept
    return calls, answers


def _evidence(made: Any) -> dict[str, Any] | None:
    found = {
        "confidence": made.confidence,
        "mean_logprob": made.mean_logprob,
        "token_logprobs": made.token_logprobs and list(made.token_logprobs),
        "scores": dict(made.scores) or None,
    }
    # JSON has no NaN
    return {name: kept for name, value in found.items() if (kept := _finite(value)) is not None} or None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: one for name, one in value.items() if _is_number(one)} or None
    if isinstance(value, list):
        return value if all(map(_is_number, value)) else None
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _contents(trace_id: str, query: Query, answers: dict[str, Any], redaction: Redaction) -> list[dict[str, Any]]:
    text = redaction.text(query.text)
    messages = None
    if query.messages is not None:
        messages = [kept for message in query.messages if (kept := redaction.message(message)) is not None] or None
    if text is None and messages is None and not answers:
        return []
    return [{"trace_id": trace_id, "text": text, "messages": messages, "answers": answers}]
