"""Progress of stages and time left, for the live table and the lines for programs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lit_llm.config.metrics import TOKENS_PER_SECOND, TRAIN_LOSS
from lit_llm.experiment.cost import Cost, cost_of
from lit_llm.report.tables.plan import flops_of
from lit_llm.runs.time_estimate import makespan
from lit_llm.store.store import FINAL, Stage, Store
from lit_llm.studies.runs import Run, StoredStage
from lit_llm.studies.status import last_lines, max_steps, merged
from lit_llm.sweeps.trial import Trial


@dataclass(frozen=True)
class RunProgress:
    """Progress of a stage."""

    step: int
    """Steps done; of an evaluation, in its own units."""
    steps: int
    """Total of steps; 0 while unknown."""
    metrics: Mapping[str, float | None]
    """Last value of each metric; empty during an evaluation."""
    seconds_left: float | None
    """Time left of this stage alone; None while its pace is unknown."""
    evaluated: float | None = None
    """Share of the evaluation after a training's last step, from 0 to 1; None outside of it."""
    begin: int = 0
    """Steps that its trunk had done before."""

    @property
    def loss(self) -> float | None:
        return self.metrics.get(TRAIN_LOSS.name)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the training steps alone."""
        return self.metrics.get(TOKENS_PER_SECOND.name)

    @property
    def done(self) -> float:
        """Share of the steps after its trunk, from 0 to 1."""
        return max(0, self.step - self.begin) / (self.steps - self.begin) if self.steps else 0.0


def progress_of_stage(run: Run, step: StoredStage) -> RunProgress:
    """Progress of one stage of a run, running or ended."""
    if step.node.kind != "evaluate":
        return _progress_of_training(step.stage, max_steps(run, step.node), step.node.begin)
    progress, state = step.stage.progress() or {"done": 0, "total": 0}, step.status()
    done, total = progress["done"], progress["total"]
    if state["state"] == "done":  # its progress was written a moment before
        return RunProgress(total, total, state["metrics"], 0.0)
    since = time.time() - state.get("time", time.time())
    left = since / done * (total - done) if done else None
    return RunProgress(done, total, {}, left)


def progress_of_trial(trial: Trial, steps: int, store: Store) -> RunProgress:
    """Progress of a trial's current run. steps: of each of its runs."""
    begun = [stage for stage in map(store.stage, trial.fingerprints) if stage.metrics_file.exists()]
    return _progress_of_training(begun[-1], steps) if begun else RunProgress(0, steps, {}, None)


def _progress_of_training(stage: Stage, steps: int, begin: int = 0) -> RunProgress:
    lines = last_lines(stage)
    step, metrics = merged(lines)
    pace = seconds_per_step(lines, stage.status().get("time", 0.0))
    if step < steps and (evaluation := stage.progress()) is not None:
        return RunProgress(step, steps, metrics, None, evaluation["done"] / evaluation["total"], begin)
    return RunProgress(step, steps, metrics, None if pace is None else (steps - step) * pace, begin=begin)


def seconds_per_step(lines: Sequence[Mapping[str, Any]], since: float) -> float | None:
    """Wall-clock seconds per step, validations and checkpoints included, by the lines written `since` a time.

    With one line, by the speed of its training steps alone; None without a line.
    """
    recent = [line for line in lines if line["time"] >= since]
    if not recent:
        return None
    first, last = recent[0], recent[-1]
    if last["step"] > first["step"]:
        return float((last["time"] - first["time"]) / (last["step"] - first["step"]))
    rate, read = (last["metrics"].get(name) for name in (TOKENS_PER_SECOND.name, "tokens_seen"))
    return read / last["step"] / rate if rate and read else None


class TimeLeft:
    """Time left of a study, by the time of its finished stages: trainings by FLOPs, evaluations by kind."""

    def __init__(self, max_parallel: int) -> None:
        self.max_parallel = max_parallel
        self._costs: dict[str, Cost] = {}
        """{arm: cost}, which is the same for all seeds."""

    def seconds(self, runs: Sequence[Run]) -> float | None:
        """Seconds until the last of these runs has ended; None while the speed is unknown."""
        running: list[float | None] = []
        waiting: list[tuple[StoredStage, float]] = []
        flops = seconds = 0.0
        evaluations: dict[str, list[float]] = {}
        for run, step, state in _stages(runs):
            takes = self._flops(run, step)
            if state in FINAL:
                result = step.stage.result() or {}
                took = sum((result.get("seconds") or {}).values())
                if step.node.kind == "evaluate":
                    evaluations.setdefault(step.node.name, []).append(took)
                elif result.get("flops"):
                    flops, seconds = flops + result["flops"], seconds + took
            elif state == "running":
                now = progress_of_stage(run, step)
                running.append(now.seconds_left)
                if now.seconds_left is not None and 0 < now.done < 1:
                    flops, seconds = flops + takes * now.done, seconds + now.seconds_left * now.done / (1 - now.done)
            else:
                waiting.append((step, takes))
        if not flops:
            return None
        estimates = [left for left in running if left is not None]
        lefts = [fmean(estimates) if left is None and estimates else left or 0.0 for left in running]
        for step, takes in waiting:
            same_kind = evaluations.get(step.node.name)
            lefts.append(fmean(same_kind) if same_kind else takes * seconds / flops)
        return makespan(lefts, self.max_parallel)

    def _flops(self, run: Run, step: StoredStage) -> float:
        if run.arm.name not in self._costs:
            self._costs[run.arm.name] = cost_of(run.experiment)
        return flops_of(step.node, self._costs[run.arm.name])


def _stages(runs: Sequence[Run]) -> list[tuple[Run, StoredStage, str]]:
    """Each stage once, with its state; none after a stage that diverged, failed or ran out of memory."""
    stages: dict[str, tuple[Run, StoredStage, str]] = {}
    for run in runs:
        for step in run.steps:
            state = step.status()["state"]
            stages.setdefault(step.node.fingerprint, (run, step, state))
            if state in ("diverged", "failed", "out_of_memory"):
                break
    return list(stages.values())
