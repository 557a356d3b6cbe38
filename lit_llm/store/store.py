"""The store: a directory of stages, each named by its fingerprint. The files are the source of truth.

stages/<fingerprint>/
    config.yaml      the frozen configuration
    metrics.jsonl    one line per logged step, appended while it runs
    state.json       current state, for observers
    checkpoints/     state for a resume; the weights when finished, and a trunk's last state
    progress.json    progress of an evaluation, which has no steps
    losses.jsonl     losses of single documents or examples, by the last evaluation of a training
    rows.jsonl       records of an evaluation
    retries.jsonl    one line for each automatic restart, with its reason
    result.json      written last, atomically: a stage with a result runs again only after `Stage.forget`
    lock             held by the process that works on it; free when that process dies, see `locks.py`
    claim.json       number, host and process of the last claim, which refuses a late holder, see `claims.py`

Files are verified when they are read. config.yaml, state.json, result.json and, in checkpoints/, initial.json and
provenance.json begin with a digest of the rest; result.json has the digests of the records and of the weights.
`docs/running.md` describes the effects of damages.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, get_args

from lit_llm.config.host import host_name
from lit_llm.config.problems import InputError, Problem, SourceLocation
from lit_llm.store.claims import Claim, Superseded, make_claim
from lit_llm.store.files import (
    KEY,
    Damaged,
    check_digest,
    file_digest,
    is_signed,
    read_verified,
    remove,
    replacing,
    with_digest,
)
from lit_llm.store.locks import VARIABLE, choose_locks, forced_locks, is_locked, locked, locks_of, recorded_locks

SCHEMA = 1
"""Version of the layout."""
DEFAULT = Path("mlruns")
"""Default store of the commands, in the working directory."""

State = Literal["pending", "running", "done", "diverged", "failed", "out_of_memory", "interrupted"]
FINAL: tuple[State, ...] = ("done", "diverged")
"""States that are results. The others can be tried again."""


PATIENCE = 2.0
"""Seconds to wait for a stage that another process holds for an instant, as `is_locked` does with a kernel lock."""
RECORDS = ("metrics.jsonl", "losses.jsonl", "rows.jsonl")
"""Records of a finished stage. Its result has their digests."""
RECOMPUTE = "`lit-llm run STUDY --rerun failed` computes it again"
"""Advice for a damaged file of a finished stage."""


class Store:
    """A store that may not exist yet."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def open(self) -> Store:
        """Create the store, or check its schema. Raises InputError for another schema or an unusable place."""
        self.check()
        marker = self.root / "store.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                write_json(marker, {"schema": SCHEMA, **choose_locks(self.root).as_json()})
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
            content = json.loads(marker.read_text())
            schema, locks = content["schema"], recorded_locks(content)
        except (OSError, ValueError, KeyError, TypeError):
            message = "is damaged; remove it if this version wrote the store: the next `lit-llm run` writes it again"
            raise InputError(Problem(message, location=SourceLocation(str(marker)))) from None
        if schema != SCHEMA:
            raise InputError(
                Problem(
                    f"{self.root} has schema {schema}, this version reads {SCHEMA}; "
                    "use the version that wrote it, or another --store",
                    "--store",
                )
            )
        if (forced := forced_locks()) is not None and forced != locks:
            message = f"{marker} says {locks.as_json()}, and all processes must agree; unset the variable, or end them "
            raise InputError(Problem(f"{message}all and write {forced.as_json()} there", VARIABLE))

    def option(self) -> list[str]:
        """Command-line words that select this store; empty for the default one."""
        return [] if self.root == DEFAULT.absolute() else ["--store", str(self.root)]

    @property
    def data(self) -> Path:
        """Folder of the tokenised corpora."""
        return self.root / "data"

    def stage(self, fingerprint: str) -> Stage:
        return Stage(self.root / "stages" / fingerprint)

    def study(self, name: str) -> Path:
        """Folder of a study, with its lock, logs and tables."""
        folder = self.root / "studies" / name
        if folder.resolve().parent != (self.root / "studies").resolve():
            raise InputError(Problem(f"{name!r} leaves the store; use letters, digits, '-' and '_'", "study"))
        return folder


class Stage:
    """One stage of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        """Repairs by this process before it could go on, a sentence each."""
        self._claim: Claim | None = None
        """The claim of this object, while it holds the stage."""
        self._lost: str | None = None
        """Reason why its lease was lost."""

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def store(self) -> Store:
        """The store that contains the stage."""
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
        """Records of an evaluation, one a line."""
        return self.folder / "rows.jsonl"

    @property
    def losses_file(self) -> Path:
        """Losses of single documents or examples by the last evaluation of a training; a line for each source."""
        return self.folder / "losses.jsonl"

    @property
    def progress_file(self) -> Path:
        """{"done", "total"} of an evaluation, also of the last one of a training, which have no steps."""
        return self.folder / "progress.json"

    def progress(self) -> dict[str, int] | None:
        """{"done", "total"} from the progress file; None without usable content."""
        try:
            content = read_json(self.progress_file) or {}
        except Damaged:
            return None
        done, total = content.get("done"), content.get("total")
        return {"done": done, "total": total} if isinstance(done, int) and isinstance(total, int) and total else None

    def result(self) -> dict[str, Any] | None:
        """The finished result; None where there is none, or where it or its records are damaged: see `status`."""
        try:
            return self._verified_result()
        except Damaged:
            return None

    @property
    def is_trunk(self) -> bool:
        """True for a finished trunk, whose last checkpoint other stages begin with."""
        result = self.result() or {}
        return result.get("stage") == "trunk" and result.get("state") == "done"

    def _verified_result(self) -> dict[str, Any] | None:
        """The finished result, or None. Raises Damaged for a damaged result or record."""
        file = self.folder / "result.json"
        try:
            result = read_json(file)
            for name, digest in (result or {}).get("files", {}).items():
                check_digest(self.folder / name, digest)
        except Damaged:
            if not os.path.lexists(file):  # another process is removing it, file by file
                return None
            raise
        return result

    def status(self) -> dict[str, Any]:
        """{"state", "error", ...}: from the result if there is one, else from the last attempt.

        A stage whose result or records are damaged has failed; its error names the file.
        """
        if (status := self._ended()) is not None:
            return status
        status = self._last_state()
        if status["state"] == "running" and not is_locked(self.folder / "lock"):
            # It has just ended, or its process died without a record: killed, or the machine went down.
            status = self._ended() or self._last_state()
            if status["state"] == "running":
                return status | {"state": "interrupted", "error": "its process ended without a word"}
        return status

    def _ended(self) -> dict[str, Any] | None:
        """The status of a stage with a result, damaged or not."""
        try:
            result = self._verified_result()
            if result is not None and result.get("state") not in FINAL:
                raise Damaged(self.folder / "result.json", "is damaged: it says no state that is a result")
        except Damaged as damage:
            return {"state": "failed", "error": f"{damage}; {RECOMPUTE}", "damaged": True}
        return result

    def _last_state(self) -> dict[str, Any]:
        """The content of state.json."""
        file = self.folder / "state.json"
        try:
            status = read_json(file) or {"state": "pending"}
            if status.get("state") not in get_args(State):
                raise Damaged(file, "is damaged: it says no state")
        except Damaged as damage:
            state: State = "running" if is_locked(self.folder / "lock") else "interrupted"
            return {"state": state, "error": f"{damage}; `lit-llm run STUDY` goes on with the stage"}
        return status

    def set_state(self, state: State, error: str | None = None, traceback: str | None = None) -> None:
        """Write state.json, for observers. Raises Superseded for a late holder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        process = {"host": host_name(), "pid": os.getpid(), "time": time.time()}
        content = {"state": state, "error": error, "traceback": traceback, **process, **self._notes()}
        write_json(self.folder / "state.json", content, signed=True, check=self.check_claim)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, with null for numbers that are not finite. It runs again only after `forget`.

        Raises Superseded for a late holder.
        """
        self.check_claim()
        files = {name: file_digest(self.folder / name) for name in RECORDS if (self.folder / name).is_file()}
        content = {**result, **({"files": files} if files else {}), **self._notes()}
        write_json(self.folder / "result.json", finite(content), signed=True, check=self.check_claim)

    def note(self, text: str) -> None:
        """Report a repair, in the log and to observers."""
        print(text, flush=True)
        self.notes.append(text)

    def _notes(self) -> dict[str, Any]:
        return {"notes": self.notes} if self.notes else {}

    def retry(self) -> None:
        """Let a failed stage run again, from its last checkpoint, or from its start if its record is damaged.

        Raises Busy if another process works on it.
        """
        if self.status().get("damaged"):
            self.forget()
        else:
            self.set_state("pending")

    @property
    def retries_file(self) -> Path:
        return self.folder / "retries.jsonl"

    def retries(self) -> list[dict[str, Any]]:
        """Automatic restarts: {"time", "reason", and "micro_batch_size" where it changed} each."""
        try:
            return list(whole_lines(self.retries_file.read_bytes().split(b"\n")[:-1]))
        except OSError:
            return []

    def note_retry(self, reason: str, micro_batch_size: int | None) -> None:
        changed = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
        with self.retries_file.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "reason": reason, **changed}) + "\n")

    def forget(self) -> None:
        """Move result and progress aside, so that the stage runs again from its start."""
        with self.claim():
            attempt = 1 + len(list(self.folder.glob("attempt-*")))
            kept = self.folder / f"attempt-{attempt}"
            kept.mkdir()
            for name in ("result.json", "state.json", "log.txt", self.retries_file.name, *RECORDS):
                if (self.folder / name).exists():
                    (self.folder / name).rename(kept / name)
            remove(self.checkpoints)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the stage, as its next generation unless it has a result. Raises Busy if another process has it."""
        lock = self.folder / "lock"
        with locked(lock, patience=PATIENCE, on_lost=self._lose):
            self._lost = None
            if not (self.folder / "result.json").exists():  # else nothing is computed
                self._claim = make_claim(self.folder, durable=locks_of(lock).kind == "lease")
            try:
                yield
            finally:
                self._claim = None

    def _lose(self, reason: str) -> None:
        self._lost = reason

    def check_lease(self) -> None:
        """Raise Superseded where the lease has been found lost. Reads no file."""
        if self._claim is not None and self._lost is not None:
            raise Superseded(f"the lease of the stage was lost ({self._lost})")

    def check_claim(self) -> None:
        """Raise Superseded where this object has claimed the stage and another process has taken it over since."""
        self.check_lease()
        if self._claim is not None:
            self._claim.check(self.folder)


class MetricsFile:
    """Appends to metrics.jsonl: {"step", "time", "metrics": {name: number, or null if it is not finite}}."""

    def __init__(self, path: Path, lines: Sequence[str] = ()) -> None:
        """lines: lines before the checkpoint of a resume. Later ones are dropped, as the resume writes them again."""
        write_text(path, "".join(lines))
        self._file: IO[str] = path.open("a", buffering=1)

    def append(self, step: int, metrics: Mapping[str, float]) -> str:
        """Write a line; returns it."""
        content = {"step": step, "time": round(time.time(), 3), "metrics": finite(dict(metrics))}
        line = json.dumps(content) + "\n"
        self._file.write(line)
        return line

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl; the last may be half written while its run goes on."""
    try:
        return metric_lines(path.read_bytes().split(b"\n")[:-1])
    except OSError:
        return []


def metric_lines(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without damaged ones, which a resume writes again."""
    return [each for each in whole_lines(lines) if isinstance(each.get("metrics"), dict) and "step" in each]


def whole_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of lines, without torn or damaged ones."""
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content


def finite(content: Any) -> Any:
    """Plain data with None for numbers that are not finite, which JSON lacks."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, without its digest; None where there is no file. Raises Damaged."""
    try:
        text = read_verified(path)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Damaged(path, f"is damaged: {error}" if text else "is empty") from None
    if not isinstance(content, dict):
        raise Damaged(path, "is damaged: it holds no JSON object")
    if is_signed(text):
        del content[KEY]
    return content


def write_text(path: Path, text: str, durable: bool = False, check: Callable[[], None] = lambda: None) -> Path:
    """Write a file atomically, creating its folder; returns its path. check: called before its name appears."""
    with replacing(path, durable, check) as work:
        work.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: Any, signed: bool = False, check: Callable[[], None] = lambda: None) -> None:
    """Write JSON atomically. signed: with its digest. check: called before its name appears."""
    text = json.dumps(content, indent=1) + "\n"
    write_text(path, with_digest(text) if signed and content else text, durable=True, check=check)
