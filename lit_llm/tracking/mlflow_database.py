"""MLflow's database in a store: created atomically, checked for damage, moved aside."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

PATIENCE = 20
"""Seconds to wait for another writer."""
PARTS = ("", "-wal", "-shm", "-journal")
"""Suffixes of sqlite's files beside a database."""


@contextmanager
def connected(database: Path, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    """A transaction in sqlite, without MLflow, whose import takes seconds. A path may contain any character."""
    uri = f"{database.absolute().as_uri()}{'?mode=ro' if read_only else ''}"
    with closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE)) as connection, connection:
        yield connection


def create(database: Path) -> None:
    """Create the database unless one with content exists. The caller holds its lock.

    MLflow's migrations take seconds, and an interrupted one cannot be continued. They run in a work file, which is
    renamed afterwards.
    """
    if database.exists() and not _is_unfinished(database):
        return
    from lit_llm.tracking.address import sqlite_address

    work = database.with_name(f".{database.name}.new")
    _remove(work)
    database.parent.mkdir(parents=True, exist_ok=True)
    try:
        _migrate(sqlite_address(work))
        if database.exists() and database.stat().st_size:
            put_aside(database)  # it may hold other data of another MLflow
        _remove(database)
        work.rename(database)
    finally:
        _remove(work)


def _migrate(address: str) -> None:
    """Let MLflow create its tables, and close all connections to them."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(address, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
    SqlAlchemyStore._engine_map.pop(address, None)


def _is_unfinished(database: Path) -> bool:
    """True where MLflow's first migration was interrupted, so that there is no run yet."""
    if not database.stat().st_size:
        return True
    try:
        with connected(database, read_only=True) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            runs = "runs" in tables and connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone()
            return not runs and _revision(connection, tables) != _head()
    except sqlite3.Error:  # unknown for an unreadable file
        return False


def database_damage(database: Path) -> str:
    """Permanent damage of a database; '' where MLflow can use it, or where it is only busy or missing."""
    try:
        with connected(database, read_only=True) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if (revision := _revision(connection, tables)) != _head():
                return f"its tables are those of another MLflow, or incomplete (revision {revision or 'unknown'})"
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            return "" if verdict == "ok" else str(verdict)
    except sqlite3.OperationalError:  # busy, no right to read it, no file
        return ""
    except sqlite3.DatabaseError as error:
        return str(error)


def _revision(connection: sqlite3.Connection, tables: set[str]) -> str:
    if "alembic_version" not in tables:
        return ""
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else ""


def _head() -> str:
    """The revision of the tables that this MLflow uses."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


def put_aside(database: Path) -> Path | None:
    """Rename a broken database, so that a new one can be created. Returns its new path. The caller holds its lock."""
    if not database.exists():
        return None
    number = 1 + len([*database.parent.glob(f"{database.name}.old-*[0-9]")])
    aside = database.with_name(f"{database.name}.old-{number}")
    for part in PARTS:
        file = Path(f"{database}{part}")
        if file.exists():
            file.rename(f"{aside}{part}")
    return aside


def _remove(database: Path) -> None:
    for part in PARTS:
        Path(f"{database}{part}").unlink(missing_ok=True)
