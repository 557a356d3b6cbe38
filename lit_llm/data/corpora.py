"""Corpora of documents: a list of files or none, a way to cut them into parts, and a digest of both."""

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

from lit_llm.config.hashing import digest_of_files, fingerprint, remembered
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
from lit_llm.data.synthetic import Synthetic, identity_of_examples, parts_of

FORMAT = 4
"""Version of tokenisation and of the selection of held-out documents; raise it when either changes."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}


class Part(Protocol):
    """A part of a corpus that one process reads. Picklable; equal on every machine."""

    @property
    def size(self) -> int:
        """Bytes to read."""
        ...

    @property
    def skipped(self) -> Counter[str]:
        """Numbers of records that the last reading left out, by `record_files.SKIPPED`."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The documents. Raises InputError for a document that cannot be read."""
        ...

    def file_of(self, number: int) -> Path:
        """File of the part's document `number`."""
        ...


@dataclass(frozen=True)
class TextPart:
    """Part of a corpus of text files, each one document."""

    files: tuple[Path, ...]
    size: int
    encoding: str = "utf-8"
    skip: bool = False
    """Whether to leave out files of another encoding."""
    python: bool = False
    """Whether the files are Python's library, some of whose sources are Latin-1."""
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
                text = ""  # keeps the numbers of later documents
            yield text

    def file_of(self, number: int) -> Path:
        return self.files[number]


def text_parts(files: Sequence[Path], encoding: str = "utf-8", skip: bool = False, python: bool = False) -> list[Part]:
    """Text files in parts of about PART bytes, in order."""
    parts: list[Part] = []
    files_of_part: list[Path] = []
    size = 0
    for path in files:
        files_of_part.append(path)
        size += path.stat().st_size
        if size >= PART:
            parts.append(TextPart(tuple(files_of_part), size, encoding, skip, python))
            files_of_part, size = [], 0
    return [*parts, TextPart(tuple(files_of_part), size, encoding, skip, python)] if files_of_part else parts


class Documents:
    """The documents of some files, in an order that does not depend on the machine."""

    def __init__(
        self,
        files: list[tuple[str, Path]],
        parts: Callable[[], list[Part]] | None = None,
        reading: object = None,
    ) -> None:
        """parts: makes the parts, text files by default; reading: plain data about `parts` for the digest."""
        self.files = files
        """Pairs (name for the digest, path)."""
        self._parts, self._reading = parts, reading

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts())

    def parts(self) -> list[Part]:
        """Parts of some tens of megabytes, in order. Raises InputError for a damaged file."""
        return self._parts() if self._parts else text_parts([path for _, path in self.files])

    def state(self) -> list[tuple[int, ...]]:
        """State of each file in the file system, which changes with its content."""
        states = [path.stat() for _, path in self.files]
        return [(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino) for status in states]

    @cached_property
    def digest(self) -> str:
        """Hash of all names and contents, and of the way of reading."""
        files = digest_of_files(self.files)
        return files if self._reading is None else fingerprint([files, self._reading])

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)


def open_corpus(config: SingleCorpus | Synthetic) -> Documents:
    """Find the documents, or make the examples of a synthetic task.

    Raises InputError for files that are missing, cannot be read, or hold nothing.

    Only the beginnings of files of records are read: compression, schema, first record. Errors further on are raised
    when their part is read.
    """
    if isinstance(config, Synthetic):
        return Documents([], lambda: [*parts_of(config)], identity_of_examples(config))
    if isinstance(config, TextFiles):
        return _text_documents(config)
    if isinstance(config, JsonLines):
        return _record_documents(config, "jsonl", _find(config.files, "*.jsonl"))
    if isinstance(config, Parquet):
        return _record_documents(config, "parquet", _find(config.files, "*.parquet"))
    if isinstance(config, HuggingFace):
        from lit_llm.data.hub import find_files

        kind, paths = find_files(config)
        return _record_documents(config, kind, _numbered(paths))
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


def _text_documents(config: TextFiles) -> Documents:
    """Text files. Each is decoded once, and all that cannot be decoded are reported together."""
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
    # Defaults are left out of the digest.
    chosen = {"encoding": config.encoding, "errors": config.errors}
    reading = None if chosen == {"encoding": "utf-8", "errors": "strict"} else chosen
    paths = [path for _, path in files]
    return Documents(files, lambda: text_parts(paths, config.encoding, skip), reading)


@lru_cache(maxsize=1 << 17)
def _undecodable(path: Path, encoding: str, size: int, modified: int, inode: int) -> Problem | None:
    """Problem of a file that cannot be decoded, or None. Cached by the file's state, since every run of a plan asks."""

    def read() -> str | None:
        try:
            read_text(path, encoding)
        except OtherEncoding as error:
            return error.problems[0].message
        return None

    message = remembered(path, f"not {encoding}", read)
    return None if message is None else Problem(message, f"corpus.files: {path}")


_FIRST = 1000
"""Records of each part that are searched for a document before whole files are."""


def _record_documents(config: Records, kind: str, files: list[tuple[str, Path]]) -> Documents:
    skip_undecodable = isinstance(config, JsonLines) and config.errors == "skip"
    fields = Fields.of(config.text, config.where, config.skip_missing, skip_undecodable)
    problems: list[Problem] = []
    parts: list[RecordsPart] = []
    for _, path in files:
        with collect_errors(problems):
            try:
                path.stat()  # a missing file must not be called damaged
                parts += FORMATS[kind].cut(path, fields)
            except OSError as error:
                raise InputError(Problem(f"cannot be read: {error.strerror}", f"corpus: {path}")) from None
    if problems:
        raise InputError(*problems)
    # Usually the first record is a document; only a corpus without documents is read to its end.
    if not any(part.has_document(count) for count in (1, _FIRST, None) for part in parts):
        raise InputError(_no_documents_problem(config))
    return Documents(files, lambda: [*parts], [kind, fields.as_json()])


def _no_documents_problem(config: Records) -> Problem:
    if not config.where:
        return Problem("these files hold no documents", "corpus")
    wanted = ", ".join(f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in config.where.items())
    return Problem(f"no record of these files has {{{wanted}}}, so there are no documents", "corpus.where")


def _find(patterns: Sequence[str], example: str) -> list[tuple[str, Path]]:
    """Nonempty files that match, each once, by path. Raises InputError with every pattern without a match."""
    problems: list[Problem] = []
    paths: set[Path] = set()
    search = _Search()
    for pattern in dict.fromkeys(patterns):
        names = [pattern] if os.path.isfile(pattern) else search.matching(pattern)
        # A broken link counts as a match, so that it is reported and not silently left out.
        try:
            matches = [path for path in map(Path, names) if path.is_file() or (path.is_symlink() and not path.exists())]
        except _TooMany:
            message = (
                f"leads past more than {MOST_FILES:,} files and folders; name a folder of the corpus alone, or join"
            )
            message += " its documents to JSON lines"
            problems.append(Problem(message, f"corpus.files: {pattern}"))
            continue
        if not matches:
            reason = "no file matches" + ("" if os.path.isabs(pattern) else f"; looked for in {os.getcwd()}")
            if Path(pattern).parent.name == "glosses":  # the folder in the presets and studies that ship
                reason = "no file matches; `python examples/glosses.py` writes them here (see docs/two-stages.md)"
            if os.path.isdir(pattern):
                reason = f"is a directory; write {pattern.rstrip('/')}/**/{example}"
            problems.append(Problem(reason, f"corpus.files: {pattern}"))
        paths.update(Path(os.path.abspath(path)) for path in matches)  # each once, however it is spelled
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
    return _numbered(written)


MOST_FILES = 200_000
"""Most files and folders that a search for the files of a corpus visits."""


class _TooMany(Exception):
    """A search has visited more than MOST_FILES files and folders."""


class _Search:
    """Search like `glob.glob(pattern, recursive=True)` that also ends where a link leads back to the root.

    Raises _TooMany when all its patterns together have visited too many files.
    """

    def __init__(self) -> None:
        self.seen_paths: set[str] = set()

    def count(self, *paths: str) -> None:
        self.seen_paths.update(paths)
        if len(self.seen_paths) > MOST_FILES:
            raise _TooMany

    def matching(self, pattern: str) -> Iterator[str]:
        parts = pattern.split(os.sep)
        if "**" not in parts:
            for name in glob.iglob(pattern):
                self.count(name)
                yield name
            return
        index = parts.index("**")
        top, rest = os.sep.join(parts[:index]) or os.sep, os.sep.join(parts[index + 1 :]) or "*"
        for each in glob.iglob(top) if index else [os.curdir]:
            for folder in self.folders(each):
                yield from self.matching(os.path.join(glob.escape(folder), rest))

    def folders(self, top: str) -> Iterator[str]:
        """A folder and all folders below it, except hidden ones."""
        for folder, inside, files in os.walk(top, followlinks=True):
            self.count(folder, *(os.path.join(folder, name) for name in files))
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            yield folder


def _numbered(files: Sequence[Path]) -> list[tuple[str, Path]]:
    # Results depend on contents and their order, not on names and paths.
    return [(str(index), path) for index, path in enumerate(files)]


class OtherEncoding(InputError):
    """A file's bytes are not text in the given encoding."""


def read_text(path: Path, encoding: str = "utf-8", python: bool = False) -> str:
    """A document, without a byte-order mark.

    python: read a file of another encoding as Latin-1, like some of Python's sources. Raises OtherEncoding for any
    other file of another encoding, and InputError for one that cannot be read.
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
