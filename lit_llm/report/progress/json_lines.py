"""Progress for machines: one JSON object a line. The events and their keys are in `docs/json.md`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from lit_llm.report.progress.run_progress import RunProgress, progress_of_trial, standing
from lit_llm.report.tables.sweep import sweep_json, trial_json
from lit_llm.store.store import Store, finite
from lit_llm.studies.analysis_plan import registration_of
from lit_llm.studies.observer import Observer
from lit_llm.studies.run import Finished
from lit_llm.studies.runs import Run, Step, left_out
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import Searched
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial

EVERY = 1.0
"""Seconds between two lines of progress of one run, at the least."""
ENDED = ("done", "diverged", "failed", "out_of_memory", "interrupted")


class Lines(Observer):
    """Tells what happens on a stream. What is said to people goes to the console."""

    def __init__(self, stream: IO[str], console: Console) -> None:
        self.stream, self.console = stream, console
        self._runs: Sequence[Run] = ()
        self._before: dict[str, object] = {}
        """{fingerprint: when a stage was last begun} at the launch: what ended before it is no news."""
        self._told: dict[tuple[str, str], str] = {}
        """{(run, stage): the event that was told of it last}."""
        self._steps: dict[str, tuple[float, float]] = {}
        """{run or trial: (the step that was told last, when)}."""
        self._silent: set[str] = set()
        self._looked = 0.0

    def tell(self, event: str, **content: Any) -> None:
        """A line, at once."""
        line = json.dumps(finite({"event": event, "time": round(time.time(), 3), **content}))
        try:
            self.stream.write(line + "\n")
            self.stream.flush()
        except BrokenPipeError:  # whoever has read them is gone; the runs are worth more than the lines
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.message("Nobody reads the lines any more; the runs go on.")

    def message(self, text: str) -> None:
        self.console.print(text, style="yellow", highlight=False)

    def silent(self, name: str, seconds: float) -> None:
        if seconds and name not in self._silent:
            self._silent.add(name)
            self.tell("silent", run=name, seconds=round(seconds, 1))
        elif not seconds:
            self._silent.discard(name)

    def restarting(self, name: str) -> None:
        self.tell("retried", run=name)
        for run in self._runs:
            for step in run.steps:
                if run.name_at(step) == name:  # its next attempt is told of as its first was
                    self._told.pop((run.name, step.node.fingerprint), None)

    def preparing(self, what: str, done: int, total: int) -> None:
        if self._is_due(what, done) or done == total:
            self.tell("preparing", what=what, done=done, total=total or None)

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        names = {run.name for run in todo}
        self._runs = todo
        self._before = {step.node.fingerprint: _begun(step) for run in todo for step in run.steps}
        told = [{**_named(run), "state": run.status()["state"], "to_do": run.name in names} for run in runs]
        self.tell("planned", slots=max_parallel, runs=told)

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Tells of a Ctrl-C that comes before there is anything to compare."""
        try:
            yield
        except KeyboardInterrupt:
            self.tell("interrupted")
            raise

    def compared(self, finished: Finished) -> None:
        """What `report --json` says of the study, and before it, whether it was interrupted."""
        if finished.interrupted:
            self.tell("interrupted")
        study = finished.plan.ablation.study.study
        registered = registration_of(finished.folder)
        analysis = registered.as_json() if registered is not None else None
        found = finished.comparison.as_json()
        self.tell("compared", study=study, **found, analysis=analysis, left_out=left_out(finished.runs))

    def poll(self) -> None:
        if time.monotonic() - self._looked >= EVERY / 4:
            self._look()

    def finished(self) -> None:
        self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        for run in self._runs:
            for step in run.steps:
                if self._told.get((run.name, step.node.fingerprint)) != "finished":
                    self._tell_of(run, step)

    def _tell_of(self, run: Run, step: Step) -> None:
        key, status = (run.name, step.node.fingerprint), step.status()
        state = status["state"]
        if state == "pending" or self._before.get(step.node.fingerprint) == _begun(step):
            return
        now = standing(run, step)
        about = {**_named(run), **_stage(step), "state": state}
        if key not in self._told:
            self.tell("started", **about | {"state": "running"}, steps=now.steps)
            self._told[key] = "started"
        if state in ENDED:
            self._told[key] = "finished"
            metrics = {"metrics": status.get("metrics") or now.metrics, "error": status.get("error")}
            metrics["notes"] = status.get("notes", [])
            log = str(step.stage.log_file) if step.stage.log_file.exists() else None
            self.tell("finished", **about, **_numbers(now) | {"seconds_left": None}, **metrics, log=log)
        elif now.step and self._is_due(run.name, now.step + (now.evaluated or 0.0)):
            self.tell("progress", **about, **_numbers(now))

    def _is_due(self, name: str, step: float) -> bool:
        """Whether there is news of it, and the last was told long enough ago."""
        told, when = self._steps.get(name, (-1, -EVERY))
        due = step != told and time.monotonic() - when >= EVERY
        if due:
            self._steps[name] = step, time.monotonic()
        return due


def _begun(step: Step) -> object:
    """What tells one attempt at a stage from another."""
    status = step.status()
    return status["state"], status.get("time"), status.get("started")


def _named(run: Run) -> dict[str, object]:
    return {"run": run.name, "arm": run.arm.name, "seed": run.seed}


def _stage(step: Step) -> dict[str, object]:
    """The same keys as those of `status --json`."""
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
    """Tells of trials, and then of the runs of the winners."""

    def __init__(self, stream: IO[str], console: Console, search: Search, store: Store) -> None:
        super().__init__(stream, console)
        self.search, self.store = search, store
        self._training: dict[str, tuple[Trial, int]] = {}
        """Trials with their numbers of steps."""

    def searching(self, search: Search, trials: Sequence[Trial], max_parallel: int) -> None:
        arms = dict.fromkeys(search.spaces, search.sweep.trials)
        there = [trial_json(search, trial) for trial in trials if trial.state != "running"]
        self.tell("planned", sweep=search.name, slots=max_parallel, trials=arms, there=there)

    def began(self, trial: Trial) -> None:
        steps = self.search.experiment(trial.arm, trial.point).pretrain.training.max_steps
        self._training[trial.name] = trial, steps
        self.tell("started", **self._trial(trial), steps=steps)

    def ended(self, trial: Trial) -> None:
        self._training.pop(trial.name, None)
        self.tell("finished", **self._trial(trial))

    def comparing(self, study: Path) -> None:
        self.tell("comparing", file=str(study))

    def searched(self, ended: Searched) -> None:
        """The comparison of the winners, if there is one, and then what `report --json` says of the sweep."""
        if ended.winners is not None:
            self.compared(ended.winners)
        if ended.interrupted:
            self.tell("interrupted")
        self.tell("searched", **sweep_json(ended.search, ended.summaries))

    def _trial(self, trial: Trial) -> dict[str, object]:
        return {"trial": trial.name, **trial_json(self.search, trial)}

    def _look(self) -> None:
        super()._look()
        for trial, steps in self._training.values():
            now = progress_of_trial(trial, steps, self.store)
            if now.step and self._is_due(trial.name, now.step):
                self.tell("progress", **self._trial(trial), **_numbers(now))
