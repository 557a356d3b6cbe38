"""What is said of a disk that fails: the path and the cause, whatever a library has made of the error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.disk import DiskError, check_exists, disk_problem, free_bytes
from lit_llm.store.store import Store

PLACE = Path("/store")
FULL = os.strerror(errno.ENOSPC)


def caused_by(cause: Exception) -> Exception:
    error = ValueError("something else")
    error.__cause__ = cause
    return error


def instead_of(cause: Exception) -> Exception:
    """An error that was raised `from None`: it says what it is about, and that is not the disk."""
    error = ValueError("something else")
    error.__context__, error.__suppress_context__ = cause, True
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, FULL, "/store/a.json"), f"/store/a.json: {FULL}"),
        (OSError(errno.ENOSPC, FULL), f"/store: {FULL}"),
        (PermissionError(errno.EACCES, "Permission denied", "/store/b"), "/store/b: Permission denied"),
        (caused_by(OSError(errno.EIO, "?")), "/store: Input/output error"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), f"/store: {FULL}"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "/store: a file could not be written"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/store/c"), None),
        (ValueError("no number"), None),
        (instead_of(OSError(errno.EIO, "?")), None),
        (InputError(Problem(f"model.safetensors: cannot be read: {FULL}")), None),
    ],
)
def test_the_disk_is_blamed_for_what_it_did(error: Exception, said: str | None) -> None:
    problem = disk_problem(error, PLACE)
    assert (problem is None) if said is None else (problem or "").startswith(said)


def test_a_store_is_there_as_long_as_its_marker(tmp_path: Path) -> None:
    store = Store(tmp_path / "store").open()
    check_exists(store)
    (store.root / "store.json").unlink()
    with pytest.raises(DiskError, match="the store is gone"):
        check_exists(store)


def test_the_room_of_a_store_that_does_not_exist_is_that_of_its_place(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)
