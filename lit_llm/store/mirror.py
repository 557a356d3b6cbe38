"""Copies of finished results at another address: a folder, `s3://bucket/path`, or any other address of fsspec.

A copy is never needed: the store's own files are the results. It brings them home from a rented machine, or to others.
Tokenised data, checkpoints of unfinished stages, and MLflow's records are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.files import replacing
from lit_llm.store.store import FINAL, Store

RESULT = "result.json"
LEFT_OUT = ("coordinators", "places", "lock", "claim.json")
"""Names of files and folders that only concern the processes of one store."""


@dataclass
class Copied:
    """Counts of copied stages and files."""

    stages: int = 0
    files: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Remote:
    """A folder at an address of fsspec."""

    fs: Any
    root: str

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self, folder: str) -> list[str]:
        """Names of all files under a folder, relative to the root."""
        found = self.fs.find(self.path(folder))
        return sorted(str(PurePosixPath(path).relative_to(self.root)) for path in found)

    def content(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except FileNotFoundError:
            return None


def push(store: Store, address: str, log: Callable[[str], None] = lambda _: None) -> Copied:
    """Copy the finished stages and the studies of a store to an address; what is there already is left.

    log: called with the name of each stage or study before it is copied. Raises InputError for an address that cannot
    be used.
    """
    copied = Copied()
    with _errors(address):
        remote = _open(address)
        for folder in _folders(store, "stages"):
            result = folder / RESULT
            if store.stage(folder.name).status()["state"] not in FINAL:
                continue
            if remote.content(result.relative_to(store.root).as_posix()) == result.read_bytes():
                continue
            log(f"stage {folder.name}")
            for path in sorted(_files(folder), key=result.__eq__):  # the result last: a stage with one is whole
                _upload(remote, store, path, copied)
            copied.stages += 1
        for folder in _folders(store, "studies"):
            log(f"study {folder.name}")
            for path in _files(folder):
                if remote.content(path.relative_to(store.root).as_posix()) != path.read_bytes():
                    _upload(remote, store, path, copied)
    return copied


def pull(store: Store, address: str, log: Callable[[str], None] = lambda _: None) -> Copied:
    """Copy the stages and studies at an address into a store. What the store has already stays as it is.

    log: as for `push`. Raises InputError for an address that cannot be used, or without a store's copy.
    """
    copied = Copied()
    store.open()
    with _errors(address):
        remote = _open(address)
        names = [name for name in remote.names("stages") + remote.names("studies") if _is_inside(store, name)]
        if not names:
            raise InputError(Problem("has no copy of a store; `lit-llm store push` makes one", address))
        stages = {name.split("/")[1] for name in names if name.startswith("stages/") and name.endswith(f"/{RESULT}")}
        missing = {name for name in stages if not (store.stage(name).folder / RESULT).exists()}
        for name in sorted(names, key=lambda name: name.endswith(RESULT)):  # results last, as above
            kind, folder, _ = name.split("/", 2)
            if folder in missing if kind == "stages" else not (store.root / name).exists():
                log(name)
                with replacing(store.root / name) as work:
                    remote.fs.get_file(remote.path(name), str(work))
                    copied.bytes += work.stat().st_size
                copied.files += 1
    copied.stages = len(missing)
    return copied


def _is_inside(store: Store, name: str) -> bool:
    """The name is that of a file in a stage or study: an object of S3 may be called `studies/a/../../x`."""
    parts = name.split("/")
    return (
        len(parts) > 2
        and not {"", ".", ".."} & {*parts}
        and (store.root / name).resolve().is_relative_to(store.root.resolve())
    )


def _open(address: str) -> _Remote:
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(address)
    return _Remote(fs, str(root).rstrip("/"))


def _folders(store: Store, kind: str) -> list[Path]:
    return sorted(path for path in (store.root / kind).glob("[!.]*") if path.is_dir())


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not {*LEFT_OUT} & {*parts} and not path.name.endswith(".lock"):
            yield path


def _upload(remote: _Remote, store: Store, path: Path, copied: Copied) -> None:
    target = remote.path(path.relative_to(store.root).as_posix())
    remote.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    remote.fs.put_file(str(path), target)
    copied.files += 1
    copied.bytes += path.stat().st_size


@contextmanager
def _errors(address: str) -> Iterator[None]:
    """Context that turns errors of a remote file system into an InputError with the address."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each file system has errors of its own
        advice = "; install the package that it names" if isinstance(error, ImportError) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(Problem(f"{reason}{advice}", address)) from error
