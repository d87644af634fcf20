"""From what was recorded, and what was said of it, to outcomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from numbers import Real

from ..comparing import Comparator
from ..errors import DataError
from ..evaluate.outcomes import Outcome, OutcomeRow
from ..types import Attempt, Completion
from .opinions import Opinion, audited, opinions
from .rows import PURPOSES, Recorded
from .sampling import Groups
from .signal import Signal

__all__ = ["Label", "check_selection", "outcomes_of"]

Label = Callable[[Opinion], float | None]
"""(what was said of an answer) -> its quality in [0, 1]; None is unknown."""


def check_selection(
    label: Label, beside: str | None, *, labelled: bool, unaudited: bool, without: Collection[str]
) -> None:
    """That the rows that are asked for are a sample of all.

    Raises:
        DataError: they would not be, or an argument is none.
    """
    if not callable(label):
        raise DataError(f"label must be a function of an Opinion, got {label!r}")
    if isinstance(without, str):
        raise DataError("without: expected units, got a string")
    if beside == "audit":
        raise DataError(
            "beside: audits call only what had not answered, so that their calls are no sample; take labelled=True"
        )
    if beside is not None and beside not in PURPOSES:
        raise DataError(f"beside must be one of {', '.join(PURPOSES[1:])}, got {beside!r}")
    if labelled and label is not audited:
        raise DataError("labelled: rows with a label of your own are no sample of all; select them by unaudited=True")
    if unaudited and label is audited:
        raise DataError("unaudited: what was not audited has no quality; give another label")
    if without and not labelled:
        raise DataError("without: units are left out of labelled rows; for other labels give unaudited=True")


def outcomes_of(
    traces: Iterable[tuple[Recorded, Sequence[Signal]]],
    label: Label,
    groups: Groups,
    agree: Comparator,
    chance: Callable[[Recorded, bool], float | None],
    requires: Mapping[str, Collection[str]],
) -> Iterator[OutcomeRow]:
    """A row for each trace with calls that a release may be fitted on: of text, and of what their task has beyond it.

    Args:
        requires: task -> what its calls may ask for beyond text.
        agree: whether two answers say the same.
        chance: of a trace, and whether it was audited, the probability with which its unit was drawn.
    """
    for recorded, signals in traces:
        trace = recorded.trace
        if not trace.attempts or not trace.query.requires <= set(requires.get(trace.task or "", ())):
            continue
        found = list(opinions(recorded, signals, agree))
        group = groups.group(recorded.unit, trace.query.id)
        asked = next((a.completion.asked for a, _ in found if a.completion and a.completion.asked), None)
        yield OutcomeRow(
            replace(trace.query, id=groups.name(recorded), task=trace.task),
            {attempt.tier: _outcome(attempt, opinion, label, recorded.id) for attempt, opinion in found},
            group=group,
            timestamp=datetime.fromtimestamp(recorded.at, UTC).isoformat(),
            propensity=chance(recorded, any(signal.kind == "audit" for signal in signals)),
            whole_groups=True,
            asked=asked,
            source=f"trace {recorded.id}",
        )


def _outcome(attempt: Attempt, opinion: Opinion, label: Label, trace_id: str) -> Outcome:
    if attempt.completion is None:
        return Outcome(None, Completion(""), attempt.error or "no answer")
    quality = label(opinion)
    if quality is not None and not (isinstance(quality, Real) and 0 <= quality <= 1):
        raise DataError(f"trace {trace_id}: the label of {attempt.tier} is {quality!r}; expected [0, 1] or None")
    return Outcome(None if quality is None else float(quality), attempt.completion)
