"""Fingerprints: the identity of what was computed. Equal content, equal name; nothing else goes in."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

LENGTH = 16
"""Hexadecimal digits: 64 bits, so a million stages collide with probability 3e-8."""


def fingerprint(content: Any) -> str:
    """Hash of plain data (the validated dump, not the text it was written in). 1 and 1.0 are one number."""
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash over (name, content) pairs, in the order given."""
    total = hashlib.sha256()
    for name, path in files:
        total.update(f"{name}\0{digest_of_file(path)}\0".encode())
    return total.hexdigest()[:LENGTH]


_REMEMBERED = 1 << 20
"""Bytes from which on a file's hash is worth remembering."""


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content. A large file that has not been touched since is not read again.

    Its hash is remembered in the user's cache directory, by its place, size, times and inode; where that cannot be
    written, it is computed each time.
    """
    before = path.stat()
    key = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
    # A file written just now may be written again within the same tick of its clock.
    settled = before.st_size >= _REMEMBERED and time.time() - before.st_mtime > 2
    note = _cache() / "digests" / f"{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()}.json"
    if settled:
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(note.read_bytes())
            if known["file"] == key:
                return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if settled and key == [after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino]:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            work = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            work.write_text(json.dumps({"file": key, "sha256": digest}))
            work.replace(note)
    return digest


def _cache() -> Path:
    """Where what can be computed again is kept for this user."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "lit-llm"
