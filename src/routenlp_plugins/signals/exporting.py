"""From what was recorded, and what was said of it, to outcomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from ..comparing import Comparator
from ..errors import DataError
from ..evaluate.outcomes import Outcome, OutcomeRow
from ..types import Attempt, Completion
from .opinions import Opinion, audited, opinions
from .rows import Recorded
from .signal import Signal

__all__ = ["Label", "outcomes_of"]

Label = Callable[[Opinion], float | None]
"""(what was said of an answer) -> its quality in [0, 1]; None is unknown."""


def outcomes_of(
    traces: Iterable[tuple[Recorded, Sequence[Signal]]],
    label: Label,
    groups: Collection[str],
    agree: Comparator,
    *,
    kept: Mapping[str, float] | None = None,
) -> Iterator[OutcomeRow]:
    """A row for each trace with calls.

    A row is named by its query's id where no earlier trace has it, else by the trace.

    Args:
        groups: the units that are groups; a unit of a single trace is none.
        agree: whether two answers say the same.
        kept: where audited units were left out, of those of several traces the probability that none was audited.
    """
    names: set[str] = set()
    for recorded, signals in traces:
        if not recorded.trace.attempts:
            continue
        named = recorded.trace.query.id
        name = recorded.id if named is None or named in names else named
        names.add(name)
        group = recorded.unit if recorded.unit in groups else None
        found = list(opinions(recorded, signals, agree))
        propensity = recorded.propensity
        if label is not audited:
            # other labels do not wait for an audit, or are of what was not audited
            alone = None if propensity is None else 1 - propensity
            propensity = None if kept is None else kept.get(recorded.unit or "", alone)
            if propensity is not None and propensity <= 0:
                # was certain to be audited
                continue
        yield _row(recorded, found, label, (name, group, propensity))


def _row(
    recorded: Recorded,
    found: Sequence[tuple[Attempt, Opinion]],
    label: Label,
    of_the_row: tuple[str, str | None, float | None],
) -> OutcomeRow:
    name, group, propensity = of_the_row
    trace = recorded.trace
    asked = next((a.completion.asked for a, _ in found if a.completion and a.completion.asked), None)
    return OutcomeRow(
        replace(trace.query, id=name, task=trace.task),
        {attempt.tier: _outcome(attempt, opinion, label, recorded.id) for attempt, opinion in found},
        group=group,
        timestamp=datetime.fromtimestamp(recorded.at, UTC).isoformat(),
        propensity=propensity,
        asked=asked,
        source=f"trace {recorded.id}",
    )


def _outcome(attempt: Attempt, opinion: Opinion, label: Label, trace_id: str) -> Outcome:
    if attempt.completion is None:
        return Outcome(None, Completion(""), attempt.error or "no answer")
    quality = label(opinion)
    if quality is not None and not 0 <= quality <= 1:
        raise DataError(f"trace {trace_id}: the label of {attempt.tier} is {quality!r}; expected [0, 1] or None")
    return Outcome(quality, attempt.completion)
