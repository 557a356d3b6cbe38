"""Files of records, one document in each: JSON lines, Parquet, Arrow.

A format is a class: `cut` divides a file into parts, and a part iterates over its documents. A new format needs a
class, an entry in `FORMATS`, a kind of corpus in `config.py`, and a branch in `corpora.open_corpus` that opens it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import sys
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from lit_llm.config.problems import InputError, Problem, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

PART = 16 << 20
"""Bytes after which a part of a corpus is closed."""
LONGEST_LINE = 64 << 20
"""Largest number of bytes of a line of JSON, uncompressed; a long book has two million."""


@dataclass(frozen=True)
class Fields:
    """Fields of a record that select it, and that hold its document. Their names are dotted for nested ones."""

    text: str
    """Name of the document."""
    where: tuple[tuple[str, frozenset[Any]], ...] = ()
    """(name, allowed values): a record is read if it has one of them under each name."""
    skip_missing: bool = False
    """Leave out records without text."""
    skip_undecodable: bool = False
    """Leave out lines that are not UTF-8."""

    @classmethod
    def of(
        cls, text: str, where: Mapping[str, Any], skip_missing: bool = False, skip_undecodable: bool = False
    ) -> Fields:
        """Fields from a corpus section, in which `where` gives one value or a tuple of them for each name."""
        values_by_name = {name: value if isinstance(value, tuple) else (value,) for name, value in where.items()}
        conditions = tuple((name, frozenset(map(_comparable, values))) for name, values in values_by_name.items())
        return cls(text, conditions, skip_missing, skip_undecodable)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is read of a record: the document's, then those of `where`."""
        return (self.text, *(name for name, _ in self.where))

    def keep(self, values: Iterable[Any]) -> bool:
        """True where a record with these values, in the order of `where`, is read."""
        return all(_comparable(value) in allowed for value, (_, allowed) in zip(values, self.where, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Content for the corpus digest, independent of the order in which values are listed."""
        skips = {key: True for key in ("skip_missing", "skip_undecodable") if getattr(self, key)}
        return {"text": self.text, "where": {name: sorted(map(list, allowed)) for name, allowed in self.where}} | skips


def _comparable(value: Any) -> tuple[str, Any]:
    """Type and value by which a record's value is compared: 1 equals 1.0, and neither true nor "1"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__, value if isinstance(value, str | bool) else None
    return "number", value


WITHOUT_TEXT, UNDECODABLE = "without_text", "undecodable"
SKIPPED = {WITHOUT_TEXT: "records without text", UNDECODABLE: "files or lines of another encoding"}
"""Kinds of records that a corpus may leave out, as messages name them."""


@dataclass(frozen=True)
class RecordsPart(ABC):
    """Consecutive records of a file: its bytes, row groups or record batches from `first` to before `last`."""

    path: Path
    fields: Fields
    first: int
    last: int
    size: int
    """Bytes to read."""
    skipped: Counter[str] = field(default_factory=Counter, compare=False)
    """Number of records that the last reading has left out, by the keys of SKIPPED."""

    @classmethod
    @abstractmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        """The parts of a file. Raises InputError for what its schema or its first record shows to be wrong."""

    @abstractmethod
    def records(self) -> Iterator[str | None]:
        """The document of each record, None for one that is left out. Raises InputError with the place in the file."""

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        return filter(None, self.records())

    def file_of(self, number: int) -> Path:
        """The file that holds the document of this number."""
        return self.path

    def has_document(self, records: int | None) -> bool:
        """True where one of the first `records` records (None: of all) is a document."""
        return any(islice(self.records(), records))


_SKIP = "; `skip_missing: true` leaves such records out"


def _problem(path: Path, place: str, message: str) -> InputError:
    """The error for a place in a file, as `:3` or ` row group 2`."""
    return InputError(Problem(message, f"corpus: {path}{place}"))


def _cause(error: Exception) -> str:
    """One line with the reason that a library's error gives."""
    if "Frame requires too much memory" in str(error):
        return (
            "a window of more than 128 MiB (zstd --long) is not read; compress it anew: "
            "`zstd -dc --long=31 FILE | zstd -o OTHER.zst`"
        )
    reason = getattr(error, "strerror", None) or str(error)
    return reason.strip().split("\n")[0] or type(error).__name__


# --- JSON lines ----------------------------------------------------------------------------------------------------


def _open_zstandard(path: Path) -> IO[bytes]:
    # The zstandard package ends a truncated file in silence; Arrow does not.
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)


# Arrow's gzip and bz2 refuse the zeros that tapes and block devices leave behind an archive.
_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


@dataclass(frozen=True)
class JsonLinesPart(RecordsPart):
    """Lines from byte `first` to byte `last` of a plain file, or all lines of a compressed one.

    A line has at most LONGEST_LINE bytes: a small archive may hold one that is larger than the memory. Lines are parsed
    one by one because Arrow's JSON reader takes two objects in a line or one over two lines, and crashes on `null`.
    """

    @classmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        size, compressed = path.stat().st_size, path.suffix in _COMPRESSED
        whole = cls(path, fields, 0, sys.maxsize if compressed else size, size)
        next(whole.records(), None)
        if compressed:
            return [whole]
        ends = [0]
        with path.open("rb") as file:
            while ends[-1] < size:
                file.seek(min(ends[-1] + PART, size))
                file.readline()
                ends.append(file.tell())
        return [cls(path, fields, first, last, last - first) for first, last in pairwise(ends)]

    def records(self) -> Iterator[str | None]:
        position, number = self.first, 0
        open_file = _COMPRESSED.get(self.path.suffix, partial(open, mode="rb"))
        try:
            with open_file(self.path) as file:
                if self.first:
                    file.seek(self.first)
                while position < self.last and (line := file.readline(LONGEST_LINE + 1)):
                    content = line if position else line.removeprefix(codecs.BOM_UTF8)
                    position, number = position + len(line), number + 1
                    if len(line) > LONGEST_LINE:
                        limit = f"{LONGEST_LINE >> 20} MB"
                        message = f"is longer than {limit}; a document is one line: is the file JSON lines?"
                        raise self._error(number, message)
                    if content.strip():
                        yield self._document(content, number)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise self._error(number + 1, f"is damaged or cannot be read: {_cause(error)}") from None

    def _document(self, line: bytes, number: int) -> str | None:
        """The document of a line, None if it is left out. number: counted from 1 at the first line of this part."""
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            if self.fields.skip_undecodable:
                self.skipped[UNDECODABLE] += 1
                return None
            message = f"is not UTF-8 (byte {error.start} of the line); `errors: skip` leaves such lines out"
            raise self._error(number, message) from None
        except (ValueError, RecursionError) as error:
            raise self._error(number, f"is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise self._error(number, "should be an object, {...}; a file has one on each line")
        if not self.fields.keep(_value(record, name) for name, _ in self.fields.where):
            return None
        text = _value(record, self.fields.text)
        if text is None and self.fields.skip_missing:
            self.skipped[WITHOUT_TEXT] += 1
            return None
        if text is None:
            keys = _keys(record)
            near = "" if self.fields.text in keys else did_you_mean(self.fields.text, keys)
            raise self._error(number, f"has no text under {self.fields.text!r}{near}{_SKIP}")
        if not isinstance(text, str):
            raise self._error(number, f"{self.fields.text!r} should be a string, not {json.dumps(text)[:40]}")
        if b"\\ud" in line or b"\\uD" in line:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise self._error(number, f"{self.fields.text!r} has {half}, half of a character") from None
        return text

    def _error(self, number: int, message: str) -> InputError:
        """The error for a line of this part, with its number in the file. number: as in `_document`."""
        if self.first:
            with self.path.open("rb") as file:
                while block := file.read(min(self.first - file.tell(), 1 << 20)):
                    number += block.count(b"\n")
        return _problem(self.path, f":{number}", message)


def _value(record: Mapping[str, Any], name: str) -> Any:
    """The value under a key or a dotted path of keys, None if the record has none."""
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _keys(record: Mapping[str, Any]) -> list[str]:
    """The first 20 keys of an object, dotted for nested ones."""
    nested = [f"{key}.{name}" for key, value in record.items() if isinstance(value, dict) for name in _keys(value)]
    return [*record, *nested][:20]


# --- tables --------------------------------------------------------------------------------------------------------


@contextmanager
def _arrow_errors(path: Path, place: str, message: str) -> Iterator[None]:
    """A context in which Arrow's errors, UnicodeDecodeError among them, become an InputError with this message."""
    try:
        yield
    except (ValueError, OSError, EOFError, NotImplementedError, KeyError) as error:
        raise _problem(path, place, f"{message}: {_cause(error)}") from None


def _check_schema(schema: pa.Schema, path: Path, fields: Fields) -> None:
    """Raise InputError for a column that the file lacks, or for a text column that holds no strings."""
    import pyarrow.types as types

    types_by_name = dict(_columns(schema))
    problems = []
    for name in fields.names:
        kind = types_by_name.get(name)
        if kind is None:
            problems.append(Problem(f"has no column {name!r}{did_you_mean(name, types_by_name)}", f"corpus: {path}"))
        elif name == fields.text:
            value = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
                problems.append(Problem(f"column {name!r} should hold strings, not {kind}", f"corpus: {path}"))
    if problems:
        raise InputError(*problems)


def _columns(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """(dotted name, type) of all columns and of the fields of structs."""
    import pyarrow.types as types

    for column in fields:
        yield prefix + column.name, column.type
        if types.is_struct(column.type):
            yield from _columns(column.type, f"{prefix}{column.name}.")


def _rows(batch: pa.RecordBatch, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of each row in the columns of these names."""
    return zip(*(_column(batch, name) for name in names), strict=True) if names else repeat((), batch.num_rows)


def _column(batch: pa.RecordBatch, name: str) -> list[Any]:
    """The values of a column, or of the field of a struct column if the name is dotted."""
    import pyarrow.compute as compute

    if name in batch.schema.names:
        return list(batch.column(name).to_pylist())
    top, *nested = name.split(".")
    return list(compute.struct_field(batch.column(top), nested).to_pylist())


def _runs(sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(first, last, bytes) of runs of row groups or batches; a run ends where it reaches PART bytes."""
    first = last = total = 0
    for size in sizes:
        last, total = last + 1, total + size
        if total >= PART:
            yield first, last, total
            first, total = last, 0
    if last > first:
        yield first, last, total


@dataclass(frozen=True)
class TablePart(RecordsPart):
    """Rows of a file with typed columns, which Arrow reads."""

    @abstractmethod
    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
        """(place in the file, row in this place, values of the named columns). Raises InputError for damaged data."""

    def records(self) -> Iterator[str | None]:
        for place, row, (text, *values) in self.rows(self.fields.names):
            kept = self.fields.keep(values)
            if kept and text is None:
                if not self.fields.skip_missing:
                    message = f"column {self.fields.text!r} has no text{_SKIP}"
                    raise _problem(self.path, f"{place}, row {row}", message)
                self.skipped[WITHOUT_TEXT] += 1
            yield text if kept else None


@dataclass(frozen=True)
class ParquetPart(TablePart):
    """Row groups of a Parquet file, of which only the needed columns are read."""

    @classmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        import pyarrow.parquet as parquet

        with _arrow_errors(path, "", "is no Parquet file"), parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        _check_schema(schema, path, fields)
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        return [cls(path, fields, *run) for run in _runs(_bytes_of(group, fields.names) for group in groups)]

    def has_document(self, records: int | None) -> bool:
        # Texts are the bulk of a file and are read only to see which are missing.
        if self.fields.skip_missing:
            return super().has_document(records)
        rows = self.rows(self.fields.names[1:])
        return any(self.fields.keep(values) for _, _, values in islice(rows, records))

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
        import pyarrow.parquet as parquet

        for group in range(self.first, self.last):
            place, first_row = f" row group {group}", 0
            with _arrow_errors(self.path, place, "is damaged"), parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=names):
                    for row, values in enumerate(_rows(batch, names), first_row):
                        yield place, row, values
                    first_row += batch.num_rows


def _bytes_of(group: pa.parquet.RowGroupMetaData, names: Iterable[str]) -> int:
    """Uncompressed bytes of the named columns in a row group."""
    columns = map(group.column, range(group.num_columns))
    prefixes = tuple(f"{name}." for name in names)
    return sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(prefixes))


@dataclass(frozen=True)
class ArrowPart(TablePart):
    """Record batches of an Arrow stream or file, as the `datasets` library writes them."""

    @classmethod
    def cut(cls, path: Path, fields: Fields) -> list[Self]:
        with _arrow_errors(path, "", "is no Arrow file, or a damaged one"), _batches(path) as (schema, batches):
            _check_schema(schema, path, fields)
            tops = [name if name in schema.names else name.split(".")[0] for name in fields.names]
            sizes = [sum(batch.column(top).nbytes for top in tops) for batch in batches]
        return [cls(path, fields, *run) for run in _runs(sizes)]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
        with _arrow_errors(self.path, "", "is damaged"), _batches(self.path) as (_, batches):
            for number, batch in enumerate(islice(batches, self.first, self.last), self.first):
                place = f" record batch {number}"
                for row, values in enumerate(_rows(batch, names)):
                    yield place, row, values


@contextmanager
def _batches(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and the record batches of an Arrow file or stream."""
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
