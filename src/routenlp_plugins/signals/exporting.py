"""From what was recorded, and what was said of it, to outcomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from statistics import fmean

from ..errors import DataError
from ..evaluate.outcomes import Outcome, OutcomeRow
from ..types import Attempt, Completion
from .rows import Recorded
from .signal import Signal

__all__ = ["Label", "audited", "outcomes_of"]

Label = Callable[[Sequence[Signal]], float | None]
"""(what was said of an answer) -> its quality in [0, 1]; None is unknown."""


def audited(signals: Sequence[Signal]) -> float | None:
    """What audits say, their mean if there are several; None without any."""
    values = [signal.value for signal in signals if signal.kind == "audit"]
    return fmean(values) if values else None


def outcomes_of(
    traces: Iterable[tuple[Recorded, Sequence[Signal]]], label: Label, groups: Collection[str]
) -> Iterator[OutcomeRow]:
    """A row for each trace with calls.

    A row is named by its query's id where no earlier trace has it, else by the trace.

    Args:
        groups: the units that are groups; a unit of a single trace is none.
    """
    names: set[str] = set()
    for recorded, signals in traces:
        if not recorded.trace.attempts:
            continue
        named = recorded.trace.query.id
        name = recorded.id if named is None or named in names else named
        names.add(name)
        yield _row(recorded, signals, label, name, recorded.unit if recorded.unit in groups else None)


def _row(recorded: Recorded, signals: Sequence[Signal], label: Label, name: str, group: str | None) -> OutcomeRow:
    trace = recorded.trace
    answered = next((attempt.tier for attempt in trace.attempts if attempt.accepted), None)
    last = _last_of_each([*trace.attempts, *(one for some in recorded.beside.values() for one in some)])
    outcomes = {}
    for tier, attempt in last.items():
        about = [signal for signal in signals if (signal.tier or answered) == tier]
        outcomes[tier] = _outcome(attempt, about, label, recorded.id)
    asked = next((a.completion.asked for a in last.values() if a.completion and a.completion.asked), None)
    return OutcomeRow(
        replace(trace.query, id=name, task=trace.task),
        outcomes,
        group=group,
        timestamp=datetime.fromtimestamp(recorded.at, UTC).isoformat(),
        propensity=recorded.propensity,
        asked=asked,
        source=f"trace {recorded.id}",
    )


def _last_of_each(attempts: Sequence[Attempt]) -> dict[str, Attempt]:
    """Of each tier the last call that answered, or failed if none did."""
    found: dict[str, Attempt] = {}
    for attempt in attempts:
        if attempt.completion is not None or attempt.tier not in found:
            found[attempt.tier] = attempt
    return found


def _outcome(attempt: Attempt, signals: Sequence[Signal], label: Label, trace_id: str) -> Outcome:
    if attempt.completion is None:
        return Outcome(None, Completion(""), attempt.error or "no answer")
    quality = label(signals) if signals else None
    if quality is not None and not 0 <= quality <= 1:
        raise DataError(f"trace {trace_id}: the label of {attempt.tier} is {quality!r}; expected [0, 1] or None")
    return Outcome(quality, attempt.completion)
