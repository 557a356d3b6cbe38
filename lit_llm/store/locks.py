"""Locks between processes: by the kernel on a local disk, by leases on a network file system.

A store records its kind when it is created, in store.json: `"locks": "kernel"` or `"locks": "lease"`.

A kernel lock ends with its holder's process. Network file systems may grant it on two hosts at once, without an error.

A lease is a file with its holder's host and process id, created exclusively and touched by a thread of the holder every
sixth of its duration. A process that sees it unchanged for the whole duration, on its own monotonic clock, takes it
over: the clocks of hosts are never compared. The lease of a dead process of the same host is taken over at once. A
holder that was stopped, or cut off from the disk, may wake up after that: what must not be written twice is guarded by
a rising generation as well (`claims.py`).
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lit_llm.config.host import process_name
from lit_llm.config.problems import InputError, Problem
from lit_llm.store.mounts import check_leases_work, is_network_mount, kernel_locks_work

if TYPE_CHECKING:
    from filelock import SoftFileLease

Kind = Literal["kernel", "lease"]
VARIABLE = "LIT_LLM_LOCKS"
"""Environment variable with the kind for new stores: `kernel`, `lease` or `lease:SECONDS`."""
LEASE_SECONDS = 60.0
"""Default duration of a lease. The holder touches it six times in that time."""
POLL = 0.2
"""Seconds between two looks at a lease by a process that waits for it."""


class Busy(Exception):
    """Error where another process holds the lock."""


@dataclass(frozen=True)
class Locks:
    """Kind of a store's locks."""

    kind: Kind = "kernel"
    lease_seconds: float = LEASE_SECONDS

    def as_json(self) -> dict[str, str | float]:
        """Keys of store.json."""
        return {"locks": self.kind, **({"lease_seconds": self.lease_seconds} if self.kind == "lease" else {})}


def recorded_locks(content: dict[str, object]) -> Locks:
    """Locks in the content of a store.json; kernel locks where it names none. Raises ValueError or TypeError."""
    kind, seconds = content.get("locks", "kernel"), content.get("lease_seconds", LEASE_SECONDS)
    if kind not in get_args(Kind) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError(f"no locks: {kind}, {seconds}")
    return Locks("lease" if kind == "lease" else "kernel", float(seconds))


def forced_locks() -> Locks | None:
    """Locks that the environment asks for; None without a wish. Raises InputError for an unknown one."""
    if not (words := os.environ.get(VARIABLE, "")):
        return None
    kind, _, seconds = words.partition(":")
    with suppress(ValueError):
        if not seconds or kind == "lease":
            return recorded_locks({"locks": kind, "lease_seconds": float(seconds or LEASE_SECONDS)})
    raise InputError(Problem(f"is {words!r}; write kernel, lease or lease:SECONDS", VARIABLE))


def choose_locks(folder: Path) -> Locks:
    """Locks for a new store in a folder: the forced kind, else by its mount and a test of kernel locks there.

    Raises InputError for a file system on which no kind works.
    """
    locks = forced_locks()
    if locks is None:
        locks = Locks("lease" if is_network_mount(folder) or not kernel_locks_work(folder) else "kernel")
    if locks.kind == "lease":
        check_leases_work(folder)
    return locks


_LOCKS: dict[Path, Locks] = {}
"""{root of a store: its locks}, each read once."""


def locks_of(path: Path) -> Locks:
    """Locks of the store that contains a path; kernel locks outside stores."""
    path = path.absolute()
    for parent in path.parents:
        if parent in _LOCKS:
            return _LOCKS[parent]
    for parent in path.parents:
        with suppress(OSError):
            text = (parent / "store.json").read_bytes()
            try:
                _LOCKS[parent] = recorded_locks(json.loads(text))
            except (ValueError, TypeError, AttributeError):
                return Locks()  # `Store.check` names the damage
            return _LOCKS[parent]
    return Locks()


@contextmanager
def locked(path: Path, patience: float = 0.0, on_lost: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file. Raises Busy after `patience` seconds.

    on_lost: called with the reason, in another thread, when a lease is lost before its end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    locks = locks_of(path)
    with _kernel_lock(path, patience) if locks.kind == "kernel" else _lease(path, locks, patience, on_lost):
        yield


@contextmanager
def _kernel_lock(path: Path, patience: float) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=-1 if patience == math.inf else patience)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _lease(path: Path, locks: Locks, patience: float, on_lost: Callable[[str], None] | None) -> Iterator[None]:
    from filelock import Timeout

    lease = _new_lease(path, locks, on_lost)
    deadline = time.monotonic() + patience
    while True:
        try:
            lease.acquire(timeout=0)
            break
        except Timeout:
            if (state := _ended(path, locks)) is not None and _put_aside(path, state):
                continue
        if time.monotonic() >= deadline:
            raise Busy(f"{path} is held by another process")
        time.sleep(POLL)
    _SEEN.pop(path, None)
    try:
        yield
    finally:
        with suppress(OSError):  # the file system may be gone; the lease then ends by itself
            lease.release()


def _new_lease(path: Path, locks: Locks, on_lost: Callable[[str], None] | None = None) -> SoftFileLease:
    from filelock import SoftFileLease

    seconds = locks.lease_seconds
    lost = None if on_lost is None else lambda compromise: on_lost(compromise.reason)
    return SoftFileLease(path, lease_duration=seconds, heartbeat_interval=seconds / 6, on_compromise=lost)


_State = tuple[int, int, int]
"""(inode, mtime, ctime) of a lease file. Compared for equality alone, as hosts' clocks differ."""
_SEEN: dict[Path, tuple[_State, float]] = {}
"""{lease file: (its state, monotonic time at which this process first saw it)}."""


def _ended(path: Path, locks: Locks) -> _State | None:
    """State of a lease that lies there without a holder: a dead process of this host's, or it has run out."""
    now = time.monotonic()  # before the look: a pause in between makes the lease younger, not older
    state = _state(path)
    before, since = _SEEN.get(path, (None, now))
    if state is None:
        _SEEN.pop(path, None)
        return None
    if before != state:
        since = now
    _SEEN[path] = (state, since)
    owner = _new_lease(path, locks).owner
    if owner is not None and owner.hostname == _recorded_host(socket.gethostname()) and not _is_alive(owner.pid):
        return state
    return state if now - since >= locks.lease_seconds else None


def _state(path: Path) -> _State | None:
    """State of a lease file; None where there is none. Opened, as NFS then asks its server instead of its cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache
def _recorded_host(_name: str) -> str:
    """The host as leases of this process record it, which distinguishes containers of one name."""
    from filelock import SoftFileLease

    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "lease") as lease:
        owner = lease.owner
        return owner.hostname if owner is not None else ""


def _put_aside(path: Path, ended: _State) -> bool:
    """Remove a lease without a holder. Returns False where another process has been faster.

    filelock does this by an exchange of names, which NFS and most network file systems lack. Two processes may judge
    the same lease: the slower one may move the faster one's new lease, and then puts it back. Should a third process
    create its own in that instant, two hold the lock until the first notices; the generation of a claim decides.
    """
    aside = path.with_name(f".{path.name}.ended.{process_name()}")
    try:
        if _state(path) != ended:
            return False
        path.rename(aside)
    except OSError:
        return False
    moved = _state(aside)
    try:
        if moved is not None and moved[:2] != ended[:2]:  # its ctime changes with its name
            with suppress(FileExistsError):
                os.link(aside, path)
            return False
    finally:
        aside.unlink(missing_ok=True)
    return True


@contextmanager
def held(path: Path, patience: float, otherwise: Problem) -> Iterator[None]:
    """Hold a lock file that others hold for moments. Raises InputError with `otherwise` after `patience` seconds."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, patience))
        except Busy:
            raise InputError(otherwise) from None
        yield


def is_locked(path: Path) -> bool:
    """True while a process holds this lock, as far as is known here.

    The lease of another host that died counts as held until this process has seen it unchanged for its duration.
    """
    if not os.path.exists(path):  # unlike Path's, False for a folder that may not be searched
        return False
    locks = locks_of(path)
    try:
        if locks.kind == "lease":
            return _ended(path, locks) is None and path.exists()
        with locked(path):
            return False
    except Busy:
        return True
    except OSError:  # a read-only store, which no process here has locked
        return False


def is_free(path: Path) -> bool:
    """True where this lock could be had now. Puts aside a lease that has run out.

    A process that was started because of this answer would have to watch that lease anew.
    """
    locks = locks_of(path)
    if locks.kind == "lease" and (state := _ended(path, locks)) is not None:
        with suppress(OSError):
            _put_aside(path, state)
    return not is_locked(path)
