"""Coordinator of a sweep's trials: draws them, trains several at once, prunes them and records their end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from lit_llm.experiment.cost import COST_FIGURES, cost_of
from lit_llm.launch import Interrupted, Outcome, Task, run_tasks
from lit_llm.launch.devices import machine_slots
from lit_llm.runs.provenance import provenance, same_provenance
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import StageNode
from lit_llm.runs.trainer_parts import TrainerParts, in_force
from lit_llm.runs.worker import Judged, preloaded, run_trial
from lit_llm.store.disk import DiskError
from lit_llm.store.files import Damaged
from lit_llm.store.garbage_collection import list_runs
from lit_llm.store.locks import Busy
from lit_llm.store.store import FINAL, Stage, Store, read_json, read_metrics
from lit_llm.studies.load import Arm
from lit_llm.studies.mlflow_runs import record
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import Run, StoredStage
from lit_llm.studies.stage_executor import disk_problem_of, note_end
from lit_llm.studies.status import last_metrics
from lit_llm.studies.supervise import Supervision, Supervisor
from lit_llm.sweeps.samplers import progress
from lit_llm.sweeps.storage import reason_of, storage_errors
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Ended, Trial
from lit_llm.sweeps.trials import Trials
from lit_llm.tracking.mlflow_sync import RunRecord

_REFRESH_SECONDS = 1.0
"""Seconds between two readings of the storage, which may hold a trial that another coordinator left."""


class SweepObserver(Observer):
    """Receives the events of a sweep and ignores them; subclasses show them."""

    def searching(self, search: Search, trials: Sequence[Trial], max_parallel: int) -> None:
        """The search begins or goes on. trials: those drawn so far."""

    def began(self, trial: Trial) -> None:
        """A trial is being trained."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended, here or elsewhere."""

    def comparing(self, study: Path) -> None:
        """The search is over, and the confirmation study begins."""


class Coordinator:
    """Draws trials, hands them to processes, answers their questions and records how they ended."""

    def __init__(
        self, search: Search, store: Store, trials: Trials, observer: SweepObserver, supervision: Supervision
    ) -> None:
        self.search, self.store, self.trials, self.observer = search, store, trials, observer
        self.supervisor = Supervisor(store, supervision, observer)
        self.running: dict[str, Trial] = {}
        self.waiting: list[Trial] = []
        """Trials that are to be begun again."""
        self.seen: list[Trial] = []
        """All trials as of the last `refresh`; the list is replaced, never changed, so other threads may read it."""
        self._reported: set[str] = set()
        self._frozen: set[str] = set()
        self._runs: dict[str, list[Run]] = {}
        self._refreshed = 0.0

    def refresh(self) -> list[Trial]:
        """Read the trials of all coordinators; the earlier list where the database cannot be reached."""
        self._refreshed = time.monotonic()
        with suppress(*storage_errors()):
            self.seen = self.trials.all()
        return self.seen

    def poll(self) -> None:
        """Report the trials that have ended since the last poll."""
        self.observer.poll()
        if time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self._report_ended()

    def run(self, max_parallel: int, news: Callable[[], None] = lambda: None, patience: float = math.inf) -> bool:
        """Run until every arm has its trials. Returns whether it was interrupted.

        news: called regularly. patience: seconds to wait, with nothing to do, for the trials of others; they are taken
        over where their coordinators die.
        """
        self._reported = {trial.name for trial in self.seen if trial.state != "running"}
        if not self.search.trains:
            return self._run_without_training(news)

        def poll() -> None:
            self.poll()
            news()

        arms = self.search.ablation.arms
        use_gpus = any(arm.may_use_gpu for arm in arms)
        slots = max_parallel * max(arm.experiment.pretrain.training.execution.devices for arm in arms)
        try:
            run_tasks(
                self._tasks(patience),
                max_parallel=machine_slots(slots, use_gpus),
                preload=preloaded(),
                on_finish=self._finish,
                on_question=self._answer,
                on_poll=poll,
                to_stop=self.supervisor.to_stop,
                poll_seconds=0.1,
                grace_seconds=self.supervisor.supervision.grace_seconds,
            )
        except Interrupted:
            return True
        except storage_errors() as error:
            reason = reason_of(error)
            self.observer.message(f"the storage of the trials failed: {reason}. Started trials can be continued.")
            return True
        finally:
            self._report_ended()
        return False

    def _run_without_training(self, news: Callable[[], None]) -> bool:
        """Run a search whose goals are figures of the cost, without training."""
        try:
            while (trial := self.trials.next()) is not None or not self.trials.over:
                if trial is None:
                    time.sleep(_REFRESH_SECONDS)
                    continue
                cost = cost_of(self.search.experiment(trial.arm, trial.point))
                self.trials.finish(trial, "done", [COST_FIGURES[goal](cost) for goal in self.search.goals])
                self.poll()
                news()
        except KeyboardInterrupt:
            return True
        finally:
            self._report_ended()
        return False

    def _report_ended(self) -> None:
        for trial in self.refresh():
            if trial.state != "running" and trial.name not in self._reported:
                self._reported.add(trial.name)
                self.observer.ended(trial)

    # --- trials as tasks -------------------------------------------------------------------------------------------

    def _tasks(self, patience: float) -> Iterator[Task | None]:
        last_empty, busy_at = -_REFRESH_SECONDS, time.monotonic()
        while True:
            if self.running or self.waiting:
                busy_at = time.monotonic()
            trial = self.waiting.pop() if self.waiting else None
            if trial is None and time.monotonic() - last_empty >= _REFRESH_SECONDS:
                trial = self.trials.next()
                if trial is None:
                    last_empty = time.monotonic()
                    idle = not (self.running or self.waiting)
                    if idle and (time.monotonic() - busy_at >= patience or self.trials.over):
                        return
            if trial is None:
                yield None
            elif (task := self._task(trial)) is not None:
                yield task

    def _task(self, trial: Trial) -> Task | None:
        """The task that trains a trial; None for a trial that is pruned before its process starts."""
        if trial.pruned:  # by a coordinator that could not record its end
            self._end(trial, "pruned")
            return None
        runs, trainer = self.runs(trial), in_force()
        for run in runs:
            self._reset_unusable(run, trainer)
            if trial.name not in self._frozen:  # a restarted trial may use a smaller micro-batch
                save_stage_config(self.store, run.steps[0].node, run.experiment)
        self._frozen.add(trial.name)
        self._list_stages()
        if self._judged_on == "validations" and self._report_missed(trial, runs[0], trainer):
            self._end(trial, "pruned")
            return None
        self.running[trial.name] = trial
        self.observer.began(trial)
        arguments = (self.store.root, trial.fingerprints, self._judged_on)
        execution = runs[0].experiment.pretrain.training.execution
        log, threads, slots = runs[0].last.log_file, execution.threads, execution.devices
        return Task(trial.name, run_trial, arguments, log=log, threads=threads, slots=slots)

    def _reset_unusable(self, run: Run, trainer: TrainerParts) -> None:
        """Reset a stage that has failed, or whose result is of other code, which a search must not mix.

        trainer: what the user adds to the Trainer.
        """
        state = run.last.status()["state"]
        if state in FINAL and run.stale(trainer):
            with suppress(Busy):  # a study has begun to repeat it
                run.last.forget()
                self.observer.message(f"{run.name}: a result of other code, device or threads is there; it is repeated")
        elif state in ("failed", "out_of_memory"):
            with suppress(Busy):
                run.last.retry()

    def _report_missed(self, trial: Trial, run: Run, trainer: TrainerParts) -> bool:
        """Report validations on disk that the pruner has not seen. Returns whether the trial is to be pruned.

        They exist where the coordinator ended before the trial's process, or where another sweep or a study has begun
        the stage. trainer: what the user adds to the Trainer.
        """
        stage, steps = run.last, run.experiment.pretrain.training.max_steps
        try:
            begun_by = read_json(stage.checkpoints / "provenance.json") or {}
        except Damaged:
            begun_by = {}
        if stage.result() is None and not same_provenance(begun_by, provenance(run.experiment, trainer=trainer)):
            return False  # its process will start over
        lines = [line for line in read_metrics(stage.metrics_file) if line["step"] < steps]
        return any(self._should_prune(trial, line["step"], line["metrics"]) for line in lines)

    def _list_stages(self) -> None:
        """List the stages that this sweep needs, for the store's garbage collection."""
        source, overrides = self.search.ablation.source, self.search.ablation.overrides
        runs = [
            {"arm": trial.name, "seed": seed, "fingerprint": name}
            for trial in self.trials.all()
            for seed, name in zip(self.search.sweep.seeds, trial.fingerprints, strict=False)
        ]
        list_runs(self.store, self.search.name, source, overrides, runs)

    @cached_property
    def _judged_on(self) -> Judged:
        kind = self.search.sweep.pruner.kind
        return None if kind == "none" else "seeds" if kind == "wilcoxon" else "validations"

    def _answer(self, task: Task, question: tuple[int, dict[str, float] | None]) -> bool:
        """True where a trial is to be pruned; the answer to its process, which waits for it."""
        trial, (step, metrics) = self.running[task.name], question
        if metrics is None:  # after a whole run; `step` is then the index of its seed
            value = self._metric_value(self.store.stage(trial.fingerprints[step]), self.search.goals[0])
            return value is not None and self.trials.report(trial, step, value)
        return self._should_prune(trial, step, metrics)

    def _should_prune(self, trial: Trial, step: int, metrics: Mapping[str, float | None]) -> bool:
        """True where a trial is to be pruned, given its metrics after a step."""
        value = metrics.get(self.search.goals[0])
        if value is None:
            return False
        arm_experiment, experiment = (self.search.ablation.arm(trial.arm).experiment, self.runs(trial)[0].experiment)
        at = progress(self.search.sweep, arm_experiment, experiment, step)
        return at is not None and self.trials.report(trial, at, value)

    def _finish(self, outcome: Outcome) -> None:
        trial = self.running.pop(outcome.task.name)
        stages, value = [self.store.stage(name) for name in trial.fingerprints], outcome.value
        if (problem := disk_problem_of(outcome)) is not None:
            raise DiskError(problem)  # it would stop the next trial too; this one is continued later
        for stage in stages:
            note_end(stage, outcome, self.observer)
        if value is not None and value != ("interrupted", False) and value[0] != "out_of_memory":
            self._end_by_state(trial, stages, *value)
        elif outcome.status == "interrupted":
            pass  # stopped on request: the next run of the sweep continues it
        elif outcome.status != "raised" and self._is_pruned(trial):
            self._end(trial, "pruned")
        elif self.supervisor.restart(outcome):
            self.waiting.append(trial)
        elif value is not None and value[0] == "out_of_memory":
            self._end_by_state(trial, stages, *value)
        else:
            times = self.supervisor.times(trial.name)
            error = outcome.error or "somebody asked its process to stop"
            self._end(trial, "failed", error=f"{error}, {times} times" if times > 1 else error)

    def _is_pruned(self, trial: Trial) -> bool:
        return any(other.pruned for other in self.trials.of(trial.arm) if other.number == trial.number)

    def _end_by_state(self, trial: Trial, stages: Sequence[Stage], state: str, pruned: bool) -> None:
        """End a trial by the state of its last run."""
        error = next((message for stage in stages if (message := stage.status().get("error"))), None)
        if pruned:
            self._end(trial, "pruned")
        elif state == "done":
            cost = cost_of(self.runs(trial)[0].experiment)
            values = []
            for goal in self.search.goals:
                of_seeds = [self._metric_value(stage, goal) for stage in stages] if goal not in COST_FIGURES else []
                finite = [value for value in of_seeds if value is not None]
                if goal in COST_FIGURES:
                    values.append(COST_FIGURES[goal](cost))
                elif len(finite) == len(stages):
                    values.append(statistics.fmean(finite))
                else:
                    self._end(trial, "failed", error=f"its result has no finite {goal}")
                    return
            self._end(trial, "done", values)
        elif state in ("diverged", "failed", "out_of_memory"):
            ended: Ended = "diverged" if state == "diverged" else "failed" if state == "failed" else "out_of_memory"
            self._end(trial, ended, error=error)

    @staticmethod
    def _metric_value(stage: Stage, metric: str) -> float | None:
        value = (stage.result() or {}).get("metrics", {}).get(metric)
        return None if value is None else float(value)

    def _end(self, trial: Trial, ended: Ended, values: Sequence[float] | None = None, error: str | None = None) -> None:
        spent = {"tokens": 0.0, "flops": 0.0, "seconds": 0.0}
        for name in trial.fingerprints:
            stage = self.store.stage(name)
            result, (_, last) = stage.result(), last_metrics(stage)
            spending = {"tokens": last.get("tokens_seen"), "flops": last.get("flops")} if result is None else result
            spent["tokens"] += spending.get("tokens") or 0
            spent["flops"] += spending.get("flops") or 0
            spent["seconds"] += sum(((result or {}).get("seconds") or {}).values())
        self.trials.finish(trial, ended, values, error=error, **spent)
        self._report_ended()

    # --- records for MLflow ----------------------------------------------------------------------------------------

    def runs(self, trial: Trial) -> list[Run]:
        """Runs of a trial, one for each seed."""
        if trial.name not in self._runs and trial.fingerprints:
            levels = {name: str(value) for name, value in trial.point.items()}
            experiment = self.search.experiment(trial.arm, trial.point)
            arm = Arm(trial.name, trial.arm, levels, trial.arm, experiment)
            seeds = zip(self.search.sweep.seeds, trial.fingerprints, strict=False)
            self._runs[trial.name] = [
                Run(arm, seed, (StoredStage(StageNode("pretrain", name), self.store.stage(name)),))
                for seed, name in seeds
            ]
        return self._runs.get(trial.name, [])

    def records(self, trial: Trial) -> Iterator[RunRecord]:
        """One MLflow child run for each run of a trial."""
        values = {f"objective/{name}": value for name, value in self.search.named(trial.values).items()}
        for run in self.runs(trial):
            base = record(run, trial.number)
            state = trial.state if trial.state == "pruned" or not self.search.trains else base.state
            yield replace(
                base,
                state=state,
                values=values,
                tags={**base.tags, "lit_llm.trial": f"{trial.number}"},
            )
