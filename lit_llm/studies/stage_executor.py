"""Executes stages in parallel processes of this machine, each stage after its parents.

Other processes, here or on other machines that share the store, may execute stages of the same list: a stage that
another one has claimed is left to it, and its result counts as if it were from here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_llm.launch import Interrupted, Outcome, Task, run_tasks
from lit_llm.launch.devices import machine_slots
from lit_llm.runs.trainer_parts import TrainerParts
from lit_llm.runs.worker import preloaded, run_stage
from lit_llm.store.disk import DiskError, check_exists
from lit_llm.store.locks import Busy
from lit_llm.store.store import FINAL, Stage, Store
from lit_llm.studies.observer import Observer
from lit_llm.studies.picking import NOT_TRIED, Picker
from lit_llm.studies.runs import Run, StoredStage
from lit_llm.studies.supervise import Supervision, Supervisor


@dataclass(frozen=True)
class Work:
    """A stage to be computed, by its fingerprint. Its configuration is in the store."""

    name: str
    """Name of the first run that needs it, for people."""
    fingerprint: str
    parents: tuple[str, ...] = ()
    """Fingerprints of the stages whose results it begins with."""
    threads: int = 1
    devices: int = 1
    """Slots that it takes at once, each with a device."""

    @classmethod
    def of(cls, run: Run, step: StoredStage) -> Work:
        """The work of a run's stage."""
        execution = run.experiment_at(step).section(step.node.after).training.execution
        devices = 1 if step.node.kind == "evaluate" else execution.devices
        return cls(run.name_at(step), step.node.fingerprint, tuple(step.node.parents), execution.threads, devices)


def slots_for(work: Sequence[Work], max_parallel: int, use_gpus: bool = True) -> list[dict[str, str]]:
    """Slots of this machine for as many runs at once, each on as many devices as the largest."""
    return machine_slots(max_parallel * max((each.devices for each in work), default=1), use_gpus)


def picker_of(store: Store, todo: Sequence[Work], offset: float = 0.0, notes: Path | None = None) -> Picker:
    """A picker of these stages."""
    return Picker(store, {work.fingerprint: work.parents for work in todo}, offset, notes)


class StageExecutor:
    """Executes a list of stages on this machine until each has ended, here or elsewhere."""

    def __init__(
        self,
        store: Store,
        todo: Sequence[Work],
        *,
        slots: Sequence[Mapping[str, str]],
        observer: Observer,
        supervision: Supervision,
        poll: Callable[[], None] = lambda: None,
        picker: Picker | None = None,
        patience: float = math.inf,
        trainer: TrainerParts = TrainerParts(),
    ) -> None:
        """Make an executor. `todo` has each stage after its parents.

        trainer: what Python adds to Lightning's Trainer. patience: seconds to wait, with nothing to do, for stages that
        others execute; they are taken over where their processes die.
        """
        self.store, self.slots, self.observer, self.poll = store, slots, observer, poll
        self.supervisor = Supervisor(store, supervision, observer)
        self.grace_seconds = supervision.grace_seconds
        self.picker, self.patience, self.trainer = picker or picker_of(store, todo), patience, trainer
        self.work = {work.fingerprint: work for work in todo}
        self.running: set[str] = set()

    def execute(self) -> bool:
        """Execute all stages; returns whether it was interrupted."""
        try:
            run_tasks(
                self._tasks(),
                max_parallel=self.slots,
                preload=preloaded(),
                on_start=lambda task: self.observer.stage_started(task.name),
                on_finish=self._finish,
                on_poll=self.poll,
                to_stop=self.supervisor.to_stop,
                grace_seconds=self.grace_seconds,
            )
        except Interrupted:
            return True
        return False

    def _tasks(self) -> Iterator[Task | None]:
        busy_at = time.monotonic()
        while True:
            if (name := self.picker.take()) is not None:
                self.running.add(name)
                yield self._task(self.work[name])
                busy_at = time.monotonic()
                continue
            if self.running:  # a running stage may be restarted
                busy_at = time.monotonic()
            elif self.picker.over or time.monotonic() - busy_at >= self.patience:
                return
            yield None

    def _task(self, work: Work) -> Task:
        log = self.store.stage(work.fingerprint).log_file
        arguments = (self.store.root, work.fingerprint, *([self.trainer] if self.trainer else []))
        return Task(work.name, run_stage, arguments, log=log, threads=work.threads, slots=work.devices)

    def _finish(self, outcome: Outcome) -> None:
        name = outcome.task.arguments[1]
        self.running.discard(name)
        stage = self.store.stage(name)
        note_end(stage, outcome, self.observer)
        self.observer.stage_ended(outcome.task.name, outcome.value or outcome.error or outcome.status)
        if self.supervisor.restart(outcome) or outcome.value == "running":
            self.picker.put_back(name)  # behind the others: they may be what has taken its memory
        elif (state := stage.status()["state"]) in (*FINAL, *NOT_TRIED):
            self.picker.ended(name, state)
        else:
            self.picker.give_up(name)


def note_end(stage: Stage, outcome: Outcome, observer: Observer) -> None:
    """Record why a process ended when it could not do so itself: it was killed, died early, or had no disk.

    Raises DiskError where the store is gone.
    """
    if outcome.status not in ("killed", "raised"):
        return
    if (problem := disk_problem_of(outcome)) is not None:
        check_exists(stage.store)  # writing would create a new store in its place
        observer.message(f"{outcome.task.name}: {problem}")  # the process has recorded it, or could not
        return
    with suppress(Busy), stage.claim():  # Busy: another study goes on with the stage
        if stage.result() is None:
            # A kill can be answered by going on from the last checkpoint; an error would only come again.
            state: Literal["interrupted", "failed"] = "interrupted" if outcome.status == "killed" else "failed"
            stage.set_state(state, outcome.error, outcome.traceback)


def disk_problem_of(outcome: Outcome) -> str | None:
    """The disk error that ended a process; None where it ended for another reason."""
    kind = f"{DiskError.__name__}: "
    raised = outcome.status == "raised" and outcome.error is not None and outcome.error.startswith(kind)
    return outcome.error.removeprefix(kind) if raised and outcome.error else None
