"""The training of a stage: from initial weights and data to trained weights and a result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lit_llm.evaluation.final import FinalEvaluation
from lit_llm.evaluation.result import Progress
from lit_llm.evaluation.unit_losses import write_losses
from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.training_sections import FinetuneConfig, PretrainConfig
from lit_llm.models.families import LanguageModel
from lit_llm.runs.kernels import kernels_note, lengths_vary, training_of
from lit_llm.runs.provenance import provenance, same_provenance
from lit_llm.runs.ranks import LostRank, started_ranks
from lit_llm.runs.stage_config import StageConfig
from lit_llm.runs.stage_data import StageData
from lit_llm.runs.trained_model import end_of_trunk, write_weights
from lit_llm.runs.trainer_parts import in_force
from lit_llm.store.files import Damaged, remove
from lit_llm.store.store import SCHEMA, Stage, finite, read_json, write_json, write_text
from lit_llm.training.config import ExecutionConfig, TrainingConfig
from lit_llm.training.devices import DeviceGroup
from lit_llm.training.fit import ShouldPrune, TrainResult, accelerator_of, fit
from lit_llm.training.module import WarmStart
from lit_llm.training.throughput import StepCost

ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Control:
    """Requests that end a stage before its last step."""

    should_stop: ShouldStop = lambda: False
    should_prune: ShouldPrune | None = None
    follows: tuple[DeviceGroup, ExecutionConfig] | None = None
    """The group of a process that only helps another one, rank 0: it writes nothing, and rank 0 decides; with rank 0's
    execution settings."""

    def report_progress(self, stage: Stage) -> Progress:
        """A callback that writes the stage's progress file, at most twice a second."""
        if self.follows is not None:
            return lambda done, total: None
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                write_text(stage.progress_file, json.dumps({"done": done, "total": total}))

        return report


@dataclass(frozen=True)
class Start:
    """Model and weights that a training begins with."""

    model: LanguageModel
    weights: str | None = None
    """Digest of the initial weights; None for random ones."""
    warm_start: WarmStart | None = None
    trunk: Stage | None = None
    """The stage whose last checkpoint the training goes on from."""


@dataclass(frozen=True)
class StageTraining:
    """Everything that the training of one stage needs; `run` trains."""

    frozen: StageConfig
    stage: Stage
    start: Start
    data: StageData
    step_cost: StepCost
    control: Control

    def run(self) -> dict[str, Any]:
        """Train. Returns the result for result.json, which is empty in a process that only helps rank 0."""
        started = time.time()
        final = FinalEvaluation(self.data.held_out_splits, self.data.measure, self.control.report_progress(self.stage))
        train = self._fit_with(final)
        if self.control.follows is not None:
            train(group=self.control.follows[0])
            return {}
        origin = provenance(self.frozen.experiment, self.frozen.after, weights=self.start.weights)
        self._prepare_folder(origin)
        initial, fitted = self._train(train)
        if fitted.stopped_by:
            self._note_early_end(fitted)
        digest = self._write(fitted, final) if fitted.state == "done" else None
        return {
            "schema": SCHEMA,
            "stage": self.frozen.kind,
            "state": fitted.state,
            "error": fitted.error,
            "stopped_by": fitted.stopped_by,
            "steps": fitted.steps,
            "metrics": fitted.metrics,
            "initial": initial,
            "weights": digest,
            "tokens": round(self.step_cost.batches(fitted.steps) * self.step_cost.tokens),
            "loss_tokens": fitted.loss_tokens,
            "flops": self.step_cost.whole_steps(fitted.steps) * self.step_cost.flops,
            "parameters": cost_of(self.frozen.experiment).parameters,
            "seconds": fitted.seconds,
            "started": started,
            "finished": time.time(),
            "provenance": origin,
        }

    @property
    def _section(self) -> PretrainConfig | FinetuneConfig:
        return self.frozen.experiment.section(self.frozen.after)

    @cached_property
    def _settings(self) -> TrainingConfig:
        """The training section, with kernels and devices as they are in this process."""
        if self.control.follows is not None:
            return self._section.training.model_copy(update={"execution": self.control.follows[1]})
        return training_of(self.frozen.experiment, self.frozen.after)

    @property
    def _branches(self) -> bool:
        """True for a trunk, which other trainings go on from."""
        return self.frozen.kind == "trunk"

    def _fit_with(self, final: FinalEvaluation) -> Callable[..., TrainResult]:
        """`fit`, with all arguments but those of the process that decides."""
        experiment, trunk = self.frozen.experiment, self.start.trunk
        additions = in_force().build(self.stage.folder / "lightning")
        for logger in additions.loggers:
            logger.log_hyperparams(experiment.model_dump(mode="json"))
        return partial(
            fit,
            self.start.model,
            self._settings,
            self.data.batches,
            step_cost=self.step_cost,
            evaluate=self.data.evaluate,
            final=final,
            evaluate_times=0 if self._branches else self._section.validation.times,
            metrics_file=self.stage.metrics_file,
            checkpoints=self.stage.checkpoints,
            trunk=lambda: None if trunk is None else end_of_trunk(trunk),
            branches=self._branches,
            warm_start=self.start.warm_start,
            lengths_vary=lengths_vary(experiment, self.frozen.after),
            additions=additions,
        )

    def _prepare_folder(self, origin: dict[str, Any]) -> None:
        """Remove what an earlier attempt has left and this one cannot go on from."""
        stage = self.stage
        discard_other_provenance(
            origin, stage.checkpoints / "provenance.json", [stage.checkpoints, stage.metrics_file], stage.note
        )
        if note := kernels_note(self.frozen.experiment, self.frozen.after):
            stage.note(note)
        stage.progress_file.unlink(missing_ok=True)  # left by an attempt that stopped in its last evaluation

    def _train(self, train: Callable[..., TrainResult]) -> tuple[dict[str, float | None], TrainResult]:
        """Train on all ranks. Returns (metrics before the first step, the end of the training)."""
        initial, began, before = dict[str, float | None](), time.perf_counter(), 0.0
        try:
            with started_ranks(self.stage, self._settings.execution) as group:
                initial = self._initial_metrics()
                before = time.perf_counter() - began
                fitted = train(
                    should_stop=self.control.should_stop,
                    should_prune=self.control.should_prune,
                    log=self.stage.note,
                    check_claim=self.stage.check_claim,
                    group=group,
                )
        except LostRank as lost:
            fitted = TrainResult("interrupted", 0, error=str(lost), seconds={"training": 0.0, "evaluation": 0.0})
        seconds = {**fitted.seconds, "evaluation": fitted.seconds["evaluation"] + before}
        return initial, replace(fitted, seconds=seconds)

    def _initial_metrics(self) -> dict[str, float | None]:
        """Metrics before the first step, computed like the later ones; kept over resumes."""
        trunk, stage, model = self.start.trunk, self.stage, self.start.model
        if trunk is not None:  # measured before its first step, by the same windows
            return (trunk.result() or {}).get("initial", {})
        kept = stage.checkpoints / "initial.json"
        try:
            if (initial := read_json(kept)) is not None:
                return initial
        except Damaged as damage:
            stage.note(f"{damage}; it is measured again")
            remove(kept)
        training = self._section.training
        device = torch.device(accelerator_of(training.execution.accelerator))
        model.to(device).eval()
        # As after training: only `bf16` evaluates in low precision.
        low = training.precision == "bf16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            measured: dict[str, float | None] = finite(self.data.evaluate(model))
        model.train()
        write_json(kept, measured, signed=True)
        return measured

    def _note_early_end(self, fitted: TrainResult) -> None:
        """Note that a callback ended the training. Raises RuntimeError for a trunk, whose branches begin at its end."""
        steps = f"at step {fitted.steps} of {self._settings.max_steps}"
        if self._branches:
            message = f"{fitted.stopped_by} ended the trunk {steps}, before its end"
            raise RuntimeError(f"{message}, where branches begin; leave out the callback, or `schedule.branch_at`")
        averaging = self._settings.weight_averaging
        lacks = "" if averaging is None else averaging.shortfall(fitted.steps, self._settings.max_steps)
        ended = f"{fitted.stopped_by} ended it {steps}"
        self.stage.note(f"{ended}; {lacks}" if lacks else ended)

    def _write(self, fitted: TrainResult, final: FinalEvaluation) -> str:
        """Write the weights and the losses of documents. Returns the digest of the weights."""
        digest = write_weights(self.stage, fitted.weights)
        if not self._branches:
            write_losses(self.stage.losses_file, final.losses, self.stage.check_claim)
        return digest


def discard_other_provenance(
    origin: dict[str, Any], note: Path, made: Sequence[Path], log: Callable[[str], None] = print
) -> None:
    """Remove what other code, threads or another device has begun, as a result has one provenance.

    made: files and folders to remove where `note` records another provenance, or is damaged.
    """
    try:
        earlier, why = read_json(note) or {}, ""
    except Damaged as damage:
        earlier, why = {}, str(damage)
    # A run that is restarted with a smaller micro-batch keeps its checkpoint, unless the numbers depend on it.
    if any(path.exists() for path in made) and not same_provenance(earlier, origin):
        if why:
            log(f"{why}; starting over")
        else:
            print("this was begun by other code, threads or another device: starting over")
        for path in made:
            remove(path)
    write_json(note, origin, signed=True)
