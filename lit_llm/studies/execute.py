"""Executes the stages of a study's runs, on this machine or on the places of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_llm.runs.stage_config import is_frozen, save_stage_config
from lit_llm.runs.trainer_parts import TrainerParts
from lit_llm.store.store import Store
from lit_llm.studies.launched import Places
from lit_llm.studies.manifest import Manifest, follow_stages
from lit_llm.studies.mlflow_connection import report_news
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import Run, StoredStage
from lit_llm.studies.stage_executor import StageExecutor, Work, slots_for
from lit_llm.studies.supervise import Supervision
from lit_llm.tracking.sync_thread import SyncThread

Todo = tuple[Run, StoredStage]
"""A stage to be computed, with the first of the runs that need it."""


@dataclass(frozen=True)
class Execution:
    """Execution of the runs of one command, in one round or several."""

    store: Store
    folder: Path
    """The study's folder."""
    max_parallel: int
    """Runs at once, on this machine or in each place."""
    observer: Observer
    follower: Callable[[], SyncThread]
    """Starts the thread that imports MLflow, on the first call: a study without work may need none."""
    supervision: Supervision
    places: Places | None = None
    """Places of an engine; None: this machine."""
    trainer: TrainerParts = field(default_factory=TrainerParts)
    """What Python adds to Lightning's Trainer in runs on this machine."""

    def round(self, chosen: Sequence[Run], todo: Sequence[Todo]) -> bool:
        """Execute `todo` and repair stage configs of `chosen`; returns whether it was interrupted."""
        for run, step in todo:
            save_stage_config(self.store, step.node, run.experiment)
        for run in chosen:
            for step in run.steps:
                if step.stage.result() is not None and not is_frozen(step.stage):
                    save_stage_config(self.store, step.node, run.experiment)
                    self.observer.message(f"{step.stage.config_file} was damaged or missing; it is written again")
        at_once = self.max_parallel * (self.places.count if self.places else 1)
        self.observer.launching(chosen, list({run.name: run for run, _ in todo}.values()), at_once)
        return self.execute(todo) if todo else False

    def execute(self, todo: Sequence[Todo]) -> bool:
        """Execute all stages; returns whether it was interrupted."""
        follower = self.follower()

        def poll() -> None:
            self.observer.poll()
            report_news(follower, self.observer)

        work = [Work.of(run, step) for run, step in todo]
        if self.places is not None:
            manifest = Manifest(tuple(work), self.max_parallel, self.supervision)
            return follow_stages(self.places, self.folder, manifest, self.store, self.observer, poll)
        use_gpus = any(run.arm.may_use_gpu for run, _ in todo)
        return StageExecutor(
            self.store,
            work,
            slots=slots_for(work, self.max_parallel, use_gpus),
            observer=self.observer,
            supervision=self.supervision,
            poll=poll,
            trainer=self.trainer,
        ).execute()
