"""Where documents come from. A corpus is a list of named files with a digest over their names and contents."""

from __future__ import annotations

import glob
import itertools
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lit_llm.config.fingerprint import digest_of_files
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.config import PythonStdlib, SingleCorpus, TextFiles

FORMAT = 2
"""Version of how documents become tokens and which of them are held out; to be raised when that changes."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}


PART = 16 << 20
"""Bytes after which a part of a corpus is closed."""


class Part(Protocol):
    """A piece of a corpus that one process reads alone. Picklable; cut the same way on every machine."""

    @property
    def size(self) -> int:
        """Bytes to read."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The documents. Raises InputError for what cannot be read."""
        ...


@dataclass(frozen=True)
class TextPart:
    """Some text files, each one document."""

    files: tuple[Path, ...]
    size: int

    def __iter__(self) -> Iterator[str]:
        return map(read_text, self.files)


class Documents:
    """The files of a corpus, each one document, in an order that does not depend on the machine."""

    def __init__(self, files: list[tuple[str, Path]]) -> None:
        self.files = files
        """(name without the place it lies in, path)."""

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts())

    def __len__(self) -> int:
        return len(self.files)

    def parts(self) -> list[Part]:
        """The corpus in pieces of some tens of megabytes, in order."""
        found: list[Part] = []
        files: list[Path] = []
        size = 0
        for _, path in self.files:
            files.append(path)
            size += path.stat().st_size
            if size >= PART:
                found.append(TextPart(tuple(files), size))
                files, size = [], 0
        return [*found, TextPart(tuple(files), size)] if files else found

    @cached_property
    def digest(self) -> str:
        """Hash of all names and contents."""
        return digest_of_files(self.files)

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)


def open_corpus(config: SingleCorpus) -> Documents:
    """Find the documents. Raises InputError for files that are not there, cannot be read, or hold nothing."""
    if isinstance(config, TextFiles):
        return _text_files(config)
    assert isinstance(config, PythonStdlib)
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _NOT_LIBRARY]  # pruned: site-packages may be huge
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.stat().st_size)
    if not files:
        raise InputError(Problem(f"this Python has no library sources under {root}; use `corpus: {{kind: text, ...}}`"))
    return Documents(files)


def _text_files(config: TextFiles) -> Documents:
    problems: list[Problem] = []
    paths: set[Path] = set()
    for pattern in config.files:
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        # A link that leads nowhere is found, so that its document is missed.
        found = [path for path in map(Path, names) if path.is_file() or (path.is_symlink() and not path.exists())]
        if not found:
            reason = "no file matches; paths are relative to the working directory"
            if os.path.isdir(pattern):
                reason = f"is a directory; write {pattern.rstrip('/')}/**/*.txt"
            problems.append(Problem(reason, f"corpus.files: {pattern}"))
        paths.update(Path(os.path.abspath(path)) for path in found)  # once, whichever way it is written
    files = sorted(paths)
    for path in files:
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            problems.append(Problem(f"cannot be read: {error.strerror}", f"corpus.files: {path}"))
    written = [] if problems else [path for path in files if path.stat().st_size]
    if not problems and not written:
        problems.append(Problem("these files are all empty", f"corpus.files: {', '.join(config.files)}"))
    if problems:
        raise InputError(*problems)
    # Names and places do not matter to what is learnt, contents and their order do.
    return Documents([(str(index), path) for index, path in enumerate(written)])


def read_text(path: Path) -> str:
    """A document. Raises InputError if it is not UTF-8 (Python's own sources may declare Latin-1)."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if path.suffix == ".py":
            return raw.decode("latin-1")
        raise InputError(
            Problem(f"is not UTF-8 (byte {error.start}); convert it first", f"corpus.files: {path}")
        ) from None
