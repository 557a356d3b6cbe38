"""Synchronisation of MLflow with the files of the stages.

```
worker ── appends ──▶ <stage>/metrics.jsonl ──▶ MlflowSync.sync ──▶ MLflow: a parent per study, a child per arm and seed
```
The files are the source of truth and workers never touch MLflow. One `MlflowSync` in the coordinating process replays
new lines, every second; after an outage of the server, the next successful sync catches up.

MLflow itself keeps the progress: a tag of the run marks the last replayed line of each file, and the newest step of
each metric comes with the run. No cursor file could be lost or disagree with the server. A new sync, after a crash or
on another machine, searches the study's runs once and goes on.
"""

from __future__ import annotations

import json
import logging
import shlex
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.store.locks import Busy, locked
from lit_llm.store.metrics_reader import Point, ReadPosition, complete_lines, is_number, key, points_of, stamp_of
from lit_llm.store.store import Store
from lit_llm.tracking.address import check_server, few_retries, reason, resolved, without_secrets
from lit_llm.tracking.mlflow_database import connected, create, database_damage
from lit_llm.tracking.mlflow_views import ARM_COLUMN, CHARACTERS, NOTE, ORDER, SEED_COLUMN, cut
from lit_llm.tracking.relocation import STUDY, lock_of, moved, repair_paths

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARM, SEED, FINGERPRINT = "lit_llm.arm", "lit_llm.seed", "lit_llm.fingerprint"
CODE, STATE, ERROR, SUPERSEDED = "lit_llm.code", "lit_llm.state", "lit_llm.error", "lit_llm.superseded"
REPLAYED = "lit_llm.replayed"
"""Tag with [start, end, CRC-32] of the last replayed line of each file; present once params and config are logged."""
COMPLETE = "lit_llm.complete"
"""Tag of a parent with the digest of all that its study had when `MlflowSync.finish` closed it."""
PARENT = "mlflow.parentRunId"

STATUS = {
    "pending": "SCHEDULED",
    "running": "RUNNING",
    "done": "FINISHED",
    "diverged": "FINISHED",  # a result; the state tag tells it apart
    "failed": "FAILED",
    "out_of_memory": "FAILED",
    "interrupted": "KILLED",
    "pruned": "KILLED",
}
# MLflow's limits: 1000 metrics, params and tags in one batch, of them 100 params and 100 tags.
METRICS_A_BATCH, PARAMS_A_BATCH, PARAM_CHARACTERS, TAG_CHARACTERS = 900, 100, 6000, 8000


class SyncUnavailable(Exception):
    """MLflow could not be brought up to date. Nothing is lost: the next sync that succeeds catches up."""


class SyncBroken(SyncUnavailable):
    """The database is broken, so no later sync succeeds: it has to be rebuilt from disk."""


@dataclass(frozen=True)
class RunRecord:
    """One arm with one seed, as MLflow should show it; recognised by arm, seed, fingerprint and code."""

    arm: str
    seed: int
    fingerprint: str
    """Fingerprint of the last stage. Another one makes another child, and the old child is tagged as superseded."""
    state: str
    """pending, running, done, diverged, failed, out_of_memory, interrupted, or pruned by a search."""
    params: Mapping[str, object] = field(default_factory=dict)
    """The flattened resolved configuration; like `config_yaml` written once, when the child is created."""
    config_yaml: str = ""
    metrics: Sequence[tuple[str, Path]] = ()
    """(prefix of each metric's name, metrics.jsonl) in the order of stages. Points of one prefixed name are in one
    file, in the order of their steps."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the whole run that are in no file; logged once, at step 0."""
    error: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    place: int = 0
    """Position of the arm in the study: runs are sorted by it, then by seed."""
    code: str = ""
    """Digest of the provenance: code, device, threads, ... Curves are bit-equal only within one, so another makes a new
    child."""


@dataclass
class _Child:
    """State of a run in MLflow."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: set[str]
    steps: dict[str, int]
    last_ms: int | None = None
    stamp: tuple[object, ...] = ()

    @classmethod
    def of(cls, run: Run) -> _Child:
        # The protobuf form is the only public one in which a run's newest metrics carry their steps.
        steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        return cls(run.info.run_id, run.info.status, dict(run.data.tags), set(run.data.params), steps)


class MlflowSync:
    """Replays a study into MLflow: one experiment, one parent run, one child per arm and seed.

    `tracking` is sqlite:///PATH, with artifacts beside PATH, or http(s)://..., with the server's artifacts; ValueError
    for any other. Used by one thread at a time. Several processes may sync one study: they find each other's runs, and
    share a lock while they create them, so that no run exists twice: a file beside PATH or, for a server, `lock`.
    `description` is the parent's, in Markdown, until `finish` sets another; `tags` are the experiment's.
    """

    _client: MlflowClient

    def __init__(
        self,
        tracking: str,
        *,
        study: str,
        description: str = "",
        lock: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.study, self.description, self._tags = study, description, tags or {}
        self.tracking, self._database = resolved(tracking)
        self._lock = lock_of(self._database) if self._database else lock
        self._opened = False
        self._experiment = self._parent = ""
        self._children: dict[tuple[str, str], dict[tuple[str, str], _Child]] = {}

    def check(self) -> None:
        """Raise ValueError if the address answers but is no MLflow server. A missing answer is no error: see `sync`."""
        check_server(self.tracking)

    def sync(self, records: Iterable[RunRecord]) -> None:
        """Bring MLflow up to date with the records and their files; repeating it adds nothing.

        Raises SyncUnavailable when the server cannot be reached, or when it refused some runs and took the others.
        """
        records, refused = list(records), []
        with self._server():
            from mlflow.exceptions import MlflowException

            for record in records:
                try:
                    self._sync(record)
                except MlflowException as problem:
                    if problem.get_http_status_code() not in (400, 404, 409):
                        raise
                    refused.append(f"{record.arm}/seed {record.seed}: {reason(problem)}")
            if refused:
                raise SyncUnavailable(f"MLflow refused {len(refused)} of {len(records)} runs: {'; '.join(refused)}")

    def finish(
        self,
        state: str,
        files: Iterable[Path] = (),
        metrics: Mapping[str, float | None] | None = None,
        note: str = "",
        complete: str = "",
    ) -> None:
        """Close the parent in the study's state, with its report (files, directories) and its summary metrics.

        note: answer in Markdown, for the parent and the experiment; unchanged when empty. complete: digest of the
        finished study, for `is_complete`; empty where it is not finished.
        """
        now = int(time.time() * 1000)
        points = [(key(name), value, now, 0) for name, value in (metrics or {}).items() if is_number(value)]
        with self._server():
            self._log_files(self._parent, files)
            if note:
                self._client.set_experiment_tag(self._experiment, NOTE, cut(note, CHARACTERS))
            tags = {NOTE: cut(note, TAG_CHARACTERS), COMPLETE: complete}
            self._log(self._parent, {}, points, {STATE: state, **{name: text for name, text in tags.items() if text}})
            self._client.set_terminated(self._parent, STATUS[state])
        self._opened = False  # a later sync opens the parent again

    def is_complete(self, complete: str, runs: Set[tuple[str, str, str]]) -> bool:
        """True where a sqlite database still has the study as `finish` closed it, with this digest and these runs.

        Reads it without MLflow, whose import takes seconds. Looks at runs, states and tags, not at metrics, parameters
        or artifacts. False for a server, for a database that is missing or broken, and for a moved store.

        runs: (arm, seed, fingerprint) of each.
        """
        if self._database is None or moved(self._database):
            return False
        query = (
            "SELECT runs.run_uuid, tags.key, tags.value FROM experiments "
            "JOIN runs USING (experiment_id) JOIN tags USING (run_uuid) "
            "WHERE experiments.name = ? AND experiments.lifecycle_stage = 'active' "
            "AND runs.lifecycle_stage = 'active' AND runs.status = 'FINISHED' AND tags.key IN (?, ?, ?, ?)"
        )
        tags: dict[str, dict[str, str]] = {}
        try:
            with connected(self._database, read_only=True) as connection:
                for run, name, text in connection.execute(query, (self.study, COMPLETE, ARM, SEED, FINGERPRINT)):
                    tags.setdefault(run, {})[name] = text
        except sqlite3.Error:
            return False
        children = {(each.get(ARM), each.get(SEED), each.get(FINGERPRINT)) for each in tags.values()}
        return runs <= children and any(each.get(COMPLETE) == complete for each in tags.values())

    def attach(self, files: Iterable[Path]) -> bool:
        """Add files and directories to the parent of a study, whose state stays. Raises SyncUnavailable.

        Returns False where MLflow does not have the study.
        """
        if self._database is not None and not self._database.exists():
            return False
        with self._server(opening=False):
            from mlflow import MlflowClient

            self._client = MlflowClient(self.tracking)
            if self._database is not None:
                with self._sql() as connection:
                    repair_paths(connection, self._database.parent)
            experiment = self._client.get_experiment_by_name(self.study)
            if experiment is None:
                return False
            self._experiment = experiment.experiment_id
            parents = self._search(f"tags.`{STUDY}` = '{self.study}'")[:1]
            for parent in parents:
                self._log_files(parent.info.run_id, files)
        return bool(parents)

    def _log_files(self, run: str, files: Iterable[Path]) -> None:
        for path in files:
            if path.is_dir():
                self._client.log_artifacts(run, str(path), path.name)
            else:
                self._client.log_artifact(run, str(path))

    @contextmanager
    def _server(self, opening: bool = True) -> Iterator[None]:
        """Context with the study opened. After an error inside, the next use reads the server's state again."""
        few_retries()
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        try:
            if opening and not self._opened:
                with self._exclusive():
                    self._open()
            yield
        except BaseException as problem:
            self._opened = False
            if isinstance(problem, (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, Busy)):
                if self._database is not None and (broken := database_damage(self._database)):
                    message = f"MLflow's database {self._database} is broken ({broken})"
                    raise SyncBroken(f"{message}; {_remedy(self._database)}") from problem
                raise SyncUnavailable(f"MLflow at {without_secrets(self.tracking)}: {reason(problem)}") from problem
            raise

    def _exclusive(self) -> AbstractContextManager[object]:
        """Lock for migrations and new runs: without it, processes that start together crash or create runs twice."""
        if self._lock is None:
            return nullcontext()
        return locked(self._lock, patience=120)

    def _open(self) -> None:
        """Find or create the experiment and the parent, and read the state of every child."""
        from mlflow import MlflowClient

        location = None
        if self._database is not None:
            location = (self._database.parent / "artifacts" / self.study).as_uri()
            create(self._database)
            with self._sql() as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # stays with the file; MLflow sets its own busy timeout
        self._client = MlflowClient(self.tracking)
        experiment = self._client.get_experiment_by_name(self.study)
        if experiment is None:
            self._experiment = self._client.create_experiment(self.study, artifact_location=location)
        else:
            self._experiment = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                self._client.restore_experiment(self._experiment)
        if self._database is not None:
            with self._sql() as connection:  # a store may have been moved since
                repair_paths(connection, self._database.parent)
        held = dict(experiment.tags) if experiment is not None else {}
        for name, text in self._tags.items():
            # The answer of a finished run stays until there is a newer one.
            if held.get(name) != text and not (name == NOTE and NOTE in held):
                self._client.set_experiment_tag(self._experiment, name, text)
        runs = self._search()
        parents = [run for run in runs if run.data.tags.get(STUDY) == self.study]
        parent = parents[0] if parents else self._client.create_run(self._experiment, run_name=self.study)
        self._parent = parent.info.run_id
        tags = {STUDY: self.study, STATE: "running", NOTE: self.description, COMPLETE: None}
        self._log(self._parent, dict(parent.data.tags), [], tags)
        if parent.info.status != "RUNNING":
            self._client.update_run(self._parent, status="RUNNING")
        self._children = {}
        self._adopt(runs)
        self._opened = True

    @contextmanager
    def _sql(self) -> Iterator[sqlite3.Connection]:
        assert self._database is not None
        with connected(self._database) as connection:
            yield connection

    def _search(self, filter_string: str = "") -> list[Run]:
        """The experiment's runs, the oldest first, so that processes that race agree on which of two twins counts."""
        runs: list[Run] = []
        token: str | None = ""
        while token is not None:
            order = ["attributes.start_time ASC"]
            page = self._client.search_runs([self._experiment], filter_string, order_by=order, page_token=token or None)
            runs += page
            token = page.token or None
        return runs

    def _adopt(self, runs: Iterable[Run]) -> None:
        for run in runs:
            tags = run.data.tags
            if ARM in tags:
                siblings = self._children.setdefault((tags[ARM], tags.get(SEED, "")), {})
                siblings.setdefault((tags.get(FINGERPRINT, ""), tags.get(CODE, "")), _Child.of(run))

    def _sync(self, record: RunRecord) -> None:
        siblings = self._children.setdefault((record.arm, str(record.seed)), {})
        identity = (record.fingerprint, record.code)
        if identity not in siblings:
            if record.state == "pending":
                return
            self._create(record)
        child = siblings[identity]
        if REPLAYED not in child.tags:
            self._describe(child, record)
        points, marks = _new_points(child, record)
        now = int(time.time() * 1000)
        news = {key(name): value for name, value in record.values.items() if key(name) not in child.steps}
        points += [(name, value, now, 0) for name, value in news.items() if is_number(value)]
        child.steps |= dict.fromkeys(news, 0)
        tags = {STATE: record.state, ERROR: record.error, SUPERSEDED: None, REPLAYED: json.dumps(marks)}
        counts = {ARM_COLUMN: record.arm, SEED_COLUMN: str(record.seed), ORDER: f"{record.place:05} {record.seed:05}"}
        self._log(child.run_id, child.tags, points, {**record.tags, **tags, **counts, PARENT: self._parent})
        if child.status != STATUS[record.state]:
            child.status = STATUS[record.state]
            if child.status in ("SCHEDULED", "RUNNING"):
                self._client.update_run(child.run_id, status=child.status)
            else:
                self._client.set_terminated(child.run_id, child.status, end_time=child.last_ms)
        for other in siblings.values():
            if other is not child:
                self._log(other.run_id, other.tags, [], {SUPERSEDED: "true", **dict.fromkeys(counts)})

    def _create(self, record: RunRecord) -> None:
        """Adopt the run's child that another process has created, or create it."""
        with self._exclusive():
            self._adopt(self._search(f"tags.`{FINGERPRINT}` = '{record.fingerprint}'"))
            if (record.fingerprint, record.code) not in self._children[record.arm, str(record.seed)]:
                tags = {ARM: record.arm, SEED: str(record.seed), FINGERPRINT: record.fingerprint, CODE: record.code}
                name = f"{record.arm}/seed {record.seed:03}"  # sorts as text
                start, tags = _first_time(record), {**tags, STATE: record.state, PARENT: self._parent}
                self._adopt([self._client.create_run(self._experiment, start_time=start, run_name=name, tags=tags)])

    def _describe(self, child: _Child, record: RunRecord) -> None:
        from mlflow.entities import Param

        texts = {key(name): str(value)[:PARAM_CHARACTERS] for name, value in record.params.items()}
        with self._exclusive():  # two that write the same params at once collide in the database
            child.params |= self._client.get_run(child.run_id).data.params.keys()
            # MLflow refuses another value for an existing param, so only those missing after a crash are added.
            params = [Param(name, text) for name, text in texts.items() if name not in child.params]
            for at in range(0, len(params), PARAMS_A_BATCH):
                self._client.log_batch(child.run_id, params=params[at : at + PARAMS_A_BATCH], synchronous=True)
            self._client.log_text(child.run_id, record.config_yaml, "config.yaml")

    def _log(self, run: str, held: dict[str, str], points: Sequence[Point], tags: Mapping[str, str | None]) -> None:
        """Log points, then tags that differ from the `held` ones (None removes), so no mark precedes its points."""
        from mlflow.entities import Metric, RunTag

        texts = {name: text[:TAG_CHARACTERS] for name, text in tags.items() if text is not None}
        changed = [RunTag(name, text) for name, text in texts.items() if held.get(name) != text]
        for at in range(0, len(points) or len(changed), METRICS_A_BATCH):
            batch = [Metric(*point) for point in points[at : at + METRICS_A_BATCH]]
            # The tags travel with the last points: of one batch, MLflow stores the metrics first.
            last = at + METRICS_A_BATCH >= len(points)
            self._client.log_batch(run, metrics=batch, tags=changed if last else [], synchronous=True)
        for name in held.keys() & tags.keys() - texts.keys():
            self._client.delete_tag(run, name)
            del held[name]
        held.update(texts)


def _remedy(database: Path) -> str:
    """Advice for a broken database."""
    if not (database.parent / "store.json").exists():
        return "move it away, and the same command makes another"
    command = shlex.join(["lit-llm", "store", "rebuild-mlflow", *Store(database.parent).option()])
    return f"`{command}` makes it anew from what is on disk"


def _new_points(child: _Child, record: RunRecord) -> tuple[list[Point], list[ReadPosition]]:
    """(points that MLflow lacks, mark of each file after them)."""
    marks: list[ReadPosition] = json.loads(child.tags.get(REPLAYED, "[]"))
    marks += [(0, 0, 0)] * (len(record.metrics) - len(marks))
    # Taken before reading, so that later lines count next time. A change of state always reads: on NFS the attributes
    # of a file may be stale for seconds, its content after opening is not.
    stamp = (record.state, *(stamp_of(path) for _, path in record.metrics))
    points: list[Point] = []
    if stamp != child.stamp:
        for index, (prefix, path) in enumerate(record.metrics):
            lines, marks[index] = complete_lines(path, marks[index])
            for point in points_of(prefix, lines):
                name, _, child.last_ms, step = point
                # A resumed worker may have cut the file back and computed the same points again.
                if step > child.steps.get(name, -1):
                    child.steps[name] = step
                    points.append(point)
        child.stamp = stamp
    return points, marks


def _first_time(record: RunRecord) -> int | None:
    """Unix time in ms of the first point of the chain, None before there is one."""
    chain = (points_of(prefix, complete_lines(path, (0, 0, 0))[0]) for prefix, path in record.metrics)
    return next((ms for points in chain for _, _, ms, _ in points), None)
