"""Where documents come from. A corpus is a list of files, a way to cut them into parts, and a digest of both."""

from __future__ import annotations

import glob
import itertools
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from lit_llm.config.fingerprint import digest_of_files, fingerprint, remembered
from lit_llm.config.problems import InputError, Problem, collect_errors
from lit_llm.data.config import (
    HuggingFace,
    JsonLines,
    Parquet,
    PythonStdlib,
    Records,
    SingleCorpus,
    TextFiles,
)
from lit_llm.data.record_files import FORMATS, PART, UNDECODABLE, Fields, RecordsPart

FORMAT = 4
"""Version of how documents become tokens and which of them are held out; to be raised when that changes."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}


class Part(Protocol):
    """A piece of a corpus that one process reads alone. Picklable; cut the same way on every machine."""

    @property
    def size(self) -> int:
        """Bytes to read."""
        ...

    @property
    def skipped(self) -> Counter[str]:
        """What its last reading has left out, by `record_files.SKIPPED`."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The documents. Raises InputError for what cannot be read."""
        ...

    def file_of(self, number: int) -> Path:
        """Where its document of that number lies."""
        ...


@dataclass(frozen=True)
class TextPart:
    """Some text files, each one document."""

    files: tuple[Path, ...]
    size: int
    encoding: str = "utf-8"
    skip: bool = False
    """Leave out files of another encoding."""
    python: bool = False
    """Python's own sources: what is not in the encoding is Latin-1, which some of them declare."""
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        for path in self.files:
            try:
                text = read_text(path, self.encoding, self.python)
            except OtherEncoding:
                if not self.skip:
                    raise
                self.skipped[UNDECODABLE] += 1
                text = ""  # so that documents keep their numbers
            yield text

    def file_of(self, number: int) -> Path:
        return self.files[number]


def text_parts(files: Sequence[Path], encoding: str = "utf-8", skip: bool = False, python: bool = False) -> list[Part]:
    """Text files in parts of about PART bytes, in order."""
    found: list[Part] = []
    here: list[Path] = []
    size = 0
    for path in files:
        here.append(path)
        size += path.stat().st_size
        if size >= PART:
            found.append(TextPart(tuple(here), size, encoding, skip, python))
            here, size = [], 0
    return [*found, TextPart(tuple(here), size, encoding, skip, python)] if here else found


class Documents:
    """The documents of some files, in an order that does not depend on the machine."""

    def __init__(
        self,
        files: list[tuple[str, Path]],
        parts: Callable[[], list[Part]] | None = None,
        reading: object = None,
    ) -> None:
        """parts: how they are read, if not as text; reading: the same for the digest."""
        self.files = files
        """(name without the place it lies in, path)."""
        self._parts, self._reading = parts, reading

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts())

    def parts(self) -> list[Part]:
        """The corpus in pieces of some tens of megabytes, in order. Raises InputError for a file that is damaged."""
        return self._parts() if self._parts else text_parts([path for _, path in self.files])

    def state(self) -> list[tuple[int, ...]]:
        """What of each file changes with its content, read from the file system alone."""
        states = [path.stat() for _, path in self.files]
        return [(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino) for found in states]

    @cached_property
    def digest(self) -> str:
        """Hash of all names and contents, and of how they are read."""
        files = digest_of_files(self.files)
        return files if self._reading is None else fingerprint([files, self._reading])

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)


def open_corpus(config: SingleCorpus) -> Documents:
    """Find the documents. Raises InputError for files that are not there, cannot be read, or hold nothing.

    Of files of records the beginnings are read: compression, schema, first record. What is wrong further on is told
    when the part that holds it is read.
    """
    if isinstance(config, TextFiles):
        return _texts(config)
    if isinstance(config, JsonLines):
        return _records(config, "jsonl", _find(config.files, "*.jsonl"))
    if isinstance(config, Parquet):
        return _records(config, "parquet", _find(config.files, "*.parquet"))
    if isinstance(config, HuggingFace):
        from lit_llm.data.hub import find_files

        kind, paths = find_files(config)
        return _records(config, kind, _named(paths))
    assert isinstance(config, PythonStdlib)
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _NOT_LIBRARY]  # pruned: site-packages may be huge
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.stat().st_size)
    if not files:
        raise InputError(Problem(f"this Python has no library sources under {root}; use `corpus: {{kind: text, ...}}`"))
    sources = [path for _, path in files]
    return Documents(files, lambda: text_parts(sources, python=True))


def _texts(config: TextFiles) -> Documents:
    """Text files, each decoded once: what cannot be is told now, all of it."""
    files, skip = _find(config.files, "*.txt"), config.errors == "skip"
    problems: list[Problem] = []
    readable = 0
    for _, path in files:
        status = path.stat()
        with collect_errors(problems):
            problem = _undecodable(path, config.encoding, status.st_size, status.st_mtime_ns, status.st_ino)
            readable += problem is None
            problems += [problem] if problem and not skip else []
    if problems:
        raise InputError(*problems)
    if not readable:
        raise InputError(Problem(f"none of these files is {config.encoding}", "corpus.encoding"))
    # As it was before there was a choice, where nothing else is chosen.
    chosen = {"encoding": config.encoding, "errors": config.errors}
    reading = None if chosen == {"encoding": "utf-8", "errors": "strict"} else chosen
    paths = [path for _, path in files]
    return Documents(files, lambda: text_parts(paths, config.encoding, skip), reading)


@lru_cache(maxsize=1 << 17)
def _undecodable(path: Path, encoding: str, size: int, modified: int, inode: int) -> Problem | None:
    """What is wrong with a file in this state; a plan asks for each of its runs. A large file is decoded once."""

    def read() -> str | None:
        try:
            read_text(path, encoding)
        except OtherEncoding as error:
            return error.problems[0].message
        return None

    message = remembered(path, f"not {encoding}", read)
    return None if message is None else Problem(message, f"corpus.files: {path}")


_FIRST = 1000
"""Records of each part that are looked at for a document, before whole files are."""


def _records(config: Records, kind: str, files: list[tuple[str, Path]]) -> Documents:
    skip_undecodable = isinstance(config, JsonLines) and config.errors == "skip"
    fields = Fields.of(config.text, config.where, config.skip_missing, skip_undecodable)
    problems: list[Problem] = []
    parts: list[RecordsPart] = []
    for _, path in files:
        with collect_errors(problems):
            try:
                path.stat()  # so that what is missing is not called damaged
                parts += FORMATS[kind].cut(path, fields)
            except OSError as error:
                raise InputError(Problem(f"cannot be read: {error.strerror}", f"corpus: {path}")) from None
    if problems:
        raise InputError(*problems)
    # Usually the first record says it; a corpus of which nothing is kept is read to its end to be sure.
    if not any(part.has_document(count) for count in (1, _FIRST, None) for part in parts):
        raise InputError(_nothing_in(config))
    return Documents(files, lambda: [*parts], [kind, fields.as_json()])


def _nothing_in(config: Records) -> Problem:
    if not config.where:
        return Problem("these files hold no documents", "corpus")
    wanted = ", ".join(f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in config.where.items())
    return Problem(f"no record of these files has {{{wanted}}}, so there are no documents", "corpus.where")


def _find(patterns: Sequence[str], example: str) -> list[tuple[str, Path]]:
    """The files that have content, each once, by path. Raises InputError with every pattern that finds nothing."""
    problems: list[Problem] = []
    paths: set[Path] = set()
    search = _Search()
    for pattern in dict.fromkeys(patterns):
        names = [pattern] if os.path.isfile(pattern) else search.matching(pattern)
        # A link that leads nowhere is found, so that its document is missed.
        try:
            found = [path for path in map(Path, names) if path.is_file() or (path.is_symlink() and not path.exists())]
        except _TooMany:
            message = (
                f"leads past more than {MOST_FILES:,} files and folders; name a folder of the corpus alone, or join"
            )
            message += " its documents to JSON lines"
            problems.append(Problem(message, f"corpus.files: {pattern}"))
            continue
        if not found:
            reason = "no file matches" + ("" if os.path.isabs(pattern) else f"; looked for in {os.getcwd()}")
            if Path(pattern).parent.name == "glosses":  # where the presets and studies that ship look for them
                reason = "no file matches; `python examples/glosses.py` writes them here (see docs/two-stages.md)"
            if os.path.isdir(pattern):
                reason = f"is a directory; write {pattern.rstrip('/')}/**/{example}"
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
        problems.append(Problem("these files are all empty", f"corpus.files: {', '.join(patterns)}"))
    if problems:
        raise InputError(*problems)
    return _named(written)


MOST_FILES = 200_000
"""Files and folders among which the files of a corpus are looked for."""


class _TooMany(Exception):
    """More than MOST_FILES."""


class _Search:
    """Finds what `glob.glob(pattern, recursive=True)` does, which would not end where a link leads back to the root.

    Raises _TooMany when all its patterns together have looked at too much.
    """

    def __init__(self) -> None:
        self.looked: set[str] = set()

    def look(self, *paths: str) -> None:
        self.looked.update(paths)
        if len(self.looked) > MOST_FILES:
            raise _TooMany

    def matching(self, pattern: str) -> Iterator[str]:
        parts = pattern.split(os.sep)
        if "**" not in parts:
            for name in glob.iglob(pattern):
                self.look(name)
                yield name
            return
        place = parts.index("**")
        top, rest = os.sep.join(parts[:place]) or os.sep, os.sep.join(parts[place + 1 :]) or "*"
        for each in glob.iglob(top) if place else [os.curdir]:
            for folder in self.folders(each):
                yield from self.matching(os.path.join(glob.escape(folder), rest))

    def folders(self, top: str) -> Iterator[str]:
        """A folder and those below it, but for hidden ones."""
        for folder, inside, files in os.walk(top, followlinks=True):
            self.look(folder, *(os.path.join(folder, name) for name in files))
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            yield folder


def _named(files: Sequence[Path]) -> list[tuple[str, Path]]:
    # Names and places do not matter to what is learnt, contents and their order do.
    return [(str(index), path) for index, path in enumerate(files)]


class OtherEncoding(InputError):
    """A file's bytes are not text in the encoding that it is read in."""


def read_text(path: Path, encoding: str = "utf-8", python: bool = False) -> str:
    """A document, without a byte-order mark.

    python: read what is of another encoding as Latin-1, which some of Python's own sources declare. Raises
    OtherEncoding if it is of another encoding otherwise, and InputError if it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(Problem(f"cannot be read: {error.strerror}", f"corpus.files: {path}")) from None
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        if python:
            return raw.decode("latin-1")
        byte = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        message = f"is not {encoding.upper()}{byte}; name its `encoding`, or leave such files out by `errors: skip`"
        raise OtherEncoding(Problem(message, f"corpus.files: {path}")) from None
