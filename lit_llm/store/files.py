"""Files that are written atomically and verified when they are read."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from lit_llm.config.hashing import LENGTH, digest_of_file
from lit_llm.config.host import process_name
from lit_llm.config.problems import InputError, Problem, SourceLocation


class Damaged(InputError):
    """A file of the store cannot be read, or its content has changed."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(Problem(reason, location=SourceLocation(str(path))))


KEY = "digest_of_rest"
"""Key of the digest of a file's rest: the first key of a JSON object, a comment in YAML."""
_KEYED = re.compile(rf'\{{\n "(.{{{len(KEY)}}})": "|# (.{{{len(KEY)}}}): ')
_SIGNATURE = re.compile(rf'(?:\{{\n "{KEY}": "|# {KEY}: )(.{{{LENGTH}}})(?:",)?\n')


def with_digest(text: str) -> str:
    """JSON or YAML text with the digest of its content in front, for `read_verified`."""
    if text.startswith("{\n"):
        body = text.removeprefix("{\n")
        return f'{{\n "{KEY}": "{_digest_of_text(body)}",\n{body}'
    return f"# {KEY}: {_digest_of_text(text)}\n{text}"


def read_verified(path: Path) -> str:
    """The text of a file, checked against the digest in front of it, if any.

    Raises Damaged where it cannot be read or has changed, and FileNotFoundError.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Damaged(path, f"is damaged: {error}") from None
    signature = _SIGNATURE.match(text)
    if is_signed(text) and (signature is None or signature[1] != _digest_of_text(text[signature.end() :])):
        raise Damaged(path, "is damaged: its content is not that of its digest")
    return text


def is_signed(text: str) -> bool:
    """True where a text begins with its digest, even if a bit of the digest's key is flipped."""
    match = _KEYED.match(text)
    return match is not None and sum(map(str.__ne__, match[1] or match[2], KEY)) <= 1


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def check_digest(path: Path, digest: str) -> None:
    """Raise Damaged unless a file has this digest. An unchanged file is read once."""
    try:
        status = path.stat()
        actual = _digest(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    except FileNotFoundError:
        raise Damaged(path, "is missing") from None
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None
    if actual != digest:
        raise Damaged(path, "is damaged: its content is not that of its digest" if status.st_size else "is empty")


def file_digest(path: Path) -> str:
    """Digest of a file, as `check_digest` takes it."""
    return digest_of_file(path)[:LENGTH]


@lru_cache(maxsize=1 << 16)
def _digest(path: Path, *_stamp: int) -> str:
    return file_digest(path)


@contextmanager
def replacing(path: Path, durable: bool = True, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a work file that replaces `path` after the block; creates its folder.

    A reader sees the old file or the new one, whole. durable: the file survives a crash of the machine. check: called
    in the last instant; when it raises, the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = work_file(path)
    try:
        work.write_bytes(b"")
        mode = work.stat().st_mode  # the umask's; a library may create the file for its owner alone
        yield work
        work.chmod(mode)
        put_in_place(work, path, durable, check)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def work_file(path: Path) -> Path:
    """Name of this process's work file for a path, which other processes and hosts may write too."""
    return path.with_name(f".{path.name}.{process_name()}")


def put_in_place(work: Path, path: Path, durable: bool = True, check: Callable[[], None] = lambda: None) -> None:
    """Rename a work file to `path`, atomically. durable: content and name are on the disk afterwards.

    check: called directly before the rename.
    """
    if durable:
        _sync(work)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()  # only an empty folder; raises OSError otherwise
    check()
    work.replace(path)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
