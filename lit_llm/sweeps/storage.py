"""Optuna's storage of trials: a journal in the store, or a database."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.config.problems import InputError, Problem, SourceLocation
from lit_llm.store.locks import locked
from lit_llm.store.mounts import is_network_mount
from lit_llm.tracking.address import without_secrets

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


_BLOCK = 1 << 16


def journal(path: Path) -> BaseStorage:
    """A journal file that processes share. Raises InputError, with the line, for a file that is damaged in its middle.

    An unfinished last line (its writer was killed, or the disk was full) is removed before the next one is written,
    which would otherwise be joined to it and be unreadable. The next coordinator writes its content again.
    """
    _check_lines(path)
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

    class _Lock:
        """The store's lock, which is free soon after its holder dies; Optuna's would block for half a minute."""

        def __init__(self) -> None:
            self._held = ExitStack()

        def acquire(self) -> bool:
            self._held.enter_context(locked(path.with_suffix(".lock"), patience=math.inf))
            _remove_unfinished_line(path)  # no other process writes now
            return True

        def release(self) -> None:
            self._held.close()

    backend: BaseJournalBackend = JournalFileBackend(str(path), lock_obj=_Lock())  # type: ignore[arg-type]
    try:
        return JournalStorage(backend)
    except Exception as error:  # of any kind: a line that is JSON may have any content
        message = (
            f"is damaged: Optuna cannot read it ({type(error).__name__}: {error}). Move the file away to begin the "
        )
        message += "search anew (trained runs are found again)"
        raise InputError(Problem(message, location=SourceLocation(str(path)))) from None


def _remove_unfinished_line(path: Path) -> None:
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            at = file.read(end - begin).rfind(b"\n")
            if at >= 0:
                end = begin + at + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


def _check_lines(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.endswith(b"\n"):
                    json.loads(line)
            except ValueError:
                message = "is damaged: Optuna cannot read what follows. Move the file away to begin the search anew "
                message += "(trained runs are found again), or cut it off before this line to keep the trials above it"
                raise InputError(Problem(message, location=SourceLocation(str(path), number))) from None


DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
"""{kind of database, and the extra that installs its driver: its driver, where the URL names none}."""
_SQLITE = "sqlite:///"
_PATIENCE = 60.0
"""Seconds that a process waits for another one's lock in a database."""
_LOCKS = {
    "postgresql": "SELECT 1 FROM pg_advisory_lock(7297352)",
    "mysql": f"SELECT GET_LOCK('lit-llm: tables', {_PATIENCE:.0f})",
}
"""{kind of database: the statement by which its connection waits for a lock and holds it to its end; 1 where it has
it}."""


def database(url: str) -> BaseStorage:
    """A database of trials. Raises InputError, without the password, for one that cannot be used."""
    from optuna.storages import RDBStorage

    safe_url, kind, file = without_secrets(url), url.partition(":")[0], sqlite_file(url)
    if problem := _problem_of(url):
        raise InputError(Problem(f"{safe_url} {problem}", "--storage"))
    url, waits = with_driver(url), {} if file is None else {"connect_args": {"timeout": _PATIENCE}}
    try:
        with _alone(url):
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **waits})
    except ModuleNotFoundError as error:
        way = f": pip install 'lit-llm[{kind}]'" if kind in DRIVERS else ", as its address names no other driver"
        raise InputError(Problem(f"{safe_url} needs the package {error.name}{way}", "--storage")) from None
    except Exception as error:  # SQLAlchemy's own, of many kinds
        raise InputError(Problem(f"{safe_url} cannot be used: {reason_of(error)}", "--storage")) from None


def with_driver(url: str) -> str:
    """The address with the driver that it is opened by, as SQLAlchemy writes it."""
    kind, colon, rest = url.partition(":")
    return f"{kind}+{DRIVERS[kind]}{colon}{rest}" if kind in DRIVERS else url


def _problem_of(url: str) -> str:
    """Reason why an address is refused before it is opened; '' for none."""
    kind, _, rest = url.partition("://")
    place = rest.partition("?")[0]
    if kind.startswith("sqlite"):  # a file, whose name may contain any character
        if (file := sqlite_file(url)) is not None and file.parent.is_dir():
            return ""
        return "names no file in a folder that exists; write sqlite:///trials.db, or sqlite:////a/trials.db"
    if kind.startswith("mariadb"):  # Optuna writes MySQL's statements for mysql:// alone
        return "cannot be used: write mysql:// for MariaDB too"
    if place.count("@") > 1:  # a part of the password would be taken for the host, and be shown
        return "cannot be used: write %40 for an @ in a password"
    if kind.startswith("mysql") and not place.partition("/")[2]:
        return "names no database; write mysql://USER@HOST/DATABASE"
    return ""


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """The only process in the block, for one database: Optuna fails where several make the tables of a new one."""
    file = sqlite_file(url)
    if file is not None:
        with locked(file.with_name(f"{file.name}.lock"), patience=math.inf):
            yield
        return
    from sqlalchemy import NullPool, create_engine, text

    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        # MySQL raises nothing where the wait ends without the lock.
        if (statement := _LOCKS.get(engine.dialect.name)) and connection.scalar(text(statement)) != 1:
            raise TimeoutError(
                f"another process has opened it for more than {_PATIENCE:.0f} seconds; end that process, or try later"
            )
        yield


def reason_of(error: BaseException) -> str:
    """The text of a database's error, as its driver has it, in one line and without passwords."""
    of_driver = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None)
    text = of_driver.args[-1] if of_driver is not None and of_driver.args else error
    return without_secrets(" ".join(str(text).split())) or type(error).__name__


def sqlite_file(url: str) -> Path | None:
    """The file of an sqlite address; None for other databases."""
    name = url.removeprefix(_SQLITE)
    return Path(name).absolute() if url.startswith(_SQLITE) and name not in ("", ":memory:") else None


def warning_of(url: str | None) -> str:
    """Limit of a storage that a user should know, as one sentence; '' for none."""
    file = sqlite_file(url or "")
    if file is None:
        return ""
    if is_network_mount(file.parent):
        return (
            f"{file} is on a network file system, where sqlite's locks may fail and lose trials: leave --storage out, "
            "for the journal in the store, or use PostgreSQL or MySQL"
        )
    return (
        f"the trials are in {file}, which sqlite shares between processes of this machine alone: for coordinators on "
        "several machines leave --storage out, or use PostgreSQL or MySQL"
    )


def storage_errors() -> tuple[type[Exception], ...]:
    """Exceptions of a database that cannot be reached."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (StorageInternalError, SQLAlchemyError)
