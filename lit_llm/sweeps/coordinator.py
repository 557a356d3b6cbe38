"""Coordinates a sweep's trials: draws them, trains so many at once, judges them on the way, notes how they ended."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from lit_llm.experiment.cost import FIGURES, cost_of
from lit_llm.launch import Interrupted, Outcome, Task, run_tasks
from lit_llm.runs.provenance import provenance, same_provenance
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import StageNode
from lit_llm.runs.worker import Judged, preloaded, run_trial
from lit_llm.store.disk import DiskError
from lit_llm.store.files import Damaged
from lit_llm.store.garbage_collection import list_runs
from lit_llm.store.store import FINAL, Busy, Stage, Store, read_json, read_metrics
from lit_llm.studies.execute import disk_problem_of, note_end, report_news
from lit_llm.studies.load import Arm
from lit_llm.studies.mlflow_runs import record
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import Run, Step, last_metrics
from lit_llm.studies.supervise import Supervision, Supervisor
from lit_llm.sweeps.samplers import progress
from lit_llm.sweeps.storage import storage_errors
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Ended, Trial
from lit_llm.sweeps.trials import Trials
from lit_llm.tracking.address import without_secrets
from lit_llm.tracking.mlflow_sync import RunRecord
from lit_llm.tracking.sync_thread import SyncThread

_LOOK_AGAIN = 1.0
"""Seconds between two looks for a trial that another coordinator leaves."""


class SweepObserver(Observer):
    """Looks on and says nothing; a subclass shows what it is told."""

    def searching(self, search: Search, trials: Sequence[Trial], max_parallel: int) -> None:
        """The search begins or goes on, with so many trials there already."""

    def began(self, trial: Trial) -> None:
        """A trial is being trained."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended, here or elsewhere."""

    def comparing(self, study: Path) -> None:
        """The search is over, and the study of the winners begins."""


class Coordinator:
    """Draws trials, hands them to processes, answers their questions and writes down how they ended."""

    def __init__(
        self, search: Search, store: Store, trials: Trials, observer: SweepObserver, supervision: Supervision
    ) -> None:
        self.search, self.store, self.trials, self.observer = search, store, trials, observer
        self.supervisor = Supervisor(store, supervision, observer)
        self.running: dict[str, Trial] = {}
        self.waiting: list[Trial] = []
        """Which are to be begun again."""
        self.seen: list[Trial] = []
        """All trials, as they were when they were looked at last; replaced whole, so another thread may read it."""
        self._told: set[str] = set()
        self._frozen: set[str] = set()
        self._runs: dict[str, list[Run]] = {}
        self._looked = 0.0

    def look(self) -> list[Trial]:
        """Take in what all coordinators have done; what was known already, where the database is gone."""
        self._looked = time.monotonic()
        with suppress(*storage_errors()):
            self.seen = self.trials.all()
        return self.seen

    def run(self, max_parallel: int, follower: SyncThread) -> bool:
        """Until every arm has its trials; returns whether it was interrupted."""
        self._told = {trial.name for trial in self.seen if trial.state != "running"}
        if not self.search.trains:
            return self._calculate(follower)

        def poll() -> None:
            self.observer.poll()
            report_news(follower, self.observer)
            if time.monotonic() - self._looked > _LOOK_AGAIN:
                self._tell_ended()

        try:
            run_tasks(
                self._tasks(),
                max_parallel=max_parallel,
                preload=preloaded(),
                on_finish=self._finish,
                on_question=self._judge,
                on_poll=poll,
                to_stop=self.supervisor.to_stop,
                poll_seconds=0.1,
                grace_seconds=self.supervisor.supervision.grace_seconds,
            )
        except Interrupted:
            return True
        except storage_errors() as error:
            reason = without_secrets(" ".join(str(error.__cause__ or error).split()))
            self.observer.message(
                f"the storage of the trials failed: {reason}. What was being trained can be gone on with."
            )
            return True
        finally:
            self._tell_ended()
        return False

    def _calculate(self, follower: SyncThread) -> bool:
        """Goals that are known before training need none."""
        try:
            while (trial := self.trials.next()) is not None or not self.trials.over:
                if trial is None:
                    time.sleep(_LOOK_AGAIN)
                    continue
                cost = cost_of(self.search.experiment(trial.arm, trial.point))
                self.trials.finish(trial, "done", [FIGURES[goal](cost) for goal in self.search.goals])
                if time.monotonic() - self._looked > _LOOK_AGAIN:
                    self._tell_ended()
                    self.observer.poll()
                    report_news(follower, self.observer)
        except KeyboardInterrupt:
            return True
        finally:
            self._tell_ended()
        return False

    def _tell_ended(self) -> None:
        for trial in self.look():
            if trial.state != "running" and trial.name not in self._told:
                self._told.add(trial.name)
                self.observer.ended(trial)

    # --- trials as tasks -------------------------------------------------------------------------------------------

    def _tasks(self) -> Iterator[Task | None]:
        asked = -_LOOK_AGAIN
        while True:
            trial = self.waiting.pop() if self.waiting else None
            if trial is None and time.monotonic() - asked >= _LOOK_AGAIN:
                trial = self.trials.next()
                if trial is None:
                    asked = time.monotonic()
                    if not (self.running or self.waiting) and self.trials.over:
                        return
            if trial is None:
                yield None
            elif (task := self._task(trial)) is not None:
                yield task

    def _task(self, trial: Trial) -> Task | None:
        """None where it has ended before it began."""
        if trial.pruned:  # by a coordinator that could not write it down any more
            self._end(trial, "pruned")
            return None
        runs = self.runs(trial)
        for run in runs:
            self._make_ready(run)
            if trial.name not in self._frozen:  # one that is begun again may take fewer sequences at a time
                save_stage_config(self.store, run.steps[0].node, run.experiment)
        self._frozen.add(trial.name)
        self._list()
        if self._judged == "validations" and self._catch_up(trial, runs[0]):
            self._end(trial, "pruned")
            return None
        self.running[trial.name] = trial
        self.observer.began(trial)
        arguments = (self.store.root, trial.fingerprints, self._judged)
        threads = runs[0].experiment.pretrain.training.execution.threads
        return Task(trial.name, run_trial, arguments, log=runs[0].last.log_file, threads=threads)

    def _make_ready(self, run: Run) -> None:
        """Let a stage begin anew that has failed, or has a result of other code, which a search does not mix in."""
        state = run.last.status()["state"]
        if state in FINAL and run.stale():
            with suppress(Busy):  # a study has begun to repeat it
                run.last.forget()
                self.observer.message(f"{run.name}: a result of other code, device or threads is there; it is repeated")
        elif state in ("failed", "out_of_memory"):
            with suppress(Busy):
                run.last.retry()

    def _catch_up(self, trial: Trial, run: Run) -> bool:
        """Report the validations on disk that the pruner was not told of; whether the trial is to be given up.

        The coordinator was gone when its process asked, or another sweep has begun the stage, or a study.
        """
        stage, steps = run.last, run.experiment.pretrain.training.max_steps
        try:
            begun_by = read_json(stage.checkpoints / "provenance.json") or {}
        except Damaged:
            begun_by = {}
        if stage.result() is None and not same_provenance(begun_by, provenance(run.experiment)):
            return False  # its process will start over
        lines = [line for line in read_metrics(stage.metrics_file) if line["step"] < steps]
        return any(self._is_bad(trial, line["step"], line["metrics"]) for line in lines)

    def _list(self) -> None:
        """The stages that this sweep needs, for who clears the store."""
        source, overrides = self.search.ablation.source, self.search.ablation.overrides
        runs = [
            {"arm": trial.name, "seed": seed, "fingerprint": name}
            for trial in self.trials.all()
            for seed, name in zip(self.search.sweep.seeds, trial.fingerprints, strict=False)
        ]
        list_runs(self.store, self.search.name, source, overrides, runs)

    @cached_property
    def _judged(self) -> Judged:
        kind = self.search.sweep.pruner.kind
        return None if kind == "none" else "seeds" if kind == "wilcoxon" else "validations"

    def _judge(self, task: Task, question: tuple[int, dict[str, float] | None]) -> bool:
        """Whether a trial is to be given up; asked by its process, which waits for it."""
        trial, (step, found) = self.running[task.name], question
        if found is None:  # after a whole run, whose number among the seeds this is
            value = self._value(self.store.stage(trial.fingerprints[step]), self.search.goals[0])
            return value is not None and self.trials.report(trial, step, value)
        return self._is_bad(trial, step, found)

    def _is_bad(self, trial: Trial, step: int, found: Mapping[str, float | None]) -> bool:
        """Whether a trial is to be given up by what was found after a step."""
        value = found.get(self.search.goals[0])
        if value is None:
            return False
        own, experiment = (self.search.ablation.arm(trial.arm).experiment, self.runs(trial)[0].experiment)
        at = progress(self.search.sweep, own, experiment, step)
        return at is not None and self.trials.report(trial, at, value)

    def _finish(self, outcome: Outcome) -> None:
        trial = self.running.pop(outcome.task.name)
        stages, value = [self.store.stage(name) for name in trial.fingerprints], outcome.value
        if (problem := disk_problem_of(outcome)) is not None:
            raise DiskError(problem)  # the next trial would meet it too; this one is gone on with
        for stage in stages:
            note_end(stage, outcome, self.observer)
        if value is not None and value != ("interrupted", False) and value[0] != "out_of_memory":
            self._conclude(trial, stages, *value)
        elif outcome.status == "interrupted":
            pass  # we have asked it to: whoever runs the sweep next goes on with it
        elif outcome.status != "raised" and self._is_pruned(trial):
            self._end(trial, "pruned")
        elif self.supervisor.restart(outcome):
            self.waiting.append(trial)
        elif value is not None and value[0] == "out_of_memory":
            self._conclude(trial, stages, *value)
        else:
            times = self.supervisor.times(trial.name)
            error = outcome.error or "somebody asked its process to stop"
            self._end(trial, "failed", error=f"{error}, {times} times" if times > 1 else error)

    def _is_pruned(self, trial: Trial) -> bool:
        return any(other.pruned for other in self.trials.of(trial.arm) if other.number == trial.number)

    def _conclude(self, trial: Trial, stages: Sequence[Stage], state: str, pruned: bool) -> None:
        """By how its last run ended."""
        error = next((said for stage in stages if (said := stage.status().get("error"))), None)
        if pruned:
            self._end(trial, "pruned")
        elif state == "done":
            cost = cost_of(self.runs(trial)[0].experiment)
            values = []
            for goal in self.search.goals:
                of_seeds = [self._value(stage, goal) for stage in stages] if goal not in FIGURES else []
                known = [value for value in of_seeds if value is not None]
                if goal in FIGURES:
                    values.append(FIGURES[goal](cost))
                elif len(known) == len(stages):
                    values.append(statistics.fmean(known))
                else:
                    self._end(trial, "failed", error=f"its result has no finite {goal}")
                    return
            self._end(trial, "done", values)
        elif state in ("diverged", "failed", "out_of_memory"):
            ended: Ended = "diverged" if state == "diverged" else "failed" if state == "failed" else "out_of_memory"
            self._end(trial, ended, error=error)

    @staticmethod
    def _value(stage: Stage, metric: str) -> float | None:
        value = (stage.result() or {}).get("metrics", {}).get(metric)
        return None if value is None else float(value)

    def _end(self, trial: Trial, ended: Ended, values: Sequence[float] | None = None, error: str | None = None) -> None:
        spent = {"tokens": 0.0, "flops": 0.0, "seconds": 0.0}
        for name in trial.fingerprints:
            stage = self.store.stage(name)
            result, (_, last) = stage.result(), last_metrics(stage)
            found = {"tokens": last.get("tokens_seen"), "flops": last.get("flops")} if result is None else result
            spent["tokens"] += found.get("tokens") or 0
            spent["flops"] += found.get("flops") or 0
            spent["seconds"] += sum(((result or {}).get("seconds") or {}).values())
        self.trials.finish(trial, ended, values, error=error, **spent)
        self._tell_ended()

    # --- as MLflow sees it -----------------------------------------------------------------------------------------

    def runs(self, trial: Trial) -> list[Run]:
        """The runs of a trial, one for each seed."""
        if trial.name not in self._runs and trial.fingerprints:
            levels = {name: str(value) for name, value in trial.point.items()}
            experiment = self.search.experiment(trial.arm, trial.point)
            arm = Arm(trial.name, trial.arm, levels, trial.arm, experiment)
            seeds = zip(self.search.sweep.seeds, trial.fingerprints, strict=False)
            self._runs[trial.name] = [
                Run(arm, seed, (Step(StageNode("pretrain", name), self.store.stage(name)),)) for seed, name in seeds
            ]
        return self._runs.get(trial.name, [])

    def records(self, trial: Trial) -> Iterator[RunRecord]:
        """A child of MLflow for each run."""
        values = {f"objective/{name}": value for name, value in self.search.named(trial.values).items()}
        for run in self.runs(trial):
            found = record(run, trial.number)
            state = trial.state if trial.state == "pruned" or not self.search.trains else found.state
            yield replace(
                found,
                state=state,
                values=values,
                tags={**found.tags, "lit_llm.trial": f"{trial.number}"},
            )
