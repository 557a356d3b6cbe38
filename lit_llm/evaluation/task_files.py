"""Checks of a user's task files for lm-evaluation-harness, before the harness loads them.

The harness runs code that a task file names: Python functions, templates with access to Python, metrics from the Hub.
Configurations of lit_llm run no code, so files that name code are refused. Templates are rendered in a sandbox
(see `harness/evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lit_llm.config.hashing import digest_of_file, fingerprint
from lit_llm.config.problems import InputError, Problem, collect_errors
from lit_llm.config.tree import read_file

KEY = "evaluate.tasks.folder"
MOST_FILES = 10_000
METRICS = frozenset(
    "acc acc_all acc_bytes acc_mutual_info acc_norm bits_per_byte bleu brier_score bypass byte_perplexity chrf chrf++ "
    "exact_match f1 likelihood mcc perplexity ter word_perplexity".split()
)
"""Metrics of the harness (0.4.13). It looks for any other as code, in the working directory and on the Hub."""


def read_task_files(folder: Path) -> str:
    """Fingerprint of a folder of task files, which does not depend on its location.

    Raises InputError for a folder without task files, and for files that are not plain data, name code, or read files
    outside of the folder.
    """
    files = sorted(islice((path for path in folder.rglob("*") if path.is_file()), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise InputError(Problem(f"{folder} has more than {MOST_FILES:,} files; name one with the tasks alone", KEY))
    tasks = [path for path in files if path.suffix in (".yaml", ".yml")]
    if not tasks:
        message = f"{folder} has no task files; `python examples/glosses.py` writes some to glosses/tasks"
        raise InputError(Problem(message, KEY))
    problems: list[Problem] = []
    for path in tasks:
        with collect_errors(problems):
            _check(path, folder.resolve())
    if problems:
        raise InputError(*problems)
    root = str(folder.resolve())  # the harness needs absolute paths, the fingerprint must not depend on them
    contents = [path.read_text().replace(root, "") if path in tasks else digest_of_file(path) for path in files]
    return fingerprint([[path.relative_to(folder).as_posix(), c] for path, c in zip(files, contents, strict=True)])


def _check(path: Path, folder: Path) -> None:
    try:
        content = read_file(path).plain()  # refuses every tag, however it is spelled
    except InputError as error:
        raise InputError(*(replace(problem, key=KEY) for problem in error.problems)) from None
    for key, value in _entries(content):
        if key == "include":
            raise _refused(path, "includes another file; write its keys here")
        if key == "hf_evaluate" and value:
            raise _refused(path, "hf_evaluate runs code of a metric, which a file may not name")
        if key == "metric" and not (isinstance(value, str) and value in METRICS):
            raise _refused(path, f"metric {value!r} is none of the harness's own, so it would be looked for as code")
        if key == "class":
            raise _refused(path, "names a class, which is not run from a file")
        if key == "data_files":
            for name in _strings(value):
                if "://" not in name and not Path(name).resolve().is_relative_to(folder):
                    message = f"reads {name}, which is not in {folder}: its content would be outside of the identity"
                    raise _refused(path, f"{message}; after a move, write the task files anew")


def _refused(path: Path, message: str) -> InputError:
    return InputError(Problem(message, f"{KEY}: {path}"))


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key), value
            yield from _entries(value)
    elif isinstance(content, list):
        for item in content:
            yield from _entries(item)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
