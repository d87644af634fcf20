"""The tables of the trace store. A change of them is a migration in `migrations/versions`."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

__all__ = ["calls", "contents", "drops", "metadata", "runs", "signals", "traces"]

metadata = MetaData()

traces = Table(
    "traces",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("at", Float, nullable=False),  # seconds since 1970, UTC
    Column("origin", String(16), nullable=False),
    Column("query_id", String(256)),
    Column("task", String(256)),
    Column("requires", String(256)),  # beyond text, by commas; NULL for nothing
    Column("unit", String(256)),  # rows of the same are not independent
    Column("tier", String(256)),  # that answered; NULL where none did
    Column("reason", Text),
    Column("propensity", Float),  # of its unit to be audited
    Column("drawn", Boolean),  # whether it is; NULL where only audits tell
    Column("design", String(64)),  # who drew
    Index("traces_at", "at"),
)

calls = Table(
    "calls",
    metadata,
    Column("trace_id", String(64), ForeignKey("traces.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("purpose", String(16), nullable=False),
    Column("batch", String(64)),  # of calls that were recorded together beside the answer
    Column("tier", String(256), nullable=False),
    Column("accepted", Boolean, nullable=False),
    Column("confidence", Float),  # calibrated, when the last decision about the answer was made
    Column("threshold", Float),
    Column("model", String(256)),
    Column("prompt", String(64)),
    Column("input_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("cost_usd", Float),
    Column("judges_usd", Float),  # of it, for judges and verifiers
    Column("latency_ms", Float),
    Column("error", Text),
    Column("evidence", JSON(none_as_null=True)),  # the tier's own confidence, log-probabilities, scores
)

contents = Table(
    "contents",
    metadata,
    Column("trace_id", String(64), ForeignKey("traces.id", ondelete="CASCADE"), primary_key=True),
    Column("text", Text),
    Column("messages", JSON(none_as_null=True)),
    Column("answers", JSON(none_as_null=True), nullable=False),  # position -> {"text", "said", "asked"}
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(256), primary_key=True),
    Column("trace_id", String(64), ForeignKey("traces.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer),  # of the call it is; NULL for the whole
    Index("runs_trace_id", "trace_id"),
)

signals = Table(
    "signals",
    metadata,
    Column("run_id", String(256), primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("source", String(256), primary_key=True),
    Column("tier", String(256), primary_key=True),  # whose answer it is about; "" for the one that was returned
    Column("other", String(256), primary_key=True),  # the run it was compared with; "" for none
    Column("value", Float, nullable=False),
    Column("given", Integer, nullable=False),  # how many times
    Column("at", Float, nullable=False),
    Index("signals_other", "other"),
)

drops = Table(
    "drops",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("what", String(16), nullable=False),
    Column("number", Integer, nullable=False),
)
