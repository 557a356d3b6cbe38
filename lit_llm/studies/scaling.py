"""Runs and groups that the scaling laws and the gate of a study use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.statistics.estimates import joined
from lit_llm.statistics.run_results import RunResult, lost_sizes, scaling_runs
from lit_llm.statistics.scaling.comparison import Scaling, scaling
from lit_llm.statistics.scaling.gate import Gate, gate
from lit_llm.studies.load import Ablation
from lit_llm.studies.schema import ScalingGate, ScalingLaw
from lit_llm.training.config import TrainingConfig


@dataclass(frozen=True)
class Measured:
    """A run with the metric, and the training before the measurement."""

    result: RunResult
    training: TrainingConfig
    stage: Mapping[str, Any]
    """result.json of that training."""

    @property
    def name(self) -> str:
        return f"{self.result.arm}/seed {self.result.seed}"

    @property
    def steps(self) -> int:
        """Optimiser steps before the measurement."""
        return int(self.stage.get("steps", self.training.max_steps))


def ended_runs(measured: Sequence[Measured]) -> tuple[list[RunResult], list[str]]:
    """(runs whose learning-rate schedule had ended at the measurement, notes on the refused runs).

    During a decay the loss still falls steeply, and a constant learning rate has no such fall. Neither loss lies on one
    law with complete trainings. Where no run decays, all are comparable.
    """
    stopped = [run for run in measured if run.steps < run.training.max_steps]
    whole = [run for run in measured if run.steps >= run.training.max_steps]
    decaying = [run for run in whole if run.training.schedule.decays]
    constant = [run for run in whole if not run.training.schedule.decays] if decaying else []
    notes = []
    if stopped:
        first = stopped[0]
        schedule, last = first.training.schedule, first.training.max_steps
        factor = schedule.factor(max(0, first.steps - 1), last)
        notes.append(
            f"refused, for their schedules had not ended: {joined([run.name for run in stopped])} ({first.name}: "
            f"measured at step {first.steps} of {last}, with {factor:.0%} of the peak learning rate); train them to "
            "their end, or give each length a schedule of its own"
        )
    if constant:
        kinds = ", ".join(dict.fromkeys(run.training.schedule.kind for run in constant))
        notes.append(
            f"refused, for their learning rate does not decay (schedule {kinds}) and that of other runs does: "
            f"{joined([run.name for run in constant])}; give all runs one kind of schedule"
        )
    kept = decaying or whole
    return [run.result for run in kept], notes


def scaling_of(ablation: Ablation, kept: Sequence[RunResult], settings: ScalingLaw) -> Scaling:
    """The power laws of a study. kept: the runs to fit, and the runs that diverged, of the newest provenance."""
    groups, baseline = _groups(ablation, settings.by)
    metric = ablation.study.compare.metric
    return scaling(
        scaling_runs(kept, metric, groups, {arm.name: arm.group for arm in ablation.arms}),
        metric,
        baseline,
        settings.x,
        settings.irreducible,
        lost=lost_sizes(kept, metric, groups),
    )


def gate_of(ablation: Ablation, kept: Sequence[RunResult], settings: ScalingGate) -> Gate:
    """The gate of a study. kept: as for `scaling_of`."""
    groups, baseline = _groups(ablation, settings.by)
    metric = ablation.study.compare.metric
    runs = scaling_runs(kept, metric, groups, {arm.name: arm.group for arm in ablation.arms})
    lost = lost_sizes(kept, metric, groups)
    return gate(runs, metric, baseline, settings.project, settings.at_least, settings.irreducible, lost=lost)


def _groups(ablation: Ablation, by: Literal["arm", "family"]) -> tuple[dict[str, str], str]:
    """({arm: its group}, the baseline's group)."""
    groups = {arm.name: arm.experiment.model.family if by == "family" else arm.group for arm in ablation.arms}
    baseline = ablation.study.compare.baseline
    first = next(arm for arm in ablation.arms if baseline in (None, arm.group))
    return groups, groups[first.name]
