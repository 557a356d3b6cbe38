"""Reading of instruction data: records of files, with templates filled in. Loads neither torch nor numpy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lit_llm.config.hashing import fingerprint
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.config import FIELD, Examples, InstructionConfig
from lit_llm.data.corpora import Documents, open_corpus
from lit_llm.data.record_files import WITHOUT_TEXT, RecordsPart

FORMAT = 2
"""Version of the tokenisation of examples; raise it when that changes."""
KEY = "finetune.data"
"""Key of the section in an experiment, for messages."""


def identify_examples(config: InstructionConfig, tokenizer: str) -> str:
    """Digest of the examples. Reads the files for their digests.

    tokenizer: digest of the tokenizer. Raises InputError if the files cannot be read.
    """
    splits = {
        name: place
        for name in ("examples", "validation_files", "test_files")
        if (place := getattr(config, name)) is not None
    }
    return fingerprint(
        {
            "format": FORMAT,
            "tokenizer": tokenizer,
            **{
                name: [documents.digest for documents in _open(place, config.fields, name).values()]
                for name, place in splits.items()
            },
            "fractions": config.fractions,
            **config.model_dump(include={"inputs", "targets", "task", "input_length", "target_length", "over_long"}),
        }
    )


@dataclass(frozen=True)
class Example:
    """A record with its templates filled in."""

    place: str
    """File and number of the record, for messages."""
    source: str
    target: str
    task: str


def _open(place: Examples, fields: tuple[str, ...], name: str) -> dict[str, Documents]:
    """{field: records read for that field alone}, all in the same order."""
    try:
        return {field: open_corpus(place.model_copy(update={"text": field})) for field in fields}
    except InputError as error:
        raise _at_key(error, name) from None


def _at_key(error: InputError, name: str) -> InputError:
    """An error of files, moved to the key that names them."""
    problems = [replace(problem, key=problem.key.replace("corpus", f"{KEY}.{name}", 1)) for problem in error.problems]
    return InputError(*problems, hint=error.hint)


def read_examples(config: InstructionConfig, name: str, left_out: Counter[str] | None = None) -> Iterator[Example]:
    """Examples of `examples`, `validation_files` or `test_files`, in order, with their templates filled in.

    left_out: counter to which, after the last example, the numbers of skipped records are added, by
    `record_files.SKIPPED`.
    """
    documents = _open(getattr(config, name), config.fields, name)
    parts = [list(documents_of_field.parts()) for documents_of_field in documents.values()]
    columns = [itertools.chain.from_iterable(map(_records, each)) for each in parts]
    path, number, without = None, 0, 0
    try:
        for row in zip(*columns, strict=True):
            record_path, number = row[0][0], number + 1 if row[0][0] == path else 1
            path = record_path
            values = {field: value for field, (_, value) in zip(documents, row, strict=True)}
            if any(value is None for value in values.values()):
                # `where` and `errors` leave out whole records; `skip_missing` also does for a single field.
                without += values[config.fields[0]] is not None
                continue
            source, target = _fill(config.inputs, values), _fill(config.targets, values)
            place = f"{path}, record {number}"
            if not target.strip():
                message = f"its target is empty: {config.targets!r} gives no text; leave the record out by `where`"
                raise InputError(Problem(message, f"{KEY}.{name}: {place}"))
            yield Example(place, source, target, str(values[config.task]) if config.task else "")
        if left_out is not None:
            left_out.update(sum((part.skipped for part in parts[0]), Counter[str]({WITHOUT_TEXT: without})))
    except InputError as error:
        raise _at_key(error, name) from None


def _records(part: object) -> Iterator[tuple[Path, str | None]]:
    assert isinstance(part, RecordsPart)
    part.skipped.clear()  # opening the file has counted records too
    return ((part.path, text) for text in part.records())


def _fill(template: str, values: Mapping[str, str | None]) -> str:
    return FIELD.sub(lambda match: str(values[match[1]]), template)
