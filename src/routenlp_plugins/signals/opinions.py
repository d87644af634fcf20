"""What was said of one answer, and what audits found it to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..comparing import Comparator
from ..types import Attempt
from .rows import Recorded
from .signal import Signal

__all__ = ["Judged", "Opinion", "audited", "judged", "opinions"]


@dataclass(frozen=True, slots=True)
class Opinion:
    """What was said of an answer.

    Attributes:
        signals: about the answer itself, in order of time.
        returned: about the answer that was returned instead, or the same if this one was.
        agreement: with the answer that was returned, in [0, 1]; None where a text is missing.
    """

    signals: tuple[Signal, ...]
    returned: tuple[Signal, ...]
    agreement: float | None
    is_returned: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """An audited answer.

    Attributes:
        quality: what audits say, their mean if there are several.
        weight: one over the probability with which it was drawn; None where nobody told it.
        trace_id: of the trace it belongs to.
    """

    opinion: Opinion
    quality: float
    tier: str
    unit: str
    weight: float | None
    task: str = ""
    trace_id: str = ""


def audited(opinion: Opinion) -> float | None:
    """What audits say of the answer, their mean if there are several; None without any."""
    values = [signal.value for signal in opinion.signals if signal.kind == "audit"]
    return fmean(values) if values else None


def opinions(recorded: Recorded, signals: Sequence[Signal], agree: Comparator) -> Iterator[tuple[Attempt, Opinion]]:
    """The last call of each tier, and what was said of its answer."""
    trace = recorded.trace
    returned = next((attempt for attempt in trace.attempts if attempt.accepted), None)
    answered = None if returned is None else returned.tier
    found: dict[str, Attempt] = {}
    beside = (one for purpose in ("audit", "shadow") for one in recorded.beside.get(purpose, ()))
    for attempt in (*trace.attempts, *beside):
        # of each tier the answer that was returned, else the last one, or a failure if it never answered
        known = found.get(attempt.tier)
        if known is None or (not known.accepted and attempt.completion is not None):
            found[attempt.tier] = attempt
    of = {tier: tuple(s for s in signals if (s.tier or answered) == tier) for tier in found}
    for tier, attempt in found.items():
        mine = tier == answered
        yield (
            attempt,
            Opinion(
                of[tier],
                of.get(answered or "", ()),
                1.0 if mine else _agreement(attempt, returned, agree),
                mine,
            ),
        )


def judged(
    traces: Iterable[tuple[Recorded, Sequence[Signal]]], unit: Callable[[Recorded], str], agree: Comparator
) -> Iterator[Judged]:
    """The answers that were audited."""
    for recorded, signals in traces:
        if not any(signal.kind == "audit" for signal in signals):
            continue
        for attempt, opinion in opinions(recorded, signals, agree):
            quality = audited(opinion)
            if quality is not None:
                weight = None if recorded.propensity is None else 1 / recorded.propensity
                task = recorded.trace.task or ""
                yield Judged(opinion, quality, attempt.tier, unit(recorded), weight, task, recorded.id)


def _agreement(attempt: Attempt, returned: Attempt | None, agree: Comparator) -> float | None:
    one = attempt.completion
    other = None if returned is None else returned.completion
    if one is None or other is None or not one.text or not other.text:
        return None
    return agree(one.text, other.text)
