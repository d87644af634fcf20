"""What everything cost, and what was saved by not asking the frontier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

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
        break_even: queries after which what was spent beside the answers is earned; None if that is never.
        unknown: why the saving is not known; empty if it is.
    """

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
        traces = int(connection.scalar(select(func.count()).select_from(tables.traces).where(*window)) or 0)
        sample = _audited(connection, portfolio.frontier, window)
    answers = [line for line in lines if line.purpose == "answer"]
    beside = [line for line in lines if line.purpose != "answer"]
    answers_usd, beside_usd = _total(answers), _total(beside)
    below = sum(line.returned for line in answers if line.tier != portfolio.frontier)
    billed = sum(line.usd for line in answers if line.tier == portfolio.frontier)
    unknown = _obstacle(lines, below, sample.n)
    if unknown or answers_usd is None or beside_usd is None:
        return Ledger(traces, lines, answers_usd, beside_usd, None, None, None, sample.n, None, unknown)
    always = billed + below * sample.mean
    gained = always - answers_usd
    half = None if sample.n < 2 and below else 1.96 * below * sample.error(below)
    return Ledger(
        traces,
        lines,
        answers_usd,
        beside_usd,
        always,
        gained - beside_usd,
        None if half is None else (gained - beside_usd - half, gained - beside_usd + half),
        sample.n,
        _break_even(beside_usd, gained, traces),
        "",
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """What the frontier costs on audited answers of other tiers: weighted mean, and variance around it."""

    n: int
    mean: float
    variance: float

    def error(self, population: int) -> float:
        """Standard error of the mean, of a sample drawn without replacement."""
        if self.n < 2:
            return 0.0
        return sqrt(self.variance / self.n * max(1 - self.n / population, 0.0))


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


def _audited(connection: Connection, frontier: str, window: list[Any]) -> _Sample:
    calls, traces = tables.calls, tables.traces
    weight = 1 / func.coalesce(traces.c.propensity, 1.0)
    mine = (
        select(
            func.count(),
            func.sum(weight),
            func.sum(weight * calls.c.cost_usd),
            func.sum(weight * calls.c.cost_usd * calls.c.cost_usd),
        )
        .join(traces, traces.c.id == calls.c.trace_id)
        .where(
            calls.c.purpose == "audit",
            calls.c.tier == frontier,
            calls.c.cost_usd.is_not(None),
            traces.c.tier != frontier,
            *window,
        )
    )
    n, weights, first, second = connection.execute(mine).one()
    if not n:
        return _Sample(0, 0.0, 0.0)
    mean = float(first) / float(weights)
    variance = max(float(second) / float(weights) - mean**2, 0.0)
    return _Sample(int(n), mean, variance * n / max(n - 1, 1))


def _total(lines: list[Line]) -> float | None:
    return None if any(line.unpriced for line in lines) else sum(line.usd for line in lines)


def _obstacle(lines: tuple[Line, ...], below: int, audited: int) -> str:
    mute: Mapping[str, int] = {line.tier: line.unpriced for line in lines if line.unpriced}
    if mute:
        told = ", ".join(f"{number} calls of {tier}" for tier, number in mute.items())
        return f"{told} have no known cost: give the tier prices in the portfolio, and tokens with its answers"
    if below and not audited:
        return (
            f"{below} queries were answered below the frontier, and none of them was audited: what it would have cost "
            "is not known"
        )
    return ""


def _break_even(spent: float, gained: float, traces: int) -> int | None:
    if spent <= 0:
        return 0
    if gained <= 0:
        return None
    return int(-(-spent * traces // gained))
