"""Executes the stages of runs in parallel processes, each stage after its parents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from lit_llm.launch import Interrupted, Outcome, Task, run_tasks
from lit_llm.runs.stage_config import is_frozen, save_stage_config
from lit_llm.runs.worker import preloaded, run_stage
from lit_llm.store.disk import DiskError, check_exists
from lit_llm.store.store import Busy, Stage, Store
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import Run, StoredStage
from lit_llm.studies.supervise import Supervision, Supervisor
from lit_llm.tracking.sync_thread import SyncThread

Work = tuple[Run, StoredStage]
"""A stage to be computed, with the first of the runs that need it."""


@dataclass(frozen=True)
class Execution:
    """Execution of the runs of one command, in one round or several."""

    store: Store
    max_parallel: int
    observer: Observer
    follower: Callable[[], SyncThread]
    """Starts the thread that imports MLflow, on the first call: a study without work may need none."""
    supervision: Supervision

    def round(self, chosen: Sequence[Run], todo: Sequence[Work]) -> bool:
        """Execute `todo` and repair stage configs of `chosen`; returns whether it was interrupted."""
        for run, step in todo:
            save_stage_config(self.store, step.node, run.experiment)
        for run in chosen:
            for step in run.steps:
                if step.stage.result() is not None and not is_frozen(step.stage):
                    save_stage_config(self.store, step.node, run.experiment)
                    self.observer.message(f"{step.stage.config_file} was damaged or missing; it is written again")
        self.observer.launching(chosen, list({run.name: run for run, _ in todo}.values()), self.max_parallel)
        return self.execute(todo) if todo else False

    def execute(self, todo: Sequence[Work]) -> bool:
        """Execute all stages; returns whether it was interrupted."""
        waiting, running, follower = list(todo), dict[str, Work](), self.follower()
        supervisor = Supervisor(self.store, self.supervision, self.observer)

        def poll() -> None:
            self.observer.poll()
            report_news(follower, self.observer)

        def finish(outcome: Outcome) -> None:
            work = running.pop(outcome.task.arguments[1])
            note_end(work[1].stage, outcome, self.observer)
            if supervisor.restart(outcome):
                waiting.append(work)  # behind the others: they may be what has taken its memory

        try:
            run_tasks(
                self._tasks(waiting, running),
                max_parallel=self.max_parallel,
                preload=preloaded(),
                on_finish=finish,
                on_poll=poll,
                to_stop=supervisor.to_stop,
                grace_seconds=self.supervision.grace_seconds,
            )
        except Interrupted:
            return True
        return False

    def _tasks(self, waiting: list[Work], running: dict[str, Work]) -> Iterator[Task | None]:
        """Yield each stage once its parents are done, never after a parent that ended otherwise."""

        def begins_with(work: Work) -> set[str]:
            """Fingerprints of its parents that are not done."""
            return {name for name in work[1].node.parents if self.store.stage(name).status()["state"] != "done"}

        while waiting or running:  # a running stage may be restarted
            for work in waiting:
                if begins_with(work):
                    continue
                waiting.remove(work)
                running[work[1].node.fingerprint] = work
                yield self._task(*work)
                break
            else:
                coming = running.keys() | {step.node.fingerprint for _, step in waiting}
                waiting[:] = [work for work in waiting if begins_with(work) <= coming]
                if waiting or running:
                    yield None

    def _task(self, run: Run, step: StoredStage) -> Task:
        execution = run.experiment_at(step).section(step.node.after).training.execution
        arguments = (self.store.root, step.node.fingerprint)
        return Task(run.name_at(step), run_stage, arguments, log=step.stage.log_file, threads=execution.threads)


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


def report_news(follower: SyncThread, observer: Observer) -> None:
    """Report once why MLflow is not up to date."""
    if news := follower.take_news():
        observer.message(news)
