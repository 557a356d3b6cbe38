"""Where Optuna keeps trials: a journal in the store, or a database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.config.problems import InputError, Problem
from lit_llm.tracking.address import without_secrets

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def journal(path: Path) -> BaseStorage:
    """A file, for processes that share it."""
    from filelock import FileLock
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

    class _Lock:
        """The kernel frees it when its holder dies; Optuna's own locks would be waited for during half a minute."""

        def __init__(self) -> None:
            self._lock = FileLock(path.with_suffix(".lock"))

        def acquire(self) -> bool:
            self._lock.acquire()
            return True

        def release(self) -> None:
            self._lock.release()

    backend: BaseJournalBackend = JournalFileBackend(str(path), lock_obj=_Lock())  # type: ignore[arg-type]
    return JournalStorage(backend)


def database(url: str) -> BaseStorage:
    """Raises InputError, without the password, for one that cannot be used."""
    from optuna.storages import RDBStorage

    shown = without_secrets(url)
    if url.startswith("postgresql://"):
        url = url.replace("postgresql", "postgresql+psycopg", 1)
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ModuleNotFoundError as error:
        message = f"{shown} needs the package {error.name}; for PostgreSQL: pip install 'lit-llm[postgresql]'"
        raise InputError(Problem(message, "--storage")) from None
    except Exception as error:  # SQLAlchemy's own, of many kinds
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise InputError(Problem(f"{shown} cannot be used: {without_secrets(reason)}", "--storage")) from None


def storage_errors() -> tuple[type[Exception], ...]:
    """What a database raises that is gone."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (StorageInternalError, SQLAlchemyError)
