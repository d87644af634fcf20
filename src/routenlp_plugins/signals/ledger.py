"""What everything cost, and what was saved by not asking the frontier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, and_, case, func, select

from ..portfolio import Portfolio
from . import tables
from .reading import between
from .store import TraceStore

__all__ = ["Ledger", "Line", "ledger"]


@dataclass(frozen=True, slots=True)
class Line:
    """The calls of one tier for one purpose.

    Attributes:
        returned: calls whose answer was returned.
        usd: of the calls whose cost is known: as it was recorded, or by tokens and the prices of the portfolio.
        judges_usd: of it, for judges and verifiers that looked at the answers as part of the call.
        unpriced: calls that answered and whose cost is not known.
    """

    purpose: str
    tier: str
    calls: int
    returned: int
    failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    usd: float
    unpriced: int
    judges_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Ledger:
    """The bill of a store.

    Attributes:
        frontier: whose cost all others are compared with.
        traces: queries.
        lines: by purpose and tier.
        answers_usd: of all calls that answered queries, rejected ones included; None where a cost is not known.
        beside_usd: of audits, shadow runs, judges, distillation; None where a cost is not known.
        always_usd: of the frontier for the same queries: as it was billed where it answered, estimated from audits
            where another tier did.
        saved_usd: `always_usd` less all that was spent; None where it is not known, for the reason in `unknown`.
        interval_usd: of `saved_usd`, at 95 %: asymptotic, over which queries were audited. None with less than two
            audited answers.
        audited: answers below the frontier that the frontier was asked for too.
        break_even: routed queries after which what was spent beside the answers is earned; None if that is never.
        unknown: why the saving is not known; empty if it is.
    """

    frontier: str
    traces: int
    lines: tuple[Line, ...]
    answers_usd: float | None
    beside_usd: float | None
    always_usd: float | None
    saved_usd: float | None
    interval_usd: tuple[float, float] | None
    audited: int
    break_even: int | None
    unknown: str

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


def ledger(store: TraceStore, portfolio: Portfolio, since: float | None = None, until: float | None = None) -> Ledger:
    """Add up the calls of the traces of [since, until), seconds since 1970.

    What the frontier would have cost where another tier answered is not seen. Audits draw queries whatever their
    answer, so the audited ones among those are a random sample of them, weighted by their propensities: their mean,
    times the number of all of them.
    """
    with store.reading() as connection:
        window = between(since, until)
        lines = tuple(_line(row, portfolio) for row in connection.execute(_sums(window)))
        every = select(func.count()).select_from(tables.traces).where(*window)
        traces = int(connection.scalar(every) or 0)
        routed = int(connection.scalar(every.where(tables.traces.c.origin == "served")) or 0)
        answers = [line for line in lines if line.purpose == "answer"]
        below = sum(line.returned for line in answers if line.tier != portfolio.frontier)
        sample = _audited(connection, portfolio, window, below)
        outside = _undesigned(connection, portfolio.frontier, window)
    beside = [line for line in lines if line.purpose != "answer"]
    answers_usd, beside_usd = _total(answers), _total(beside)
    billed = sum(line.usd for line in answers if line.tier == portfolio.frontier)
    unknown = _obstacle(lines, portfolio, below, sample.n)
    if not unknown and 0 < outside < below:
        unknown = (
            f"{outside} of {below} queries that were answered below the frontier could not have been audited: "
            "what it would have cost is not known of them; look at the time since an Auditor serves (--days)"
        )
    if unknown or answers_usd is None or beside_usd is None:
        known = portfolio.frontier, traces, lines, answers_usd, beside_usd
        return Ledger(*known, None, None, None, sample.n, None, unknown)
    always = billed + below * sample.mean
    gained = always - answers_usd
    half = None if sample.n < 2 and below else 1.96 * below * sample.error
    return Ledger(
        portfolio.frontier,
        traces,
        lines,
        answers_usd,
        beside_usd,
        always,
        gained - beside_usd,
        None if half is None else (gained - beside_usd - half, gained - beside_usd + half),
        sample.n,
        _break_even(beside_usd, gained, routed),
        "",
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """What the frontier costs on audited queries that other tiers answered.

    Attributes:
        usd: of each query.
        asked: how often it was answered below the frontier.
        propensity: probability with which it was to be audited.
    """

    usd: NDArray[np.float64]
    asked: NDArray[np.float64]
    propensity: NDArray[np.float64]

    @property
    def n(self) -> int:
        """Queries."""
        return len(self.usd)

    @property
    def mean(self) -> float:
        """Of an answer, weighted by the inverse propensities (Hajek 1971)."""
        return float(np.average(self.usd, weights=self.asked / self.propensity)) if self.n else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean where each query is audited by itself: linearised, as Horvitz and Thompson do."""
        if self.n < 2:
            return 0.0
        weight = self.asked / self.propensity
        spread = weight**2 * (1 - self.propensity) * (self.usd - self.mean) ** 2
        return float(np.sqrt(spread.sum() * self.n / (self.n - 1)) / weight.sum())


def _sums(window: list[Any]) -> Any:
    calls = tables.calls
    answered = calls.c.error.is_(None)
    unpriced = and_(answered, calls.c.cost_usd.is_(None))
    counted = and_(unpriced, calls.c.input_tokens.is_not(None), calls.c.output_tokens.is_not(None))

    def total(of: Any, where: Any = None) -> Any:
        return func.coalesce(func.sum(of if where is None else case((where, of), else_=0)), 0)

    chosen = select(
        calls.c.purpose,
        calls.c.tier,
        func.count().label("calls"),
        total(case((calls.c.accepted, 1), else_=0)).label("returned"),
        total(case((answered, 0), else_=1)).label("failed"),
        total(calls.c.input_tokens).label("input_tokens"),
        total(calls.c.cached_tokens).label("cached_tokens"),
        total(calls.c.output_tokens).label("output_tokens"),
        total(calls.c.cost_usd).label("usd"),
        total(calls.c.judges_usd).label("judges_usd"),
        total(case((unpriced, 1), else_=0)).label("unpriced"),
        total(case((counted, 1), else_=0)).label("counted"),
        total(calls.c.input_tokens, counted).label("counted_input"),
        total(func.coalesce(calls.c.cached_tokens, 0), counted).label("counted_cached"),
        total(calls.c.output_tokens, counted).label("counted_output"),
        total(func.coalesce(calls.c.latency_ms, 0), unpriced).label("unpriced_ms"),
        total(case((and_(unpriced, calls.c.latency_ms.is_not(None)), 1), else_=0)).label("timed"),
    )
    if window:
        chosen = chosen.join(tables.traces, tables.traces.c.id == calls.c.trace_id).where(*window)
    return chosen.group_by(calls.c.purpose, calls.c.tier).order_by(calls.c.purpose, calls.c.tier)


def _line(row: Any, portfolio: Portfolio) -> Line:
    facts = row._mapping
    usd, unpriced = float(facts["usd"]), int(facts["unpriced"])
    if unpriced and row.tier in portfolio.names:
        tier = portfolio.tier(row.tier)
        # prices are per token or per time, so that sums are priced as their parts are
        counts = int(facts["counted_input"]), int(facts["counted_output"])
        priced = tier.cost(*counts, float(facts["unpriced_ms"]), int(facts["counted_cached"]))
        known = int(facts["counted"] if tier.usd_per_hour is None else facts["timed"])
        if priced is not None:
            usd, unpriced = usd + priced, unpriced - known
    counts_of = {
        name: int(facts[name])
        for name in ("calls", "returned", "failed", "input_tokens", "cached_tokens", "output_tokens")
    }
    judges = float(facts["judges_usd"])
    return Line(row.purpose, row.tier, usd=usd, unpriced=unpriced, judges_usd=judges, **counts_of)


def _audited(connection: Connection, portfolio: Portfolio, window: list[Any], below: int) -> _Sample:
    """Of each audited query the mean of what its audits paid the frontier.

    Where nobody told a propensity, that is the share of the answers below the frontier that were audited.
    """
    calls, traces = tables.calls, tables.traces
    frontier = portfolio.tier(portfolio.frontier)
    query = func.coalesce(traces.c.query_id, traces.c.id)
    mine = (
        select(
            query.label("query"),
            traces.c.propensity,
            calls.c.cost_usd,
            calls.c.input_tokens,
            calls.c.output_tokens,
            calls.c.latency_ms,
            calls.c.cached_tokens,
        )
        .join(traces, traces.c.id == calls.c.trace_id)
        .where(calls.c.purpose == "audit", calls.c.tier == frontier.name, calls.c.error.is_(None))
        .where(traces.c.tier != frontier.name, *window)
    )
    paid: dict[str, list[float]] = defaultdict(list)
    chance: dict[str, float | None] = {}
    for name, propensity, usd, given, made, took, cached in connection.execute(mine):
        known = usd if usd is not None else frontier.cost(given, made, took, cached or 0)
        if known is not None:
            paid[name].append(known)
            chance[name] = propensity
    again = (
        select(traces.c.query_id, func.count())
        .where(traces.c.query_id.is_not(None), traces.c.tier != frontier.name, *window)
        .group_by(traces.c.query_id)
        .having(func.count() > 1)
    )
    asked = {row[0]: int(row[1]) for row in connection.execute(again) if row[0] in paid}
    share = sum(one is None for one in chance.values()) / max(below, 1)
    return _Sample(
        np.array([np.mean(some) for some in paid.values()]),
        np.array([asked.get(name, 1) for name in paid], dtype=np.float64),
        np.array([share if one is None else one for one in chance.values()]),
    )


def _undesigned(connection: Connection, frontier: str, window: list[Any]) -> int:
    """Answers below the frontier that no design of audits speaks of."""
    traces = tables.traces
    outside = traces.c.tier != frontier, traces.c.propensity.is_(None)
    return int(connection.scalar(select(func.count()).select_from(traces).where(*outside, *window)) or 0)


def _total(lines: list[Line]) -> float | None:
    return None if any(line.unpriced for line in lines) else sum(line.usd for line in lines)


def _obstacle(lines: tuple[Line, ...], portfolio: Portfolio, below: int, audited: int) -> str:
    strange = sorted({line.tier for line in lines if line.purpose == "answer"} - set(portfolio.names))
    if strange:
        return f"{', '.join(strange)} answered, and is no tier of the portfolio: {', '.join(portfolio.names)}"
    mute: Mapping[str, int] = {line.tier: line.unpriced for line in lines if line.unpriced}
    if mute:
        told = ", ".join(f"{number} calls of {tier}" for tier, number in mute.items())
        return (
            f"{told} have no known cost: give the tier prices in the portfolio, and tokens with its answers, which "
            "streams of OpenAI's API count only if asked to (stream_usage=True in LangChain)"
        )
    if below and not audited:
        return (
            f"{below} queries were answered below the frontier, and for none of them an audit asked the frontier too "
            "(Auditor with store=): what it would have cost is not known"
        )
    return ""


def _break_even(spent: float, gained: float, routed: int) -> int | None:
    if spent <= 0:
        return 0
    if gained <= 0:
        return None
    return int(-(-spent * routed // gained))
