"""The file system of a store: its type, and what locks work on it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from functools import cache
from pathlib import Path

import psutil

from lit_llm.config.problems import InputError, Problem

NETWORK = frozenset(
    "9p acfs afpfs afs beegfs ceph cifs fhgfs glusterfs gpfs juicefs lustre mfs ncpfs nfs nfs4 orangefs panfs pvfs2 "
    "smb2 smb3 smbfs virtiofs wekafs".split()
)
"""Types of mounts that hosts share. `fuse.*` counts too."""

_PROBE = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("refused")
"""
"""Program of a process that tries to get a kernel lock that its parent holds."""


def is_network_mount(path: Path) -> bool:
    """True for a path on a file system that hosts share, by the type of its mount."""
    path = path.resolve()
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[str(parent)] for parent in (path, *path.parents) if str(parent) in mounts), "")
    return kind in NETWORK or kind.startswith(("fuse.", "macfuse", "osxfuse"))


def kernel_locks_work(folder: Path) -> bool:
    """Result of a test with a process that tries to get a lock held here. Some mounts grant it to both."""
    return _kernel_locks_work(folder.stat().st_dev, folder)


@cache
def _kernel_locks_work(_device: int, folder: Path) -> bool:
    import fcntl

    path = folder / f".locks-{uuid.uuid4().hex}"
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-c", _PROBE, str(path)]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        return answer.strip() == "refused"
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


def check_leases_work(folder: Path) -> None:
    """Raise InputError for a file system on which a lease could have two holders or no successor."""
    name = uuid.uuid4().hex
    first, second = folder / f".locks-{name}", folder / f".locks-{name}.moved"
    reason = ""
    try:
        os.close(os.open(first, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.close(os.open(first, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            reason = "it creates a file twice"
        except FileExistsError:
            pass
        before = first.stat()
        os.utime(first, (before.st_atime, before.st_mtime - 10))
        if first.stat().st_mtime_ns == before.st_mtime_ns:
            reason = reason or "it does not keep the times of files"
        first.rename(second)
        if first.exists() or second.stat().st_ino != before.st_ino:
            reason = reason or "a renamed file is another file"
    except OSError as error:
        reason = error.strerror or str(error)
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)
    if reason:
        message = f"{folder} is on a file system without locks, and without what leases need ({reason}); choose another"
        raise InputError(Problem(message, "--store"))
