"""Files of records, one document in each: JSON lines, Parquet, Arrow.

A format is a class: `cut` divides a file into parts, iterating a part gives its documents. To add one, write the class
and its line in `FORMATS`, its choice of corpus in `config.py`, and the line in `corpora.open_corpus` that opens it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from lit_llm.config.problems import InputError, Problem, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

PART = 16 << 20
"""Bytes after which a part of a corpus is closed."""
LONGEST_LINE = 64 << 20
"""Bytes of a line of JSON, uncompressed; a long book has two million."""


@dataclass(frozen=True)
class Fields:
    """Which records are read, and what of them is the document. Names are keys or columns, dotted for inner ones."""

    text: str
    where: tuple[tuple[str, frozenset[Any]], ...] = ()
    """(name, values of which a record must have one)."""
    skip_missing: bool = False
    """Leave out records without text."""
    skip_undecodable: bool = False
    """Leave out lines that are not UTF-8."""

    @classmethod
    def of(
        cls, text: str, where: Mapping[str, Any], skip_missing: bool = False, skip_undecodable: bool = False
    ) -> Fields:
        listed = {name: allowed if isinstance(allowed, tuple) else (allowed,) for name, allowed in where.items()}
        allowed = tuple((name, frozenset(map(_comparable, values))) for name, values in listed.items())
        return cls(text, allowed, skip_missing, skip_undecodable)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.text, *(name for name, _ in self.where))

    def keep(self, values: Iterable[Any]) -> bool:
        """Whether a record with these values, in the order of `where`, is read."""
        return all(_comparable(value) in allowed for value, (_, allowed) in zip(values, self.where, strict=True))

    def as_json(self) -> dict[str, Any]:
        """For the identity: the order in which values are listed does not matter."""
        chosen = {key: True for key in ("skip_missing", "skip_undecodable") if getattr(self, key)}
        return {"text": self.text, "where": {name: sorted(map(list, allowed)) for name, allowed in self.where}} | chosen


def _comparable(value: Any) -> tuple[str, Any]:
    """true is not 1, nor is "1"; 1.0 is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__, value if isinstance(value, str | bool) else None
    return "number", value


WITHOUT_TEXT, UNDECODABLE = "without_text", "undecodable"
SKIPPED = {WITHOUT_TEXT: "records without text", UNDECODABLE: "files or lines of another encoding"}
"""What may be left out where a corpus asks for it."""


@dataclass(frozen=True)
class RecordsPart(ABC):
    """A run of a file's records, from `first` to before `last`, in what the format counts."""

    path: Path
    fields: Fields
    first: int
    last: int
    size: int
    """Bytes of what is read."""
    skipped: Counter[str] = field(default_factory=Counter, compare=False)
    """What its last reading has left out, by SKIPPED."""

    @classmethod
    @abstractmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        """The parts of a file. Raises InputError for what its head (its schema, its first record) says is wrong."""

    @abstractmethod
    def records(self) -> Iterator[str | None]:
        """The document of each record, None for one that is not kept. Raises InputError, with the place."""

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        return (text for text in self.records() if text)

    def file_of(self, number: int) -> Path:
        return self.path

    def has_document(self, records: int | None) -> bool:
        """Whether there is one among the first records (None: all)."""
        return any(islice(self.records(), records))


_SKIP = "; `skip_missing: true` leaves such records out"


def _problem(path: Path, place: str, message: str) -> InputError:
    return InputError(Problem(message, f"corpus: {path}{place}"))


def _cause(error: Exception) -> str:
    """A library's reason in one line."""
    if "Frame requires too much memory" in str(error):
        return (
            "a window of more than 128 MiB (zstd --long) is not read; compress it anew: "
            "`zstd -dc --long=31 FILE | zstd -o OTHER.zst`"
        )
    reason = getattr(error, "strerror", None) or str(error)
    return reason.strip().split("\n")[0] or type(error).__name__


# --- JSON lines ----------------------------------------------------------------------------------------------------

_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _zstandard(path),
}


def _zstandard(path: Path) -> IO[bytes]:
    # The zstandard package ends a truncated file in silence; Arrow does not.
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)


@dataclass(frozen=True)
class JsonLinesPart(RecordsPart):
    """Lines from byte `first` to byte `last` of a plain file; a compressed file is one part, whatever `last` is.

    A line has at most LONGEST_LINE bytes: a small archive may hold one that is larger than the memory.
    """

    @classmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        size = path.stat().st_size
        whole = cls(path, fields, 0, size, size)
        next(whole.records(), None)
        if path.suffix in _COMPRESSED:
            return [whole]
        ends = [0]
        with path.open("rb") as file:
            while ends[-1] < size:
                file.seek(min(ends[-1] + PART, size))
                file.readline()
                ends.append(file.tell())
        return [cls(path, fields, first, last, last - first) for first, last in pairwise(ends)]

    def records(self) -> Iterator[str | None]:
        place, number = self.first, 0
        opened = _COMPRESSED.get(self.path.suffix)
        try:
            with opened(self.path) if opened else self.path.open("rb") as file:
                if not opened:
                    file.seek(self.first)
                while (opened or place < self.last) and (line := file.readline(LONGEST_LINE + 1)):
                    if len(line) > LONGEST_LINE:
                        message = (
                            f"is longer than {LONGEST_LINE >> 20} MB; a document is one line: is the file JSON lines?"
                        )
                        raise self._wrong(number + 1, message)
                    content = line if place else line.removeprefix(codecs.BOM_UTF8)
                    place, number = place + len(line), number + 1
                    if content.strip():
                        yield self._document(content, number)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise self._wrong(number + 1, f"is damaged or cannot be read: {_cause(error)}") from None

    def _document(self, line: bytes, number: int) -> str | None:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            if self.fields.skip_undecodable:
                self.skipped[UNDECODABLE] += 1
                return None
            message = f"is not UTF-8 (byte {error.start} of the line); `errors: skip` leaves such lines out"
            raise self._wrong(number, message) from None
        except (ValueError, RecursionError) as error:
            raise self._wrong(number, f"is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise self._wrong(number, "should be an object, {...}; a file has one on each line")
        if not self.fields.keep(_value(record, name) for name, _ in self.fields.where):
            return None
        text = _value(record, self.fields.text)
        if text is None and self.fields.skip_missing:
            self.skipped[WITHOUT_TEXT] += 1
            return None
        if text is None:
            keys = _keys(record)
            near = "" if self.fields.text in keys else did_you_mean(self.fields.text, keys)
            raise self._wrong(number, f"has no text under {self.fields.text!r}{near}{_SKIP}")
        if not isinstance(text, str):
            raise self._wrong(number, f"{self.fields.text!r} should be a string, not {json.dumps(text)[:40]}")
        if b"\\ud" in line or b"\\uD" in line:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise self._wrong(number, f"{self.fields.text!r} has {half}, half of a character") from None
        return text

    def _wrong(self, number: int, message: str) -> InputError:
        """number: the line, counted from this part's first."""
        if self.first:
            with self.path.open("rb") as file:
                left = self.first
                while block := file.read(min(left, 1 << 20)):
                    left, number = left - len(block), number + block.count(b"\n")
        return _problem(self.path, f":{number}", message)


def _value(record: Mapping[str, Any], name: str) -> Any:
    """What an object has under a key, or under a path of keys; None if nothing."""
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _keys(record: Mapping[str, Any]) -> list[str]:
    inner = [f"{key}.{name}" for key, value in record.items() if isinstance(value, dict) for name in _keys(value)]
    return [*record, *inner][:20]


# --- tables --------------------------------------------------------------------------------------------------------


@contextmanager
def _arrow(path: Path, place: str, what: str) -> Iterator[None]:
    """Arrow's errors in our words; they are ValueError and OSError, damaged text UnicodeDecodeError."""
    try:
        yield
    except (ValueError, OSError, EOFError, NotImplementedError, KeyError) as error:
        raise _problem(path, place, f"{what}: {_cause(error)}") from None


def _check_schema(schema: pa.Schema, path: Path, fields: Fields) -> None:
    """Raise InputError for a column that is not there or holds no text."""
    import pyarrow.types as types

    found = dict(_columns(schema))
    problems = []
    for name in fields.names:
        kind = found.get(name)
        if kind is None:
            problems.append(Problem(f"has no column {name!r}{did_you_mean(name, found)}", f"corpus: {path}"))
        elif name == fields.text:
            inner = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
                problems.append(Problem(f"column {name!r} should hold strings, not {kind}", f"corpus: {path}"))
    if problems:
        raise InputError(*problems)


def _columns(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """(dotted name, type) of all columns and what structs hold."""
    import pyarrow.types as types

    for each in fields:
        yield prefix + each.name, each.type
        if types.is_struct(each.type):
            yield from _columns(each.type, f"{prefix}{each.name}.")


def _rows(
    batch: pa.RecordBatch, fields: Fields, text: bool, without: Callable[[int], InputError], skipped: Counter[str]
) -> Iterator[str | None]:
    """The document of each row. without: the error for a row that has none; text: False to say only what is kept."""
    names = fields.names if text else fields.names[1:]
    columns = {name: _column(batch, name) for name in names}
    for row in range(batch.num_rows):
        if not fields.keep(columns[name][row] for name, _ in fields.where):
            yield None
        elif not text:
            yield fields.text
        elif (document := columns[fields.text][row]) is None and fields.skip_missing:
            skipped[WITHOUT_TEXT] += 1
            yield None
        elif document is None:
            raise without(row)
        else:
            yield document


def _column(batch: pa.RecordBatch, name: str) -> list[Any]:
    import pyarrow.compute as compute

    if name in batch.schema.names:
        return list(batch.column(name).to_pylist())
    top, *inner = name.split(".")
    return list(compute.struct_field(batch.column(top), inner).to_pylist())


@dataclass(frozen=True)
class ParquetPart(RecordsPart):
    """Row groups."""

    @classmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        import pyarrow.parquet as parquet

        with _arrow(path, "", "is no Parquet file"), parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        _check_schema(schema, path, fields)
        sizes = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(index) for index in range(group.num_columns)]
            needed = [column for column in columns if _inside(column.path_in_schema, fields.names)]
            sizes.append(sum(column.total_uncompressed_size for column in needed))
        return [cls(path, fields, *run) for run in _runs(sizes)]

    def records(self) -> Iterator[str | None]:
        return self._records(True)

    def has_document(self, records: int | None) -> bool:
        # Where records without text are left out, what they hold has to be read.
        return any(islice(self._records(self.fields.skip_missing), records))

    def _records(self, text: bool) -> Iterator[str | None]:
        import pyarrow.parquet as parquet

        names = list(self.fields.names if text else self.fields.names[1:])
        for group in range(self.first, self.last):
            row, here = 0, f" row group {group}"
            with _arrow(self.path, here, "is damaged"), parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=names):
                    yield from _rows(batch, self.fields, text, self._without(f"{here}, row ", row), self.skipped)
                    row += batch.num_rows

    def _without(self, here: str, before: int) -> Callable[[int], InputError]:
        name = self.fields.text
        return lambda row: _problem(self.path, f"{here}{before + row}", f"column {name!r} has no text{_SKIP}")


def _inside(column: str, names: Iterable[str]) -> bool:
    return any(column == name or column.startswith(f"{name}.") for name in names)


def _runs(sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(first, last, bytes) of runs that are closed when they have PART bytes."""
    first = last = total = 0
    for size in sizes:
        last, total = last + 1, total + size
        if total >= PART:
            yield first, last, total
            first, total = last, 0
    if last > first:
        yield first, last, total


@dataclass(frozen=True)
class ArrowPart(RecordsPart):
    """Record batches of an Arrow stream or file, as the `datasets` library writes them."""

    @classmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        with _arrow(path, "", "is no Arrow file, or a damaged one"), _batches(path) as (schema, batches):
            _check_schema(schema, path, fields)
            tops = [name if name in schema.names else name.split(".")[0] for name in fields.names]
            sizes = [sum(batch.column(top).nbytes for top in tops) for batch in batches]
        return [cls(path, fields, *run) for run in _runs(sizes)]

    def records(self) -> Iterator[str | None]:
        with _arrow(self.path, "", "is damaged"), _batches(self.path) as (_, batches):
            for number, batch in enumerate(islice(batches, self.first, self.last), self.first):
                yield from _rows(batch, self.fields, True, self._without(number), self.skipped)

    def _without(self, number: int) -> Callable[[int], InputError]:
        name = self.fields.text
        return lambda row: _problem(
            self.path, f" record batch {number}, row {row}", f"column {name!r} has no text{_SKIP}"
        )


@contextmanager
def _batches(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            yield stream.schema, iter(stream)


FORMATS: dict[str, type[RecordsPart]] = {"jsonl": JsonLinesPart, "parquet": ParquetPart, "arrow": ArrowPart}
