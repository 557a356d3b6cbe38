"""Fingerprints: names of computations by their content. Equal content has equal names."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_llm.config.host import process_name

LENGTH = 16
"""Hexadecimal digits: 64 bits, so a million stages collide with probability 3e-8."""


def fingerprint(content: Any) -> str:
    """Hash of plain data (the validated dump, not its text). 1 and 1.0 are equal."""
    return _digest(_text(content))


class Template:
    """Fingerprints of contents that differ in one top-level value; the rest is written as text once."""

    def __init__(self, content: Mapping[str, Any], name: str) -> None:
        """Make a template of a content without the value of `name`."""
        before = {key: item for key, item in content.items() if key < name}
        after = {key: item for key, item in content.items() if key > name}
        self._before = f"{_text(before)[:-1]}{',' if before else ''}{_text(name)}:"
        self._after = f"{',' if after else ''}{_text(after)[1:]}"

    def fingerprint(self, value: Any) -> str:
        """`fingerprint` of the content with this value."""
        return _digest(f"{self._before}{_text(value)}{self._after}")


def _text(content: Any) -> str:
    return json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
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
"""Smallest size in bytes of a file whose hash is cached."""


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content. A large file that has not changed is not read again."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return str(remembered(path, "sha256", read))


def remembered(path: Path, what: str, read: Callable[[], str | None]) -> str | None:
    """The return value of `read` for a file's content, cached for large files that have not changed.

    The user's cache directory keeps it by the file's path, size, times and inode. Where that cannot be written, `read`
    is called each time. Nothing is kept when it raises.

    what: name of the value among those of one file, `sha256`.
    """
    key = _state(path)
    # A file written just now may be written again within the same tick of its clock.
    settled = key[0] >= _REMEMBERED and time.time() - key[1] / 1e9 > 2
    note = user_cache() / "digests" / f"{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()}.json"
    answers: dict[str, Any] = {}
    if settled:
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(note.read_bytes())
            if kept["file"] == key:
                answers = kept
    if what in answers:
        kept_answer = answers[what]
        return None if kept_answer is None else str(kept_answer)
    answer = read()
    with suppress(OSError):
        if settled and key == _state(path):
            write_cached(note, json.dumps({**answers, "file": key, what: answer}))
    return answer


def kept(name: str, compute: Callable[[], str]) -> str:
    """The return value of `compute`, from the user's cache where it has this name; `a/b` is a file in a folder."""
    file = user_cache() / name
    with suppress(OSError, ValueError):
        if text := file.read_text(encoding="utf-8"):
            return text
    text = compute()
    with suppress(OSError):
        write_cached(file, text)
    return text


def write_cached(file: Path, text: str) -> None:
    """Write a file of the cache atomically, beside other writers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(f"{file.name}.{process_name()}-{threading.get_ident()}")
    work.write_text(text, encoding="utf-8")
    work.replace(file)


def _state(path: Path) -> list[int]:
    """Size in bytes, times in nanoseconds and inode of a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def user_cache() -> Path:
    """Cache folder of this user, for values that can be computed again."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "lit-llm"
