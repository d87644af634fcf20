"""What happened since the last round: which queries were escalated, and what the frontier answered to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..comparing import same_text
from ..errors import DataError
from ..evaluate.outcomes import Outcome, OutcomeRow, outcome_line, parse_outcome_line, read_lines
from ..portfolio import Portfolio
from ..signals.opinions import audited, opinions
from ..signals.reading import read_traces
from ..signals.rows import Recorded
from ..signals.sampling import unit_of
from ..signals.signal import Signal
from ..signals.store import TraceStore
from ..types import Completion
from .files import write_whole

__all__ = ["Harvest", "Served", "harvest", "read_harvest", "write_harvest"]


@dataclass(frozen=True, slots=True)
class Served:
    """A query of the traffic, and what the tiers that were asked answered.

    Attributes:
        row: its outcomes; a quality is what audits say.
        returned: the tier whose answer was returned.
        unit: what it belongs to; units are independent.
        trace_id: by which the store knows it.
    """

    row: OutcomeRow
    returned: str
    unit: str
    trace_id: str

    def answer_of(self, tier: str) -> Completion | None:
        """What a tier answered; None if it was not asked, failed, or its words were not kept."""
        outcome = self.row.outcomes.get(tier)
        return (
            None if outcome is None or outcome.error is not None or not outcome.completion.text else outcome.completion
        )


@dataclass(frozen=True, slots=True)
class Harvest:
    """The traffic of a time.

    Attributes:
        served: of text alone, in order of time.
        unreadable: traces left out since their words were not kept.
        beyond_text: traces left out since they needed more than text, such as tools.
        unanswered: traces left out since no tier answered.
    """

    served: tuple[Served, ...]
    unreadable: int = 0
    beyond_text: int = 0
    unanswered: int = 0

    @property
    def left_out(self) -> dict[str, int]:
        """Why traces are not looked at -> how many."""
        reasons = {
            "their words were not kept": self.unreadable,
            "they needed more than text": self.beyond_text,
            "no tier answered": self.unanswered,
        }
        return {reason: number for reason, number in reasons.items() if number}


def harvest(store: TraceStore, portfolio: Portfolio, since: float | None = None, until: float | None = None) -> Harvest:
    """Read the traces of [since, until), seconds since 1970.

    Raises:
        DataError: a tier is not in the portfolio: the store holds the traffic of another one.
    """
    served: list[Served] = []
    unreadable = beyond_text = unanswered = 0
    with store.reading():
        for recorded, signals in read_traces(store.engine, since, until):
            trace = recorded.trace
            if trace.query.requires:
                beyond_text += 1
            elif not any(attempt.accepted for attempt in trace.attempts):
                unanswered += 1
            elif not trace.query.text:
                unreadable += 1
            else:
                served.append(_served(recorded, signals))
    for one in served:
        unknown = sorted(set(one.row.outcomes) - set(portfolio.names))
        if unknown:
            raise DataError(
                f"trace {one.trace_id}: {unknown[0]!r} is no tier of the portfolio; tiers: "
                f"{', '.join(portfolio.names)}; look at later traffic only: LoopOptions(since=...)"
            )
    return Harvest(tuple(served), unreadable, beyond_text, unanswered)


def _served(recorded: Recorded, signals: Sequence[Signal]) -> Served:
    trace = recorded.trace
    outcomes: dict[str, Outcome] = {}
    for attempt, opinion in opinions(recorded, signals, same_text):
        completion = Completion("") if attempt.completion is None else attempt.completion
        error = None if attempt.completion is not None else attempt.error or "no answer"
        outcomes[attempt.tier] = Outcome(audited(opinion), completion, error)
    # what earlier rounds bought, of tiers that have not answered otherwise
    for attempt in recorded.beside.get("distillation", ()):
        if attempt.completion is not None:
            outcomes.setdefault(attempt.tier, Outcome(None, attempt.completion))
    # many traces may have the id of one query
    query = replace(trace.query, id=recorded.id, task=trace.task or "default")
    unit = unit_of(recorded.unit, trace.query.id, recorded.id)
    return Served(OutcomeRow(query, outcomes, source=f"trace {recorded.id}"), trace.accepted.tier, unit, recorded.id)


def write_harvest(path: Path, found: Harvest) -> Path:
    """Write what `read_harvest` reads, in one step."""
    head = {"unreadable": found.unreadable, "beyond_text": found.beyond_text, "unanswered": found.unanswered}
    lines = [json.dumps(head), *(_line(one) for one in found.served)]
    return write_whole(path, "\n".join(lines) + "\n")


def read_harvest(path: Path) -> Harvest:
    """Read what `write_harvest` wrote.

    Raises:
        DataError: names file and line.
    """
    lines = read_lines(path)
    _, head = next(lines)
    return Harvest(tuple(_parsed(line, f"{path}:{number}") for number, line in lines), **json.loads(head))


def _line(one: Served) -> str:
    messages = one.row.query.messages
    own = {"served_by": one.returned, "belongs_to": one.unit, "chat": None if messages is None else list(messages)}
    return json.dumps({**json.loads(outcome_line(one.row)), **own}, ensure_ascii=False)


def _parsed(line: str, source: str) -> Served:
    row, facts = parse_outcome_line(line, source), json.loads(line)
    messages = None if facts["chat"] is None else tuple(facts["chat"])
    query = replace(row.query, messages=messages)
    return Served(replace(row, query=query), facts["served_by"], facts["belongs_to"], query.id or "")
