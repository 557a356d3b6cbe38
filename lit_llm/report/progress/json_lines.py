"""Progress for programs: one JSON object per line. `docs/json.md` lists the events and their keys."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from lit_llm.report.progress.run_progress import RunProgress, progress_of_stage, progress_of_trial
from lit_llm.report.tables.sweep import sweep_json, trial_json
from lit_llm.store.store import Store, finite
from lit_llm.studies.analysis_plan import registration_of
from lit_llm.studies.observer import Observer
from lit_llm.studies.run import Finished
from lit_llm.studies.runs import Run, StoredStage
from lit_llm.studies.status import left_out
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import Searched
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial

EVERY = 1.0
"""Least seconds between two lines of progress of one run."""
SETTLED = 1.0
"""Seconds after which a dead run counts as ended: until then it may be retried."""
ENDED = ("done", "diverged", "failed", "out_of_memory", "interrupted")


class Lines(Observer):
    """Writes events to a stream, and messages for people to the console."""

    def __init__(self, stream: IO[str], console: Console) -> None:
        self.stream, self.console = stream, console
        self._runs: Sequence[Run] = ()
        self._before: dict[str, object] = {}
        """{fingerprint: last attempt at a stage before the launch}, which is not reported."""
        self._last_event: dict[tuple[str, str], str] = {}
        """{(run, stage): last event written}."""
        self._interrupted: dict[tuple[str, str], float] = {}
        """{(run, stage): when it was first seen dead}."""
        self._steps: dict[str, tuple[float, float]] = {}
        """{run or trial: (last step written, when)}."""
        self._silent: set[str] = set()
        self._polled_at = 0.0

    def write(self, event: str, **content: Any) -> None:
        """Write one event as a line, and flush it."""
        line = json.dumps(finite({"event": event, "time": round(time.time(), 3), **content}))
        try:
            self.stream.write(line + "\n")
            self.stream.flush()
        except BrokenPipeError:  # the reader is gone; the runs go on without it
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.message("Nobody reads the lines any more; the runs go on.")

    def message(self, text: str) -> None:
        self.console.print(text, style="yellow", highlight=False)

    def silent(self, name: str, seconds: float) -> None:
        if seconds and name not in self._silent:
            self._silent.add(name)
            self.write("silent", run=name, seconds=round(seconds, 1))
        elif not seconds:
            self._silent.discard(name)

    def restarting(self, name: str) -> None:
        """Write that a run is retried. It has started, though it may have died between two polls."""
        for run in self._runs:
            for step in run.steps:
                if run.name_at(step) == name:
                    if (run.name, step.node.fingerprint) not in self._last_event:
                        self._write_started(run, step)
                    self._last_event.pop((run.name, step.node.fingerprint), None)  # the next attempt starts, too
                    self._interrupted.pop((run.name, step.node.fingerprint), None)
        self.write("retried", run=name)

    def places(self, launcher: str, words: str) -> None:
        self.write("places", launcher=launcher, places=words)

    def preparing(self, what: str, done: int, total: int) -> None:
        if self._is_due(what, done) or done == total:
            self.write("preparing", what=what, done=done, total=total or None)

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        names = {run.name for run in todo}
        self._runs = todo
        self._before = {step.node.fingerprint: _attempt(step) for run in todo for step in run.steps}
        planned = [{**_run_keys(run), "state": run.status()["state"], "to_do": run.name in names} for run in runs]
        self.write("planned", slots=max_parallel, runs=planned)

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Write the event of a Ctrl-C that comes before there is anything to compare."""
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise

    def compared(self, finished: Finished) -> None:
        """Write whether the study was interrupted, then the comparison as in `report --json`."""
        if finished.interrupted:
            self.write("interrupted")
        study = finished.plan.ablation.study.study
        registered = registration_of(finished.folder)
        analysis = registered.as_json() if registered is not None else None
        comparison = finished.comparison.as_json()
        self.write("compared", study=study, **comparison, analysis=analysis, left_out=left_out(finished.runs))

    def poll(self) -> None:
        if time.monotonic() - self._polled_at >= EVERY / 4:
            self._write_news()

    def finished(self) -> None:
        self._write_news(settled=0.0)  # nothing is retried any more

    def _write_news(self, settled: float = SETTLED) -> None:
        self._polled_at = time.monotonic()
        for run in self._runs:
            for step in run.steps:
                if self._last_event.get((run.name, step.node.fingerprint)) != "finished":
                    self._write_stage(run, step, settled)

    def _write_started(self, run: Run, step: StoredStage) -> None:
        about = {**_run_keys(run), **_stage_keys(step), "state": "running"}
        self.write("started", **about, steps=progress_of_stage(run, step).steps)
        self._last_event[run.name, step.node.fingerprint] = "started"

    def _write_stage(self, run: Run, step: StoredStage, settled: float) -> None:
        key, status = (run.name, step.node.fingerprint), step.status()
        state = status["state"]
        if state == "pending" or self._before.get(step.node.fingerprint) == _attempt(step):
            return
        now = progress_of_stage(run, step)
        about = {**_run_keys(run), **_stage_keys(step), "state": state}
        if key not in self._last_event:
            self._write_started(run, step)
        polled = self._polled_at
        if state == "interrupted" and polled - self._interrupted.setdefault(key, polled) < settled:
            return
        if state in ENDED:
            self._last_event[key] = "finished"
            metrics = {"metrics": status.get("metrics") or now.metrics, "error": status.get("error")}
            metrics["notes"] = status.get("notes", [])
            log = str(step.stage.log_file) if step.stage.log_file.exists() else None
            self.write("finished", **about, **_numbers(now) | {"seconds_left": None}, **metrics, log=log)
        elif now.step and self._is_due(run.name, now.step + (now.evaluated or 0.0)):
            self.write("progress", **about, **_numbers(now))

    def _is_due(self, name: str, step: float) -> bool:
        """True where a run or trial has a new step, and its last line is old enough."""
        last, when = self._steps.get(name, (-1, -EVERY))
        due = step != last and time.monotonic() - when >= EVERY
        if due:
            self._steps[name] = step, time.monotonic()
        return due


def _attempt(step: StoredStage) -> object:
    """Key of one attempt at a stage."""
    status = step.status()
    return status["state"], status.get("time"), status.get("started")


def _run_keys(run: Run) -> dict[str, object]:
    return {"run": run.name, "arm": run.arm.name, "seed": run.seed}


def _stage_keys(step: StoredStage) -> dict[str, object]:
    """Keys of a stage, as in `status --json`."""
    node = step.node
    return {
        "stage": node.name if node.source else node.kind,
        "after": node.after if node.kind == "evaluate" else None,
        "evaluation": node.evaluation or None,
        "fingerprint": node.fingerprint,
    }


def _numbers(now: RunProgress) -> dict[str, float | None]:
    return {
        "step": now.step,
        "steps": now.steps,
        "loss": now.loss,
        "tokens_per_second": now.tokens_per_second,
        "seconds_left": now.seconds_left,
        "evaluated": now.evaluated,
    }


class SweepLines(Lines, SweepObserver):
    """Writes the events of trials, then of the runs of the confirmation study."""

    def __init__(self, stream: IO[str], console: Console, search: Search, store: Store) -> None:
        super().__init__(stream, console)
        self.search, self.store = search, store
        self._training: dict[str, tuple[Trial, int]] = {}
        """{trial: (trial, steps of a run)} of the running trials."""

    def searching(self, search: Search, trials: Sequence[Trial], max_parallel: int) -> None:
        arms = dict.fromkeys(search.spaces, search.sweep.trials)
        earlier = [trial_json(search, trial) for trial in trials if trial.state != "running"]
        self.write("planned", sweep=search.name, slots=max_parallel, trials=arms, there=earlier)

    def began(self, trial: Trial) -> None:
        steps = self.search.experiment(trial.arm, trial.point).pretrain.training.max_steps
        self._training[trial.name] = trial, steps
        self.write("started", **self._trial(trial), steps=steps)

    def ended(self, trial: Trial) -> None:
        self._training.pop(trial.name, None)
        self.write("finished", **self._trial(trial))

    def comparing(self, study: Path) -> None:
        self.write("comparing", file=str(study))

    def searched(self, ended: Searched) -> None:
        """Write the comparison of the confirmation study, if there is one, then the sweep as in `report --json`."""
        if ended.winners is not None:
            self.compared(ended.winners)
        if ended.interrupted:
            self.write("interrupted")
        self.write("searched", **sweep_json(ended.search, ended.summaries))

    def _trial(self, trial: Trial) -> dict[str, object]:
        return {"trial": trial.name, **trial_json(self.search, trial)}

    def _write_news(self, settled: float = SETTLED) -> None:
        super()._write_news(settled)
        for trial, steps in self._training.values():
            now = progress_of_trial(trial, steps, self.store)
            if now.step and self._is_due(trial.name, now.step):
                self.write("progress", **self._trial(trial), **_numbers(now))
