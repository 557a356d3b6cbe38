"""Processes that work on one study or sweep at the same time: each holds a lock of its own for its life."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_llm.config.host import process_name
from lit_llm.store.locks import is_locked, locked, locks_of

FOLDER = "coordinators"


@contextmanager
def coordinating(folder: Path) -> Iterator[str]:
    """Hold a coordinator's lock in the folder of a study or sweep. Yields the coordinator's name."""
    name = f"{process_name()}-{uuid.uuid4().hex[:8]}"
    lock = _lock_of(folder, name)
    try:
        with locked(lock):
            yield name
    finally:
        lock.unlink(missing_ok=True)


def is_alive(folder: Path, name: str) -> bool:
    """The lock of this coordinator is held, so its process lives."""
    return is_locked(_lock_of(folder, name))


def others(folder: Path, name: str | None) -> list[str]:
    """Names of the other coordinators that seem to live; the lease of a dead host may still be among them."""
    locks = sorted((folder / FOLDER).glob("*.lock"))
    return [lock.stem for lock in locks if lock.stem != name and is_locked(lock)]


def is_running(folder: Path) -> bool:
    """True while a process runs the study or the sweep in this folder."""
    return is_locked(folder / "lock") or bool(others(folder, None))


def wait_for_others(folder: Path, name: str | None) -> list[str]:
    """Names of the other coordinators that live for certain: leases are watched until they could have run out."""
    locks = locks_of(folder / FOLDER)
    deadline = time.monotonic() + (1.2 * locks.lease_seconds if locks.kind == "lease" else 0.0)
    while (living := others(folder, name)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return living


def _lock_of(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.lock"
