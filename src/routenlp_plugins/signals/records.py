"""Records of others on their way to traces: where they stand, and what they are taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from time import time
from typing import Any

from ..errors import DataError, TierError
from ..portfolio import Portfolio, Tier
from ..tiers.boundary import received
from ..types import Attempt, Call, Completion, Query, Trace
from .rows import LATEST, Recorded
from .signal import Signal

__all__ = ["Found", "ImportOptions", "Line", "Reader", "identity", "imported", "seconds", "text_of", "when"]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How records become traces.

    Attributes:
        portfolio: prices the calls, and says who the frontier is.
        task: of records that name none.
        tiers: name of a model -> name of the tier. Other models are the tiers of their own names, dated versions
            included, else the portfolio's frontier.
        skip_bad_lines: leave malformed lines out instead of raising; they are counted.
    """

    portfolio: Portfolio | None = None
    task: str = "default"
    tiers: Mapping[str, str] = field(default_factory=dict)
    skip_bad_lines: bool = False

    def __post_init__(self) -> None:
        if self.portfolio is not None:
            for name in self.tiers.values():
                self.portfolio.tier(name)

    def tier(self, *models: str | None) -> Tier:
        """The tier that a model is, by the names that the answer and the request give it."""
        known = [model for model in models if model]
        name = next((self.tiers[model] for model in known if model in self.tiers), None)
        if self.portfolio is None:
            return Tier(name or next(iter(known), "model"))
        if name is not None:
            return self.portfolio.tier(name)
        return self.portfolio.tier_of_model(*models) or self.portfolio.tier(self.portfolio.frontier)


@dataclass(frozen=True, slots=True)
class Line:
    """One record, and where it stands."""

    facts: Mapping[str, Any]
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Found:
    """A trace with calls beside it, or what was said of some run; and where it stands."""

    trace: Recorded | None = None
    beside: tuple[Attempt, ...] = ()
    signals: tuple[Signal, ...] = ()
    source: str = ""


Reader = Callable[[Iterator[Line], ImportOptions, Callable[[DataError], None]], Iterator[Found]]
"""Makes something of lines; calls the function for each that it cannot read."""


def imported(
    line: Line, options: ImportOptions, query: Query, answer: Completion | str, asked: str | None, **facts: Any
) -> Recorded:
    """The trace of one call of a model that was asked for; a text instead of an answer is why there is none."""
    tier = options.tier(answer.model if isinstance(answer, Completion) else None, asked)
    call = Call(tier.name, query)
    try:
        if isinstance(answer, str):
            raise TierError(answer, tier.name)
        attempt = Attempt(tier.name, True, completion=received(tier, call, answer))
    except TierError as error:
        attempt = Attempt(tier.name, False, error=str(error))
    trace = Trace(query, query.task, (attempt,), "imported")
    try:
        return Recorded(trace=trace, origin="imported", **facts)
    except DataError as error:
        raise DataError(f"{line.source}: {error}") from None


def seconds(value: Any, source: str) -> float | None:
    """Seconds since 1970 of a number or an ISO 8601 text, which is UTC unless it says otherwise; None of None."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= LATEST:
            raise DataError(f"{source}: a time is seconds since 1970 or ISO 8601, got {value!r}")
        return float(value)
    try:
        told = datetime.fromisoformat(str(value))
    except ValueError:
        raise DataError(f"{source}: a time is seconds since 1970 or ISO 8601, got {value!r}") from None
    return (told if told.tzinfo is not None else told.replace(tzinfo=UTC)).timestamp()


def when(value: Any, source: str) -> float:
    """As `seconds`; now of None, so that what tells no time is not taken for old."""
    known = seconds(value, source)
    return time() if known is None else known


def identity(name: Any, line: Line) -> str:
    """The record's own id, or one that is the same whenever the same line is imported."""
    if isinstance(name, str) and 0 < len(name) <= 64:
        return name
    return sha256((name if isinstance(name, str) else line.text).encode("utf-8", "replace")).hexdigest()[:32]


def text_of(content: Any) -> str:
    """Of a message: its text, or that of its parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)
