"""The database of a store: connected, and its schema brought up to date."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    String,
    create_engine,
    event,
    func,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError

from ..errors import DataError, MissingExtraError

__all__ = ["among", "open_engine", "overwrite", "writing"]

PATIENCE = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 30_000}
"""With a PostgreSQL server that does not answer: seconds, seconds, milliseconds."""
BUSY_MS = 10_000
"""How long a process waits for another one that writes to the same SQLite file."""
LOCK = 7_310_577_103
"""Of PostgreSQL's advisory locks, the one that is held while the schema changes."""


def open_engine(url: str | Path, *, create: bool = True) -> Engine:
    """The database at an address, or in an SQLite file, made if need be and allowed, and migrated.

    Raises:
        DataError: it cannot be opened, is none of ours, or was written by a newer version.
        MissingExtraError: its driver is not installed.
    """
    address = _address(url)
    local = address.get_backend_name() == "sqlite"
    if local and not create and not Path(address.database or "").exists():
        raise DataError(f"{address.database}: there is no such store")
    engine = create_engine(
        address, pool_pre_ping=not local, connect_args={} if local else PATIENCE, hide_parameters=True
    )
    if local:
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
    try:
        with writing(engine) as connection:
            _migrate(connection, _shown(address), create=create)
    except DBAPIError as error:
        engine.dispose()
        raise DataError(f"{_shown(address)}: cannot be opened ({_reason(error)})") from None
    except DataError:
        engine.dispose()
        raise
    return engine


def writing(engine: Engine) -> Any:
    """A transaction that writes; SQLite's lock is taken at its start, since one that reads first may fail later."""
    return engine.execution_options(writes=True).begin()


def among(connection: Connection, column: ColumnElement[str], values: Sequence[str]) -> ColumnElement[bool]:
    """Whether a column has one of these values.

    PostgreSQL compares many parameters, or those of an array, one after the other; rows of an array it joins.
    """
    if connection.dialect.name == "postgresql":
        return column.in_(select(func.unnest(literal(list(values), ARRAY(String)))))
    return column.in_(values)


def overwrite(engine: Engine) -> None:
    """What was deleted is still in the log of SQLite until that is emptied; as far as readers let it be."""
    if engine.dialect.name == "sqlite":
        connection = engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()


def _address(url: str | Path) -> URL:
    if not isinstance(url, str | Path):
        raise DataError(f"the address of the store must be a file, sqlite:///FILE or postgresql://, got {url!r}")
    if isinstance(url, Path) or "://" not in url:
        path = Path(url)
        if not path.absolute().parent.is_dir():
            raise DataError(f"{path}: its folder does not exist; make it first")
        return URL.create("sqlite", database=str(path))
    try:
        address = make_url(url)
    except ArgumentError:
        # the address may hold a password
        raise DataError("the address of the store cannot be read; expected sqlite:///FILE or postgresql://") from None
    backend = address.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise DataError(f"{_shown(address)}: expected sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    if backend == "sqlite":
        if not address.database or address.database == ":memory:":
            raise DataError(f"{_shown(address)}: a store in memory would be lost; give a file, sqlite:///FILE")
        return _address(Path(address.database)) if not address.query else address
    if find_spec("psycopg") is None:
        raise MissingExtraError("psycopg is not installed: pip install 'routenlp-plugins[postgres]'")
    return address.set(drivername="postgresql+psycopg")


def _shown(address: URL) -> str:
    return address.render_as_string(hide_password=True)


def _reason(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())


def _prepare(connection: Any, _: Any) -> None:
    # transactions are begun by `_begin`
    connection.isolation_level = None
    for setting in (f"busy_timeout = {BUSY_MS}", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {setting}")
    deadline = monotonic() + BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # of a new file the switch does not wait for another process that makes it too
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                raise
            sleep(0.01)
        else:
            return


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection, shown: str, *, create: bool) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    config = Config()
    config.set_main_option("script_location", "routenlp_plugins:signals/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    found = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(config)
    if found == scripts.get_current_head():
        return
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise DataError(f"{shown}: was written by a newer version (schema {found}); upgrade routenlp-plugins")
    if found is None and not create:
        raise DataError(f"{shown}: holds no trace store")
    if found is None and connection.dialect.get_table_names(connection):
        raise DataError(f"{shown}: holds tables and is no trace store; give another database or file")
    command.upgrade(config, "head")
