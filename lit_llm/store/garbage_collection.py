"""Garbage of a store: stages that no study lists, optimiser states after a result, leftovers of killed processes.

A study lists its runs in `studies/<study>/runs.json`, with a list for each file and set of `-o`. A stage is orphaned
when neither a list nor the frozen configuration of a listed stage names it. Deleting `studies/<study>` gives its stages
up. Tokenised data, finished parts of an interrupted tokenisation and MLflow's records are never removed.
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
from lit_llm.store.locks import Busy, held, is_locked
from lit_llm.store.store import Stage, Store, write_json

LISTS = "runs.json"
REMOVED = ".removed-"
"""Prefix of folders being removed, so that no process takes half of one for a whole."""
QUIET = 3600.0
"""Seconds without a change after which a work file without a lock counts as a leftover."""
PATIENCE = 60.0
"""Seconds to wait for a process that writes a list or removes stages."""


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be removed."""

    path: Path
    kind: str
    bytes: int


@dataclass(frozen=True)
class Removable:
    """Garbage of a store, and folders of studies with problems."""

    garbage: tuple[Garbage, ...]
    unlisted: tuple[Path, ...]
    """Folders of studies without a readable list of runs. While there are any, no stage counts as orphaned."""
    vanished: tuple[tuple[Path, str], ...] = ()
    """(folder of a study, its missing source file). Their lists count all the same."""


def list_runs(
    store: Store, study: str, source: str, overrides: Sequence[str], runs: Sequence[Mapping[str, Any]]
) -> None:
    """List the stages that a study needs, {"arm", "seed", "fingerprint"} each, before they are frozen or read.

    A later list of the same source (absolute path of the file, or a preset's name) and overrides replaces this one, as
    the study was edited. Raises InputError while another process holds the lists.
    """
    file, key = store.study(study) / LISTS, {"source": source, "overrides": list(overrides)}
    with _lists_locked(store):
        lists = [entry for entry in _lists(file) or () if {name: entry[name] for name in key} != key]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"lists": [*lists, {**key, "runs": list(runs)}]})


def _lists(file: Path) -> list[dict[str, Any]] | None:
    """The lists in a runs.json; None where they cannot be read."""
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
    """Lock under which lists are written and stages removed, so that no list changes during a removal."""
    message = f"{store.root} is being cleared by another process (it holds gc.lock); wait for it to end"
    return held(store.root / "gc.lock", PATIENCE, Problem(message, "--store"))


def find(store: Store) -> Removable:
    """Find the garbage of a store, without locked stages. Raises InputError if this is no store."""
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
    """Remove items that are still garbage; returns the removed ones."""
    chosen = {item.path for item in garbage}
    removed, folders = [], []
    with _lists_locked(store):
        for item in find(store).garbage:
            if item.path not in chosen:
                continue
            with suppress(Busy):  # in use since
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
    for folder in folders:  # may take a while, under names that no process uses
        linked = folder.is_symlink()  # its files are outside the store, and stay
        shutil.rmtree(folder) if folder.is_dir() and not linked else folder.unlink(missing_ok=True)
    return removed


def _set_aside(path: Path) -> Path:
    """Rename a folder to a name that no process uses."""
    return path if path.name.startswith(REMOVED) else path.rename(path.with_name(f"{REMOVED}{path.name}"))


def _stage_of(path: Path, store: Store) -> Stage | None:
    """The stage with a file; None for a file outside stages."""
    stages = store.root / "stages"
    inside = path.relative_to(stages).parts if path.is_relative_to(stages) else ()
    return Stage(stages / inside[0]) if len(inside) > 1 else None


def _needed(stages: Sequence[Stage], listed: Sequence[str]) -> set[str]:
    """Fingerprints of the listed stages, and of all stages that their configurations name."""
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
        if name == "last.ckpt" and stage.is_trunk:
            continue
        if state.exists() and stage.result() is not None:  # only a resume needs it, and a result is final
            yield _item(state, "optimiser state of a finished stage")
    work = [*stage.folder.glob(".*"), *stage.folder.glob("config.[0-9]*"), stage.folder / "metrics.tmp"]
    for path in sorted([*work, *stage.checkpoints.glob(".*")]):
        if path.is_file() and _is_quiet(path):
            yield _item(path, "leftover")


def _item(path: Path, kind: str) -> Garbage:
    return Garbage(path, kind, sum(file.lstat().st_size for file in _files(path)))


def _is_quiet(path: Path) -> bool:
    newest = max((file.lstat().st_mtime for file in [path, *_files(path)]), default=0.0)
    return time.time() - newest > QUIET


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_dir()]
