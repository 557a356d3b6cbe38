"""Progress: a live table in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

from lit_llm.evaluation.config import PRIMARY_METRICS, primary_metric
from lit_llm.report import text
from lit_llm.report.progress.notebook import NotebookLive
from lit_llm.report.progress.run_progress import RunProgress, TimeLeft, progress_of_stage, progress_of_trial
from lit_llm.report.tables.plan import STATES
from lit_llm.report.tables.sweep import names_of, setting
from lit_llm.store.store import FINAL, Store
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import Run
from lit_llm.sweeps.confirmation import summary
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import NOT_COUNTED, Trial


class Progressing(Observer):
    """Shows the progress of runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interactive = console.is_terminal
        self._bars: Progress | None = None
        self._live: Live | NotebookLive | None = None
        self._runs: Sequence[Run] = ()
        self._todo: set[str] = set()
        self._printed_states: dict[str, str] = {}
        self._validated: dict[str, float] = {}
        self._preparing = ""
        self._silent: dict[str, float] = {}
        """{run or trial: seconds without progress}, of those that will be stopped without any."""
        self._retries: Counter[str] = Counter()
        """{run or trial: number of retries}."""
        self._left = TimeLeft(1)
        self._began = time.monotonic()
        self._polled_at = 0.0

    def message(self, text: str) -> None:
        self.console.print(text, style="yellow", highlight=False)

    def silent(self, name: str, seconds: float) -> None:
        if not seconds:
            self._silent.pop(name, None)
            return
        if name not in self._silent and not self.interactive:
            self.message(f"{name}: no progress for {text.duration(seconds)}; if that goes on, it is stopped")
        self._silent[name] = seconds

    def places(self, launcher: str, words: str) -> None:
        self.console.print(f"places ({launcher}): {words}", style="dim", highlight=False)

    def restarting(self, name: str) -> None:
        self._retries[name] += 1

    def _name_with_notes(self, name: str) -> str:
        """Name of a run or trial, with its retries and its time without progress."""
        retries = f" (begun again {self._retries[name]}x)" if self._retries[name] else ""
        silent = f" (no progress for {text.duration(self._silent[name])})" if name in self._silent else ""
        return f"{name}{retries}{silent}"

    def preparing(self, what: str, done: int, total: int) -> None:
        if not self.interactive:
            if what != self._preparing:
                self.console.print(f"{what} ...", highlight=False)
            self._preparing = what
            return
        if self._bars is None or what != self._preparing:
            self._stop_bars()
            self._bars = Progress(
                TextColumn(what), BarColumn(), TaskProgressColumn(), console=self.console, transient=True
            )
            self._bars.add_task(what, total=total or None)
            self._bars.start()
        self._preparing = what
        self._bars.update(self._bars.task_ids[0], completed=done, total=total or None)

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        self._stop_bars()
        self._runs, self._todo = runs, {run.name for run in todo}
        self._left = TimeLeft(max_parallel)
        self._began = time.monotonic()
        done = sum(run.status()["state"] in FINAL for run in runs)
        ready = f", {done} are there already" if done else ""
        self.console.print(f"{len(todo)} of {len(runs)} runs to do{ready}; {max_parallel} at once.", highlight=False)
        if todo:
            self._start_live()

    def _start_live(self) -> None:
        if self.console.is_jupyter:
            self._live = NotebookLive(self._view())
        elif self.interactive:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def poll(self) -> None:
        if time.monotonic() - self._polled_at < 0.5:
            return
        self._polled_at = time.monotonic()
        if self._live is not None:
            self._live.update(self._view())
        else:
            self._print_changes()

    def finished(self) -> None:
        self._stop_bars()
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._print_changes()

    def _print_changes(self) -> None:
        for run in self._runs:
            status = run.status()
            state = status["state"]
            if run.name in self._todo and state not in ("pending", self._printed_states.get(run.name)):
                self._printed_states[run.name] = state
                if state == "running":
                    if not self.interactive:
                        self.console.print(f"{run.name}: running", highlight=False)
                    continue
                metrics = status.get("metrics", {})
                ending = "".join(
                    f", {name} {metrics[name]:.3f}" for name in PRIMARY_METRICS if metrics.get(name) is not None
                )
                notes = "; ".join([*([status["error"]] if status.get("error") else []), *status["notes"]])
                error = f": {notes}" if notes else ""
                self.console.print(f"{run.name}: {state}{ending}{error}", style=STATES[state], highlight=False)

    def _primary_metric(self) -> str:
        """Name of the runs' primary metric; two names where families differ in it."""
        return " or ".join(dict.fromkeys(primary_metric(run.arm.experiment.model.family) for run in self._runs))

    def _view(self) -> RenderableType:
        table = _table("run", "step", "loss", self._primary_metric(), "tok/s", "left")
        states: Counter[str] = Counter()
        for run in self._runs:
            at = run.current()
            state = at.status()["state"]
            states[state] += 1
            if run.name in self._todo and state == "running":
                now = progress_of_stage(run, at)
                step, loss, *pace = _cells(now)
                validation = _number(self._last_validation(run.name, now))
                table.add_row(self._name_with_notes(run.name_at(at)), step, loss, validation, *pace)
        seconds = time.monotonic() - self._began
        left = self._left.seconds([run for run in self._runs if run.name in self._todo])
        remaining = "" if left is None else f", about {text.duration(left)} left"
        summary = Text(f"{text.duration(seconds)}{remaining}   ", style="dim")
        for state, number in states.items():
            summary += Text(f"{number} {state}  ", style=STATES[state])
        return Group(table, summary) if table.rows else summary

    def _last_validation(self, name: str, now: RunProgress) -> float | None:
        """Last validation of a run, which may be older than the lines that are read."""
        for metric in PRIMARY_METRICS:
            if (value := now.metrics.get(metric)) is not None:
                self._validated[name] = value
        return self._validated.get(name)


class Searching(Progressing, SweepObserver):
    """Shows the progress of trials, then of the runs of the confirmation study."""

    def __init__(self, console: Console, search: Search, store: Store) -> None:
        super().__init__(console)
        self.search, self.store = search, store
        self._names = names_of(search)
        self._training: dict[str, tuple[Trial, int]] = {}
        """{trial: (trial, steps of a run)} of the running trials."""
        self._ended: dict[str, Trial] = {}
        self._search_goes_on = False

    def searching(self, search: Search, trials: Sequence[Trial], max_parallel: int) -> None:
        self._stop_bars()
        self._began, self._search_goes_on = time.monotonic(), True
        self._ended = {trial.name: trial for trial in trials if trial.state != "running"}
        left = sum(search.sweep.trials - self._counted(arm) for arm in search.spaces)
        arms = f"{len(search.spaces)} arm{'s' if len(search.spaces) > 1 else ''}"
        ready = f", {len(self._ended)} are there already" if self._ended else ""
        message = f"{max(0, left)} of {arms} x {search.sweep.trials} trials to do{ready}; {max_parallel} at once."
        self.console.print(message, highlight=False)
        if left > 0:
            self._start_live()

    def began(self, trial: Trial) -> None:
        experiment = self.search.experiment(trial.arm, trial.point)
        self._training[trial.name] = trial, experiment.pretrain.training.max_steps

    def ended(self, trial: Trial) -> None:
        self._training.pop(trial.name, None)
        self._ended[trial.name] = trial
        if trial.state in NOT_COUNTED or not self.search.trains:
            return
        named = self.search.named(trial.values).items()
        values = "".join(f", {goal} {text.value(value)}" for goal, value in named)
        at = f" after {text.count(trial.tokens)} tokens" if trial.state == "pruned" else ""
        error = f": {trial.error}" if trial.error else ""
        line = f"{trial.name}: {trial.state}{at}{values}   {setting(trial.point, self._names)}{error}"
        self.console.print(line, style=STATES[trial.state], highlight=False)

    def finished(self) -> None:
        super().finished()
        self._search_goes_on = False

    def comparing(self, study: Path) -> None:
        self.console.print("Each arm as it was and at its best, over fresh seeds:", highlight=False)

    def _counted(self, arm: str) -> int:
        return sum(trial.arm == arm and trial.counts for trial in self._ended.values())

    def _view(self) -> RenderableType:
        if not self._search_goes_on:
            return super()._view()
        arms = _table("arm", "trials", "best", "setting")
        trials = _table("trial", "step", "loss", "tok/s", "left", "setting")
        for arm in self.search.spaces:
            so_far = summary(self.search, arm, list(self._ended.values()))
            best = so_far.best.values[0] if so_far.best and so_far.best.values else None
            at = setting(so_far.best.point, self._names) if so_far.best else ""
            arms.add_row(arm, f"{so_far.counted}/{self.search.sweep.trials}", text.value(best), at)
        for trial, steps in self._training.values():
            now = progress_of_trial(trial, steps, self.store)
            trials.add_row(self._name_with_notes(trial.name), *_cells(now), setting(trial.point, self._names))
        seconds = time.monotonic() - self._began
        tables: list[RenderableType] = [Text(), trials] if trials.rows else []
        return Group(arms, *tables, Text(text.duration(seconds), style="dim"))


def _table(*columns: str) -> RichTable:
    """A plain table whose words may fold, and whose numbers may not."""
    table = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        if name in ("run", "arm", "trial", "setting"):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(now: RunProgress) -> list[str]:
    """step, loss, tok/s, left"""
    left = "–" if now.seconds_left is None else text.duration(now.seconds_left)
    step = f"{now.step}/{now.steps}" if now.steps else "–"
    if now.evaluated is not None:
        step = f"evaluating {now.evaluated:.0%}"
    return [step, _number(now.loss), text.short(now.tokens_per_second), left]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
