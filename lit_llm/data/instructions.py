"""Instruction data as it is read: records of files, with templates filled in. Loads neither torch nor numpy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lit_llm.config.fingerprint import fingerprint
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.config import FIELD, Examples, InstructionConfig
from lit_llm.data.corpora import Documents, open_corpus
from lit_llm.data.record_files import WITHOUT_TEXT, RecordsPart

FORMAT = 2
"""Version of how examples become tokens; to be raised when that changes."""
KEY = "finetune.data"
"""Where the section stands in an experiment, for messages."""


def identify_examples(config: InstructionConfig, tokenizer: str) -> str:
    """Who the examples are. Reads the files, for their digests.

    tokenizer: identity of what turns them into tokens. Raises InputError if they cannot be read.
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
                name: [found.digest for found in _open(place, config.fields, name).values()]
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
    """For each field the records, read for that field alone. All have them in one order."""
    try:
        return {field: open_corpus(place.model_copy(update={"text": field})) for field in fields}
    except InputError as error:
        raise _at(error, name) from None


def _at(error: InputError, name: str) -> InputError:
    """What is wrong with files, told at the key that names them."""
    problems = [replace(problem, key=problem.key.replace("corpus", f"{KEY}.{name}", 1)) for problem in error.problems]
    return InputError(*problems, hint=error.hint)


def read_examples(config: InstructionConfig, name: str, left_out: Counter[str] | None = None) -> Iterator[Example]:
    """The examples of `examples`, `validation_files` or `test_files`, in order, with their templates filled in.

    left_out: takes, when all are read, how many records were not read as was asked, by `record_files.SKIPPED`.
    """
    documents = _open(getattr(config, name), config.fields, name)
    parts = [list(found.parts()) for found in documents.values()]
    columns = [itertools.chain.from_iterable(map(_records, each)) for each in parts]
    path, number, without = None, 0, 0
    try:
        for row in zip(*columns, strict=True):
            here, number = row[0][0], number + 1 if row[0][0] == path else 1
            path = here
            values = {field: value for field, (_, value) in zip(documents, row, strict=True)}
            if any(value is None for value in values.values()):
                # `where` and `errors` leave it out as a whole, `skip_missing` for a single field too.
                without += values[config.fields[0]] is not None
                continue
            source, target = _filled(config.inputs, values), _filled(config.targets, values)
            place = f"{path}, record {number}"
            if not target.strip():
                message = f"its target is empty: {config.targets!r} gives no text; leave the record out by `where`"
                raise InputError(Problem(message, f"{KEY}.{name}: {place}"))
            yield Example(place, source, target, str(values[config.task]) if config.task else "")
        if left_out is not None:
            left_out.update(sum((part.skipped for part in parts[0]), Counter[str]({WITHOUT_TEXT: without})))
    except InputError as error:
        raise _at(error, name) from None


def _records(part: object) -> Iterator[tuple[Path, str | None]]:
    assert isinstance(part, RecordsPart)
    part.skipped.clear()  # what was left out when the file was opened is read anew
    return ((part.path, text) for text in part.records())


def _filled(template: str, values: Mapping[str, str | None]) -> str:
    return FIELD.sub(lambda match: str(values[match[1]]), template)
