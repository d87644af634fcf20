"""The first schema: traces with their calls and texts, other ids of them, signals, and what was dropped."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "traces",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("query_id", sa.String(256)),
        sa.Column("task", sa.String(256)),
        sa.Column("requires", sa.String(256)),
        sa.Column("unit", sa.String(256)),
        sa.Column("tier", sa.String(256)),
        sa.Column("reason", sa.Text),
        sa.Column("propensity", sa.Float),
        sa.Column("drawn", sa.Boolean),
        sa.Column("design", sa.String(64)),
    )
    op.create_index("traces_at", "traces", ["at"])
    op.create_table(
        "calls",
        sa.Column("trace_id", sa.String(64), sa.ForeignKey("traces.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("batch", sa.String(64)),
        sa.Column("tier", sa.String(256), nullable=False),
        sa.Column("accepted", sa.Boolean, nullable=False),
        sa.Column("confidence", sa.Float),
        sa.Column("threshold", sa.Float),
        sa.Column("model", sa.String(256)),
        sa.Column("prompt", sa.String(64)),
        sa.Column("input_tokens", sa.BigInteger),
        sa.Column("cached_tokens", sa.BigInteger),
        sa.Column("output_tokens", sa.BigInteger),
        sa.Column("cost_usd", sa.Float),
        sa.Column("judges_usd", sa.Float),
        sa.Column("latency_ms", sa.Float),
        sa.Column("error", sa.Text),
        sa.Column("evidence", sa.JSON),
    )
    op.create_table(
        "contents",
        sa.Column("trace_id", sa.String(64), sa.ForeignKey("traces.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("text", sa.Text),
        sa.Column("messages", sa.JSON),
        sa.Column("answers", sa.JSON, nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(256), primary_key=True),
        sa.Column("trace_id", sa.String(64), sa.ForeignKey("traces.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer),
    )
    op.create_index("runs_trace_id", "runs", ["trace_id"])
    op.create_table(
        "signals",
        sa.Column("run_id", sa.String(256), primary_key=True),
        sa.Column("kind", sa.String(32), primary_key=True),
        sa.Column("source", sa.String(256), primary_key=True),
        sa.Column("tier", sa.String(256), primary_key=True),
        sa.Column("other", sa.String(256), primary_key=True),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("given", sa.Integer, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_index("signals_other", "signals", ["other"])
    op.create_table(
        "drops",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("what", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for name in ("drops", "signals", "runs", "contents", "calls", "traces"):
        op.drop_table(name)
