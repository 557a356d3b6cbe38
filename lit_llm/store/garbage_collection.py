"""What a store can do without: stages that no study lists, optimiser states after a result, what killed processes left.

Each run of a study lists its runs in `studies/<study>/runs.json`, a list for each file and set of `-o`. A stage is
orphaned when no list names it, and no listed stage's frozen configuration does. Deleting `studies/<study>` gives its
stages up. Tokenised data, an interrupted tokenisation's finished parts and MLflow's records are never touched.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.store import Busy, Stage, Store, held, is_locked, write_json

LISTS = "runs.json"
REMOVED = ".removed-"
"""Prefix of what is being removed: no half of it is ever taken for the whole."""
QUIET = 3600.0
"""Seconds without a change after which a work file may be a leftover, beside that no process holds its lock."""
PATIENCE = 60.0
"""Seconds to wait for somebody who writes a list or removes stages."""


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed."""

    path: Path
    kind: str
    bytes: int


@dataclass(frozen=True)
class Removable:
    """What a look at the store has found."""

    garbage: tuple[Garbage, ...]
    unlisted: tuple[Path, ...]
    """Folders of studies that have no readable list of their runs. While there are any, no stage counts as orphaned."""
    vanished: tuple[tuple[Path, str], ...] = ()
    """Folders of studies that list runs of a file that is gone, with that file. The list counts all the same."""


def list_runs(
    store: Store, study: str, source: str, overrides: Sequence[str], runs: Sequence[Mapping[str, Any]]
) -> None:
    """Note which stages a study needs: {"arm", "seed", "fingerprint"} each. Comes before they are frozen or looked at.

    A later list of the same source (the file's absolute path, or a preset's name) and overrides takes the place of this
    one: the study was edited. Raises InputError while another process holds the lists.
    """
    file, key = store.study(study) / LISTS, {"source": source, "overrides": list(overrides)}
    with _lists_locked(store):
        lists = [entry for entry in _lists(file) or () if {name: entry[name] for name in key} != key]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"lists": [*lists, {**key, "runs": list(runs)}]})


def _lists(file: Path) -> list[dict[str, Any]] | None:
    """None if there are none that can be read."""
    try:
        return [
            {
                "source": str(entry["source"]),
                "overrides": list(entry["overrides"]),
                "runs": [{**run, "fingerprint": str(run["fingerprint"])} for run in entry["runs"]],
            }
            for entry in json.loads(file.read_text())["lists"]
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _lists_locked(store: Store) -> AbstractContextManager[None]:
    """A list is written before or after stages are removed, never between the look and the removal."""
    message = f"{store.root} is being cleared by another process (it holds gc.lock); wait for it to end"
    return held(store.root / "gc.lock", PATIENCE, Problem(message, "--store"))


def find(store: Store) -> Removable:
    """What could be removed now; nothing that a process holds a lock of. Raises InputError if this is no store."""
    if not (store.root / "store.json").exists():
        raise InputError(Problem(f"{store.root} is no store: it has no store.json", "--store"))
    store.check()
    stages = [Stage(folder) for folder in sorted(store.root.glob("stages/[!.]*")) if folder.is_dir()]
    studies = [folder for folder in sorted(store.root.glob("studies/[!.]*")) if folder.is_dir()]
    lists = {folder: _lists(folder / LISTS) for folder in studies}
    unlisted = tuple(folder for folder, entries in lists.items() if entries is None)
    entries = [(folder, entry) for folder, some in lists.items() for entry in some or ()]
    sources = dict.fromkeys((folder, entry["source"]) for folder, entry in entries)
    vanished = tuple((folder, file) for folder, file in sources if Path(file).is_absolute() and not Path(file).exists())
    needed = (
        None if unlisted else _needed(stages, [run["fingerprint"] for _, entry in entries for run in entry["runs"]])
    )
    garbage = [
        item for stage in stages if not is_locked(stage.folder / "lock") for item in _stage_garbage(stage, needed)
    ]
    garbage += [_item(path, "leftover") for path in sorted(store.root.glob(f"stages/{REMOVED}*"))]
    if not any(is_locked(lock) for lock in store.data.rglob("*.lock")):
        work = [path for path in sorted(store.data.glob(".*")) if not any(path.glob("[0-9]*.json"))]
        garbage += [_item(path, "leftover") for path in work if _is_quiet(path)]
    return Removable(tuple(garbage), unlisted, vanished)


def remove(store: Store, garbage: Sequence[Garbage]) -> list[Garbage]:
    """Remove what is still garbage, each whole; returns what was removed."""
    chosen = {item.path for item in garbage}
    removed, folders = [], []
    with _lists_locked(store):
        for item in find(store).garbage:
            if item.path not in chosen:
                continue
            with suppress(Busy):  # somebody has begun to use it
                stage = _stage_of(item.path, store)
                if item.kind == "orphaned stage":
                    with Stage(item.path).claim():
                        folders.append(_set_aside(item.path))
                elif stage is not None:
                    with stage.claim():
                        item.path.unlink(missing_ok=True)
                else:
                    folders.append(_set_aside(item.path))
                removed.append(item)
    for folder in folders:  # may take a while, and is out of everybody's way
        linked = folder.is_symlink()  # the files are somewhere else, and not ours to remove
        shutil.rmtree(folder) if folder.is_dir() and not linked else folder.unlink(missing_ok=True)
    return removed


def _set_aside(path: Path) -> Path:
    """Under a name that nobody asks for."""
    return path if path.name.startswith(REMOVED) else path.rename(path.with_name(f"{REMOVED}{path.name}"))


def _stage_of(path: Path, store: Store) -> Stage | None:
    """The stage that a file lies in."""
    stages = store.root / "stages"
    inside = path.relative_to(stages).parts if path.is_relative_to(stages) else ()
    return Stage(stages / inside[0]) if len(inside) > 1 else None


def _needed(stages: Sequence[Stage], listed: Sequence[str]) -> set[str]:
    """Fingerprints of the stages that are listed, and of those that their configurations go back to."""
    by_fingerprint = {stage.fingerprint: stage for stage in stages}
    waiting = list(listed)
    needed: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            if name in by_fingerprint and by_fingerprint[name].config_file.exists():
                words = re.findall(r"\w+", by_fingerprint[name].config_file.read_text())
                waiting += {word for word in words if word in by_fingerprint}
    return needed


def _stage_garbage(stage: Stage, needed: set[str] | None) -> Iterator[Garbage]:
    if needed is not None and stage.fingerprint not in needed:
        yield _item(stage.folder, "orphaned stage")
        return
    for name in ("last.ckpt", "previous.ckpt"):
        state = stage.checkpoints / name
        if state.exists() and stage.result() is not None:  # a resume alone needs it, and there is none after a result
            yield _item(state, "optimiser state of a finished stage")
    work = [*stage.folder.glob(".*"), *stage.folder.glob("config.[0-9]*"), stage.folder / "metrics.tmp"]
    for path in sorted([*work, stage.checkpoints / "writing.ckpt", *stage.checkpoints.glob(".*")]):
        if path.is_file() and _is_quiet(path):
            yield _item(path, "leftover")


def _item(path: Path, kind: str) -> Garbage:
    return Garbage(path, kind, sum(file.lstat().st_size for file in _files(path)))


def _is_quiet(path: Path) -> bool:
    newest = max((file.lstat().st_mtime for file in [path, *_files(path)]), default=0.0)
    return time.time() - newest > QUIET


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_dir()]
