"""Relocation of a store: after `mv mlruns elsewhere`, absolute paths in MLflow's database are wrong.

MLflow has no call that changes them, so they are rewritten in sqlite. All other paths in a store are relative to it.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.locks import Busy, is_locked, locked
from lit_llm.store.store import Store

PLACES = (
    ("experiments", "artifact_location", ""),
    ("runs", "artifact_uri", ""),
    ("logged_models", "artifact_location", ""),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
    ("trace_tags", "value", " AND key = 'mlflow.artifactLocation'"),
)
"""(table, column, condition) of every path of artifacts. A table that an older MLflow lacks is skipped."""

PATIENCE = 10.0
"""Seconds to wait for a process that has just opened the database."""
STUDY = "lit_llm.study"
"""Tag of a study's parent run, which identifies experiments with artifacts in the store."""


@dataclass(frozen=True)
class Rebased:
    """Outcome of rewriting paths."""

    old: tuple[Path, ...]
    """Earlier places of the store."""
    new: Path
    rows: dict[str, int]
    """Number of rows rewritten in each table."""


def moved(database: Path) -> dict[str, Path]:
    """{study: store of its artifacts} where MLflow expects them in another store than the database's."""
    if not database.exists():
        return {}
    try:
        with closing(sqlite3.connect(database, timeout=20)) as connection:
            return _moved(connection, database.resolve().parent)
    except sqlite3.Error:  # not MLflow's, or half created
        return {}


def _moved(connection: sqlite3.Connection, present: Path) -> dict[str, Path]:
    ours = connection.execute(
        "SELECT DISTINCT e.name, e.artifact_location FROM experiments e JOIN runs r ON r.experiment_id ="
        " e.experiment_id JOIN tags t ON t.run_uuid = r.run_uuid WHERE t.key = ? ORDER BY e.name",
        (STUDY,),
    )
    stores = ((name, store_of(location)) for name, location in ours)
    return {name: store for name, store in stores if store is not None and store != present}


def store_of(location: str) -> Path | None:
    """The store of `<store>/artifacts/<study>`; None for artifacts of a server or elsewhere."""
    parts = urlsplit(location)
    path = Path(unquote(parts.path))
    return path.parents[1] if parts.scheme in ("file", "") and path.parent.name == "artifacts" else None


def notice(store: Store) -> str | None:
    """Message on a moved store, to print before opening its UI; None where it was not moved."""
    studies = moved(store.root / "mlflow.db")
    if not studies:
        return None
    olds = ", ".join(dict.fromkeys(map(str, studies.values())))
    return (
        f"This store was moved from {olds}: MLflow still looks there for the files of {', '.join(studies)}. "
        f"`lit-llm store rebase --store {shlex.quote(str(store.root))}` puts that right."
    )


def rebase(store: Store) -> Rebased:
    """Rewrite every path in MLflow's database that points to an earlier place of the store. Idempotent.

    Raises InputError where there is no database, it is not MLflow's, or another process uses the store.
    """
    database = (store.root / "mlflow.db").resolve()  # as MlflowSync resolves it, so that the lock is the same
    if not database.exists():
        raise InputError(Problem(f"{store.root} holds no MLflow database, so there is nothing to rebase", "--store"))
    for lock in [*store.root.glob("studies/*/lock"), *store.root.glob("stages/*/lock")]:
        if is_locked(lock):
            raise InputError(Problem(f"{lock.parent} is in use by another process; wait for it to end", "--store"))
    try:
        connecting = closing(sqlite3.connect(database, timeout=20))
        with locked(lock_of(database), patience=PATIENCE), connecting as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            return repair_paths(connection, database.parent)
    except Busy:
        raise InputError(Problem(f"{database} is in use by another process; wait for it to end", "--store")) from None
    except sqlite3.Error as error:
        raise InputError(Problem(f"{database} cannot be rewritten: {error}", "--store")) from None


def repair_paths(connection: sqlite3.Connection, present: Path) -> Rebased:
    """Rewrite paths that begin with an earlier place of the store, in the caller's transaction."""
    olds = tuple(dict.fromkeys(_moved(connection, present).values()))
    rows: Counter[str] = Counter()
    for old in olds:
        rows += _rewrite(connection, old, present)
    return Rebased(olds, present, dict(rows))


def lock_of(database: Path) -> Path:
    """Lock file for creating or migrating a database, creating runs in it, or rewriting it."""
    return Path(f"{database}.lock")


def _rewrite(connection: sqlite3.Connection, old: Path, new: Path) -> Counter[str]:
    """Rewrite `old` to `new` in all paths. Returns the number of changed rows of each table."""
    rows: Counter[str] = Counter()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, column, condition in PLACES:
        if table not in tables:
            continue
        for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
            where, values = f"substr({column}, 1, ?) = ?{condition}", [len(before) + 1, f"{before}/"]
            if new.is_relative_to(old):  # a rewritten path begins with the old one too
                where, values = f"{where} AND substr({column}, 1, ?) <> ?", [*values, len(after) + 1, f"{after}/"]
            change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {where}"
            rows[table] += connection.execute(change, (after, len(before) + 1, *values)).rowcount
    return rows
