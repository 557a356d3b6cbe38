"""Where a run stands, and how long the rest takes: what the live table shows, and the lines for machines say."""

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
from lit_llm.studies.runs import Run, Step, last_lines, max_steps, merged
from lit_llm.sweeps.trial import Trial


@dataclass(frozen=True)
class RunProgress:
    """How far a stage is."""

    step: int
    """Of an evaluation: what is done of it, in units of its own."""
    steps: int
    """Of how many; 0 where that is not known yet."""
    metrics: Mapping[str, float | None]
    """The last value of each; none of an evaluation that goes on."""
    seconds_left: float | None
    """Of this stage alone; None before its pace is known."""
    evaluated: float | None = None
    """From 0 to 1, of the evaluation after a training's last step, while that goes on."""

    @property
    def loss(self) -> float | None:
        return self.metrics.get(TRAIN_LOSS.name)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the training steps alone."""
        return self.metrics.get(TOKENS_PER_SECOND.name)

    @property
    def done(self) -> float:
        """From 0 to 1."""
        return self.step / self.steps if self.steps else 0.0


def standing(run: Run, step: Step) -> RunProgress:
    """Of one stage of a run that goes on, or has ended."""
    if step.node.kind != "evaluate":
        return _of_training(step.stage, max_steps(run, step.node))
    told, state = step.stage.progress() or {"done": 0, "total": 0}, step.status()
    if state["state"] == "done":  # the last word of its progress was said a moment before
        return RunProgress(told["total"], told["total"], state["metrics"], 0.0)
    since = time.time() - state.get("time", time.time())
    left = since / told["done"] * (told["total"] - told["done"]) if told["done"] else None
    return RunProgress(told["done"], told["total"], {}, left)


def progress_of_trial(trial: Trial, steps: int, store: Store) -> RunProgress:
    """Of the run that a trial is at. steps: of each of its runs."""
    begun = [stage for stage in map(store.stage, trial.fingerprints) if stage.metrics_file.exists()]
    return _of_training(begun[-1], steps) if begun else RunProgress(0, steps, {}, None)


def _of_training(stage: Stage, steps: int) -> RunProgress:
    lines = last_lines(stage)
    step, metrics = merged(lines)
    pace = seconds_per_step(lines, stage.status().get("time", 0.0))
    if step < steps and (told := stage.progress()) is not None:
        return RunProgress(step, steps, metrics, None, told["done"] / told["total"])
    return RunProgress(step, steps, metrics, None if pace is None else (steps - step) * pace)


def seconds_per_step(lines: Sequence[Mapping[str, Any]], since: float) -> float | None:
    """By the clock, validations and checkpoints included, of the lines that were written `since` the process began;
    where there is but one, by the speed of its training steps alone. None before the first."""
    own = [line for line in lines if line["time"] >= since]
    if not own:
        return None
    first, last = own[0], own[-1]
    if last["step"] > first["step"]:
        return float((last["time"] - first["time"]) / (last["step"] - first["step"]))
    rate, read = (last["metrics"].get(name) for name in (TOKENS_PER_SECOND.name, "tokens_seen"))
    return read / last["step"] / rate if rate and read else None


class TimeLeft:
    """Of a study, by what its stages have taken up to now: trainings by their FLOPs, evaluations by their like."""

    def __init__(self, max_parallel: int) -> None:
        self.max_parallel = max_parallel
        self._costs: dict[str, Cost] = {}
        """By arm: seeds differ in nothing that costs."""

    def seconds(self, runs: Sequence[Run]) -> float | None:
        """Until the last of these runs has ended; None before anything is known."""
        running: list[float | None] = []
        waiting: list[tuple[Step, float]] = []
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
                now = standing(run, step)
                running.append(now.seconds_left)
                if now.seconds_left is not None and 0 < now.done < 1:
                    flops, seconds = flops + takes * now.done, seconds + now.seconds_left * now.done / (1 - now.done)
            else:
                waiting.append((step, takes))
        if not flops:
            return None
        known = [left for left in running if left is not None]
        lefts = [fmean(known) if left is None and known else left or 0.0 for left in running]
        for step, takes in waiting:
            likes = evaluations.get(step.node.name)
            lefts.append(fmean(likes) if likes else takes * seconds / flops)
        return makespan(lefts, self.max_parallel)

    def _flops(self, run: Run, step: Step) -> float:
        if run.arm.name not in self._costs:
            self._costs[run.arm.name] = cost_of(run.experiment)
        return flops_of(step.node, self._costs[run.arm.name])


def _stages(runs: Sequence[Run]) -> list[tuple[Run, Step, str]]:
    """Each stage once, with its state; none that comes after one that has ended otherwise than done."""
    found: dict[str, tuple[Run, Step, str]] = {}
    for run in runs:
        for step in run.steps:
            state = step.status()["state"]
            found.setdefault(step.node.fingerprint, (run, step, state))
            if state in ("diverged", "failed", "out_of_memory"):
                break
    return list(found.values())
