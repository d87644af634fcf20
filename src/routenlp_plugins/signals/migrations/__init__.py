"""The schema of the trace store, version by version (Alembic)."""
