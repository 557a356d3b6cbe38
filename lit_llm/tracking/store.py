"""The store: a directory of stages, each named by its fingerprint. What is on disk is the truth.

stages/<fingerprint>/
    config.yaml      the frozen configuration
    metrics.jsonl    one line per logged step, appended while it runs
    state.json       what is happening, for those who watch
    checkpoints/     what a resume needs; the weights when finished
    losses.jsonl     of a training: the losses of single documents or examples, by its last evaluation
    rows.jsonl       of an evaluation: its records
    retries.jsonl    one line for each time that it was begun again by itself: why
    result.json      written last, atomically: a stage with a result is never run again
    lock             held by the process that works on it, released by the kernel when that process dies
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from lit_llm.config.problems import InputError, Problem

SCHEMA = 1
"""Version of this layout."""
DEFAULT = Path("mlruns")
"""The store that commands take unless told otherwise, in the working directory."""

State = Literal["pending", "running", "done", "diverged", "failed", "out_of_memory", "interrupted"]
FINAL: tuple[State, ...] = ("done", "diverged")
"""States that are results. The others can be tried again."""


class Busy(Exception):
    """Another process works on this."""


class Store:
    """A store that may not exist yet."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def open(self) -> Store:
        """Create it, or check that it is one of ours. Raises InputError for another schema or an unusable place."""
        self.check()
        marker = self.root / "store.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                write_json(marker, {"schema": SCHEMA})
        except OSError as error:
            raise InputError(Problem(f"{self.root} cannot be used as a store: {error.strerror}", "--store")) from None
        return self

    def check(self) -> None:
        """Raise InputError if the store was written with another schema."""
        marker = self.root / "store.json"
        if self.root.exists() and not self.root.is_dir():
            raise InputError(Problem(f"{self.root} is not a directory", "--store"))
        if not marker.exists():
            return
        try:
            schema = json.loads(marker.read_text())["schema"]
        except (OSError, ValueError, KeyError, TypeError):
            schema = "unreadable"
        if schema != SCHEMA:
            raise InputError(
                Problem(
                    f"{self.root} has schema {schema}, this version reads {SCHEMA}; "
                    "use the version that wrote it, or another --store",
                    "--store",
                )
            )

    def option(self) -> list[str]:
        """The words of a command line that name it; none for the default one."""
        return [] if self.root == DEFAULT.absolute() else ["--store", str(self.root)]

    @property
    def data(self) -> Path:
        """Tokenised corpora."""
        return self.root / "data"

    def stage(self, fingerprint: str) -> Stage:
        return Stage(self.root / "stages" / fingerprint)

    def study(self, name: str) -> Path:
        """Where a study keeps its lock, logs and tables."""
        folder = self.root / "studies" / name
        if folder.resolve().parent != (self.root / "studies").resolve():
            raise InputError(Problem(f"{name!r} leaves the store; use letters, digits, '-' and '_'", "study"))
        return folder


class Stage:
    """One stage of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def store(self) -> Store:
        """The store that it lies in."""
        return Store(self.folder.parent.parent)

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.txt"

    @property
    def rows_file(self) -> Path:
        """The records of an evaluation, one a line."""
        return self.folder / "rows.jsonl"

    @property
    def losses_file(self) -> Path:
        """The losses of single documents or examples by the last evaluation of a training; a line for each source."""
        return self.folder / "losses.jsonl"

    @property
    def progress_file(self) -> Path:
        """{"done", "total"} of what has no steps: an evaluation, and the last one of a training."""
        return self.folder / "progress.json"

    def result(self) -> dict[str, Any] | None:
        """The finished result, or None."""
        return read_json(self.folder / "result.json")

    def status(self) -> dict[str, Any]:
        """{"state", "error", ...}: the result's where there is one, else what the last attempt left behind."""
        result = self.result()
        if result is not None:
            return result
        file = self.folder / "state.json"
        status = read_json(file) or {"state": "pending"}
        if status["state"] == "running" and not is_locked(self.folder / "lock"):
            # It has ended since, or its process is gone and could not say so: killed, or the machine went down.
            status = self.result() or read_json(file) or status
            if status["state"] == "running":
                return status | {"state": "interrupted", "error": "its process ended without a word"}
        return status

    def set_state(self, state: State, error: str | None = None, traceback: str | None = None) -> None:
        """Tell those who watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / "state.json",
            {"state": state, "error": error, "traceback": traceback, "pid": os.getpid(), "time": time.time()},
        )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, null for what is not finite. From here on the stage is never run again."""
        write_json(self.folder / "result.json", finite(dict(result)))

    @property
    def retries_file(self) -> Path:
        return self.folder / "retries.jsonl"

    def retries(self) -> list[dict[str, Any]]:
        """Each time that it was begun again by itself: {"time", "reason", and "micro_batch_size" where it changed}."""
        return read_metrics(self.retries_file)

    def note_retry(self, reason: str, micro_batch_size: int | None) -> None:
        changed = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
        with self.retries_file.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "reason": reason, **changed}) + "\n")

    def forget(self) -> None:
        """Remove result and progress, so that the stage runs again from its start. The old ones are kept beside it."""
        with self.claim():
            attempt = 1 + len(list(self.folder.glob("attempt-*")))
            kept = self.folder / f"attempt-{attempt}"
            kept.mkdir()
            names = ("result.json", "metrics.jsonl", "state.json", "log.txt", "rows.jsonl", "losses.jsonl")
            for name in (*names, self.retries_file.name):
                if (self.folder / name).exists():
                    (self.folder / name).rename(kept / name)
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def claim(self) -> AbstractContextManager[None]:
        """Hold the stage's lock. Raises Busy if another process has it."""
        # Somebody who only looks whether it is locked holds it for an instant.
        return locked(self.folder / "lock", patience=2.0)


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when the process dies. Raises Busy after `patience` seconds."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=patience)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(str(path)) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def held(path: Path, patience: float, otherwise: Problem) -> Iterator[None]:
    """Hold a lock file that others hold for moments. Raises InputError with `otherwise` after `patience` seconds."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, patience))
        except Busy:
            raise InputError(otherwise) from None
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock now."""
    if not path.exists():
        return False
    try:
        with locked(path):
            return False
    except Busy:
        return True
    except OSError:  # a store that can only be read; nobody here holds a lock of it
        return False


class MetricsFile:
    """Appends to metrics.jsonl: {"step", "time", "metrics": {name: number, or null if it is not finite}}."""

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        """keep_until: after a resume from that step, what was written beyond it is dropped (it comes again, equal)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_metrics(path) if keep_until is not None and line["step"] <= keep_until]
            work = path.with_suffix(".tmp")
            work.write_text("".join(json.dumps(line) + "\n" for line in kept))
            work.replace(path)
        self._file: IO[str] = path.open("a", buffering=1)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"step": step, "time": round(time.time(), 3), "metrics": finite(dict(metrics))}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; the last may be half written while its run goes on."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def finite(content: Any) -> Any:
    """The same with None for each number that is not finite: JSON has no such numbers."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    assert isinstance(content, dict)
    return content


def write_text(path: Path, text: str) -> Path:
    """Write a file, and its folder where there is none, so that it is there whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")  # another process may be at it too
    work.write_text(text, encoding="utf-8")
    work.replace(path)
    return path


def write_json(path: Path, content: Any) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    with work.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)
