"""Run by Alembic: migrates over the connection that it is handed."""

from alembic import context

from routenlp_plugins.signals.tables import metadata

# outside of Alembic, where this is merely imported, there is none
config = getattr(context, "config", None)
if config is not None:
    # within the caller's transaction, which also holds the lock
    context.configure(connection=config.attributes["connection"], target_metadata=metadata)
    context.run_migrations()
