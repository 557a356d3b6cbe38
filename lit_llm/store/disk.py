"""The disk of a store: existence of the store, errors of the disk, free space."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.store import Store

UNUSABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.EFBIG),
)
"""Error numbers of a disk that is full, read-only, broken or gone."""


class DiskError(Exception):
    """The store cannot be used any more, through no fault of the input (exit code 1)."""


def disk_problem(error: BaseException, place: Path) -> str | None:
    """`path: cause` for an error of the disk, with `place` where it names no file; None for other errors.

    Libraries raise errors of their own that quote the operating system.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, InputError):  # it has its own message
        if isinstance(seen, OSError) and seen.errno is not None and seen.errno in UNUSABLE:
            return f"{seen.filename or place}: {os.strerror(seen.errno)}"
        quoted = next((number for number in UNUSABLE[:4] if os.strerror(number) in str(seen)), None)
        if quoted is not None:
            return f"{place}: {os.strerror(quoted)}"
        if "PytorchStreamWriter failed writing" in str(seen):
            return f"{place}: a file could not be written to its end; is the disk full?"
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def check_exists(store: Store) -> None:
    """Raise DiskError for an opened store that has vanished, as writing would create a new one."""
    marker = store.root / "store.json"
    try:
        marker.stat()
    except FileNotFoundError:
        raise DiskError(f"{store.root}: the store is gone (it has no store.json any more)") from None
    except OSError as error:
        raise DiskError(f"{marker}: {error.strerror}") from None


@dataclass
class Progress:
    """Progress of a command, which decides how an error of the disk is reported."""

    started: bool = False
    """Whether anything was started that a later command would continue."""


@contextmanager
def disk_errors(store: Store) -> Iterator[Progress]:
    """Turn errors of the disk into one line: an InputError until something was started, then a DiskError."""
    progress = Progress()
    try:
        yield progress
    except InputError:
        raise
    except Exception as error:
        problem = str(error) if isinstance(error, DiskError) else disk_problem(error, store.root)
        if problem is None and isinstance(error, OSError) and progress.started:
            problem = _missing_store(store)  # a vanished store causes errors of several kinds
        if problem is None:
            raise
        if not progress.started:
            raise InputError(Problem(problem, "--store")) from error
        raise DiskError(f"{problem}. {LATER}") from error


LATER = "What was running was asked to save and stop; the same command goes on once the store can be written."


def _missing_store(store: Store) -> str | None:
    try:
        check_exists(store)
    except DiskError as error:
        return str(error)
    return None


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
