"""Checksums of prepared folders: computed when their files are written, compared whenever they are opened.

```
<folder>/checksums.json    {file: SHA-256}, written last: a folder that has it is complete
```
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lit_llm.config.hashing import digest_of_file
from lit_llm.config.problems import InputError, Problem
from lit_llm.launch import cores
from lit_llm.store.store import write_json

FILE = "checksums.json"

_SETTLED = 2.0
"""Seconds after which a later write changes a file's times."""
_verified: dict[Path, list[tuple[int, ...]]] = {}
"""{folder: state of its files when this process last compared them}."""


def is_complete(folder: Path) -> bool:
    """True where the folder was written completely."""
    return (folder / FILE).is_file()


def write_checksums(folder: Path, taken: Mapping[str, str]) -> None:
    """Record the checksums of a folder's files. taken: {file: checksum} computed while the files were written."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name != FILE)
    rest = [name for name in names if name not in taken]
    digests = {**taken, **dict(zip(rest, _digests(folder, rest), strict=True))}
    write_json(folder / FILE, {name: digests[name] for name in names})


def verify(folder: Path) -> None:
    """Compare a folder's files with their checksums. Raises InputError with each changed or missing file.

    A large file is read once per machine and user (see `digest_of_file`), an untouched folder once per process.
    """
    recorded = _recorded(folder)
    states = [_state(folder / name) for name in recorded]
    if _verified.get(folder) == states:
        return
    present = [name for name, state in zip(recorded, states, strict=True) if state]
    digests = dict(zip(present, _digests(folder, present), strict=True))
    wrong = {
        name: "has changed since it was written" if name in digests else "is missing"
        for name, digest in recorded.items()
        if digests.get(name) != digest
    }
    if wrong:
        raise InputError(*(damaged(folder / name, message) for name, message in wrong.items()))
    if all(time.time() - state[1] / 1e9 > _SETTLED for state in states):
        _verified[folder] = states


def damaged(path: Path, message: str) -> Problem:
    """Problem of a damaged prepared file, with the way to prepare it again."""
    return Problem(f"{message}; delete the folder {path.parent} and run again: it is prepared anew", str(path))


def _recorded(folder: Path) -> dict[str, str]:
    try:
        recorded = json.loads((folder / FILE).read_bytes())
        return {str(name): str(digest) for name, digest in recorded.items()}
    except OSError as error:
        raise InputError(damaged(folder / FILE, f"cannot be read ({error.strerror})")) from None
    except (ValueError, AttributeError):
        raise InputError(damaged(folder / FILE, "has changed since it was written")) from None


def _state(path: Path) -> tuple[int, ...]:
    """State of a file in the file system, which changes with its content; empty for a missing file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _digests(folder: Path, names: Iterable[str]) -> list[str]:
    with ThreadPoolExecutor(cores()) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(partial(_digest, folder), names))


def _digest(folder: Path, name: str) -> str:
    try:
        return digest_of_file(folder / name)
    except OSError as error:
        raise InputError(damaged(folder / name, f"cannot be read ({error.strerror})")) from None
