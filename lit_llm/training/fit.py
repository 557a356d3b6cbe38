"""Train one stage: from a model and batches to weights, metrics on disk and a result."""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from lit_llm.config.metrics import TRAIN_LOSS
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.batches import Batches, StepSampler
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch
from lit_llm.store.store import MetricsFile
from lit_llm.training.additions import TrainerAdditions, ValidationHooks
from lit_llm.training.checkpoints import Checkpoints, newest_checkpoint
from lit_llm.training.compiled_blocks import use_kernels
from lit_llm.training.config import ExecutionConfig, TrainingConfig
from lit_llm.training.devices import DeviceGroup, Sharded, lightning_strategy, stops_by_first
from lit_llm.training.heap import keep_freed_memory
from lit_llm.training.module import Diverged, LitModel, WarmStart
from lit_llm.training.schedules import evaluation_steps
from lit_llm.training.stability import Stability
from lit_llm.training.throughput import StepCost, Throughput

Evaluate = Callable[[LanguageModel], dict[str, float]]
"""Evaluates a model, which is in evaluation mode without gradients, during training. Returns metrics by name."""
ShouldPrune = Callable[[int, dict[str, float]], bool]
"""Called with (steps, metrics) after an evaluation, except the last; returns whether to prune the run."""


@dataclass
class TrainResult:
    """Result of a training."""

    state: Literal["done", "diverged", "interrupted"]
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each metric."""
    error: str | None = None
    loss_tokens: int = 0
    """Number of target tokens in the loss."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in training steps and in evaluations."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The trained weights in float32, once done; on rank 0 alone where devices share the model."""
    stopped_by: str | None = None
    """The user's callback that ended the training before max_steps; its state is done."""


def fit(
    model: LanguageModel,
    training: TrainingConfig,
    batches: Batches,
    *,
    step_cost: StepCost,
    evaluate: Evaluate,
    evaluate_times: int,
    metrics_file: Path,
    checkpoints: Path,
    should_stop: Callable[[], bool] = lambda: False,
    should_prune: ShouldPrune | None = None,
    warm_start: WarmStart | None = None,
    lengths_vary: bool = True,
    final: Evaluate | None = None,
    log: Callable[[str], None] = print,
    check_claim: Callable[[], None] = lambda: None,
    group: DeviceGroup = DeviceGroup(),
    trunk: Callable[[], Path | None] = lambda: None,
    branches: bool = False,
    additions: TrainerAdditions = TrainerAdditions(),
) -> TrainResult:
    """Train to max_steps, from the newest undamaged checkpoint if there is one.

    evaluate_times: number of evaluations, evenly spaced, the last one after the last step. final: the last evaluation,
    where it differs from those before. lengths_vary: whether batches differ in their numbers of tokens, for compiled
    kernels. `should_stop` is called after every step, `should_prune` after every evaluation;
    when one returns True, a checkpoint is written and training ends as interrupted. `log` gets a message about a
    damaged checkpoint. `check_claim` is called before each checkpoint and raises to end a late holder. group: the
    processes that train the model together; all call this function with equal models and batches, only rank 0 writes
    files, and its `should_stop` and `should_prune` decide. additions: the user's callbacks, loggers and so on; a
    training that a callback ends is done at that step. trunk: called on rank 0 where there is no checkpoint; returns
    that of another training to go on from, if any. branches: other trainings go on from the end of this one, so it
    keeps its last checkpoint, and its last step gets no line of its own. Raises InputError for kernels or devices that
    this machine lacks.
    """
    execution = training.execution
    accelerator = accelerator_of(execution.accelerator)
    _check_devices(execution, accelerator)
    # Lightning does not change the mode, and a loaded model is in evaluation mode, without dropout.
    lit = LitModel(model.train(), training, batches.seed, warm_start)
    use_kernels(model, execution.kernels, accelerator == "cuda", lengths_vary)
    stability, throughput = (
        Stability(training.stability),
        Throughput(step_cost, training.precision, group.ranks),
    )
    metrics_logger = MetricsLogger(
        training,
        step_cost,
        (evaluate, final or evaluate),
        evaluate_times,
        metrics_file,
        stability,
        throughput,
        ends=not branches,
    )
    metrics_logger.validation_hooks = ValidationHooks(additions.callbacks)
    pruning = PruningCallback(metrics_logger, training, should_prune)
    checkpoint_writer = Checkpoints(
        checkpoints, training, lambda: pruning.pruned or should_stop(), check_claim, at_end=branches
    )
    with _silence_lightning(additions.empty), group.connected(accelerator):
        # Rank 0 alone looks, since it removes damaged ones.
        resume = group.from_first((newest_checkpoint(checkpoints, log) or trunk()) if group.rank == 0 else None)
        options = {**lit.trainer_options, **group.trainer_options(execution, lightning_strategy(execution))}
        trainer = L.Trainer(
            accelerator=accelerator,
            callbacks=[
                stability,
                throughput,  # after `stability`, whose logit measurements do not count in a step's time
                metrics_logger,
                pruning,
                *([*additions.callbacks, EarlyEnd(metrics_logger, checkpoint_writer)] if additions.callbacks else []),
                checkpoint_writer,
                *[_OwnSignals()] * (group.ranks > 1),
            ],  # in this order: measure, write, prune, checkpoint
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **additions.added_to(options),
        )
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        try:
            trainer.fit(lit, train_loader(batches, training, trainer, branches), ckpt_path=resume)
        except Diverged as error:
            metrics_logger.write(trainer, lit)
            return metrics_logger.ended("diverged", trainer, str(error))
        except SIGTERMException:
            pass  # Lightning raises it at the end of the batch after which `should_stop` was True
        finally:
            metrics_logger.close()
        if trainer.global_step < training.max_steps and not metrics_logger.stopped_by:
            reason = f"pruned at step {trainer.global_step}" if pruning.pruned else "it was asked to stop"
            return metrics_logger.ended("interrupted", trainer, reason)
        result = metrics_logger.ended("done", trainer)
        result.stopped_by = metrics_logger.stopped_by or None
        weights = lit.trained_model().state_dict()
        result.weights = trainer.strategy.gathered(weights) if isinstance(trainer.strategy, Sharded) else weights
    return result


def train_loader(
    batches: Batches, training: TrainingConfig, trainer: L.Trainer, branches: bool = False
) -> DataLoader[Batch]:
    """Loader of a rank's shares of the batches, from the step that the trainer has reached.

    branches: end one batch later. Lightning's checkpoints record that the last batch was read, and a training that goes
    on from such a checkpoint would end at once.
    """
    batches.rank, batches.ranks = trainer.global_rank, trainer.world_size
    return DataLoader(
        batches,
        batch_size=None,
        sampler=StepSampler(training.max_steps + branches, lambda: trainer.global_step),
        num_workers=training.execution.workers,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )


def _check_devices(execution: ExecutionConfig, accelerator: str) -> None:
    if accelerator == "cuda" and (available := torch.cuda.device_count()) < execution.devices:
        message = f"{execution.devices} devices, but torch sees {available} here; give the run more, or set it to fewer"
        raise InputError(Problem(message, "training.execution.devices"))


class _OwnSignals(L.Callback):
    """Keeps the signal handlers of the process while several ranks train.

    Lightning's handler of SIGTERM communicates with the other ranks, in the middle of whatever they communicate.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


def accelerator_of(wanted: str) -> str:
    """Lightning's name of an accelerator. Raises RuntimeError for a GPU that is absent."""
    available = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "gpu" and not available:
        raise RuntimeError(
            "accelerator: gpu, but torch sees no CUDA device here; `accelerator: auto` takes what there is"
        )
    return "cuda" if available else "cpu"


class MetricsLogger(L.Callback):
    """Writes metrics.jsonl: training, stability, throughput every `log_every` steps, evaluations when they are due."""

    def __init__(
        self,
        training: TrainingConfig,
        step_cost: StepCost,
        evaluations: tuple[Evaluate, Evaluate],
        evaluate_times: int,
        path: Path,
        stability: Stability,
        throughput: Throughput,
        ends: bool = True,
    ) -> None:
        """Make the callback.

        evaluations: during training, and after the last step. ends: write a line for the last step in any case.
        """
        self.training, self.step_cost, self.path = training, step_cost, path
        self.evaluate, self.final = evaluations
        self.stability, self.throughput = stability, throughput
        self.evaluation_steps = evaluation_steps(evaluate_times, training.max_steps)
        self.last_step = training.max_steps if ends else None
        self.loss_sum, self.loss_tokens, self.loss_tokens_total = 0.0, 0, 0
        self.evaluation_seconds = 0.0
        self.last: dict[str, float] = {}
        self.evaluated: dict[str, float] = {}
        """Metrics of the evaluation after this step; empty where there was none."""
        self.lines: list[str] = []
        """Lines written so far. Checkpoints hold them, so a resume does not read the file."""
        self.validation_hooks = ValidationHooks(())
        self.stopped_by = ""
        """The user's callback that made this step the last one; '' for none."""
        self._file: MetricsFile | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._file = MetricsFile(self.path, self.lines)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitModel)
        assert pl_module.report is not None
        report, step = pl_module.report, trainer.global_step
        self.loss_sum += report.loss * report.targets
        self.loss_tokens += report.targets
        self.loss_tokens_total += report.targets
        self.evaluated = {}
        if step in self.evaluation_steps:
            self.validation_hooks.begin(trainer, pl_module)
            self._evaluate(trainer, pl_module, step == self.training.max_steps)
            self.validation_hooks.end(trainer, pl_module, self.evaluated)
        last = step == self.last_step
        due = self.evaluated or step % self.training.execution.log_every == 0 or last
        if due and (last or not trainer.should_stop):  # `end_here` writes the step at which a callback ends
            self.write(trainer, pl_module, self.evaluated)
        if self.stability.lost:
            raise Diverged(self.stability.lost)

    def _evaluate(self, trainer: L.Trainer, lit: LitModel, last: bool) -> None:
        """Evaluate. last: the weights that are saved, by the final evaluation."""
        began = time.perf_counter()
        evaluate = self.final if last else self.evaluate
        with nullcontext(lit.trained_model()) if last else lit.averaged() as model:
            model.eval()
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self.evaluated = evaluate(model)
            model.train()
        self.evaluation_seconds += time.perf_counter() - began

    def end_here(self, trainer: L.Trainer, lit: LitModel) -> None:
        """Make this step the last one, as a callback of the user's wants."""
        self.stopped_by = self.validation_hooks.stopped_by or self.validation_hooks.names
        self._evaluate(trainer, lit, last=True)
        self.write(trainer, lit, self.evaluated)

    def write(self, trainer: L.Trainer, lit: LitModel, evaluated: dict[str, float] | None = None) -> None:
        """Write one line. Its training loss is the mean over the target tokens since the last line."""
        report, step = lit.report, trainer.global_step
        if report is None:
            return
        batches = self.step_cost.batches(step)
        line = {
            **report.metrics(),
            TRAIN_LOSS.name: self.loss_sum / self.loss_tokens if self.loss_tokens else report.loss,
            **self.stability.metrics(),
            **self.throughput.metrics(lit.device),
            "tokens_seen": float(self.step_cost.tokens_before + batches * self.step_cost.tokens),
            "flops": self.step_cost.flops_before + self.step_cost.whole_steps(step) * self.step_cost.flops,
            **(evaluated or {}),
        }
        self.loss_sum, self.loss_tokens = 0.0, 0
        self.last |= line
        if self._file is not None:
            self.lines.append(self._file.append(step, line))
        for logger in trainer.loggers:
            logger.log_metrics(line, step)

    def ended(
        self, state: Literal["done", "diverged", "interrupted"], trainer: L.Trainer, error: str = ""
    ) -> TrainResult:
        seconds = {"training": self.throughput.seconds, "evaluation": self.evaluation_seconds}
        return TrainResult(state, trainer.global_step, self.last, error or None, self.loss_tokens_total, seconds)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def state_dict(self) -> dict[str, Any]:
        names = ("loss_sum", "loss_tokens", "loss_tokens_total", "evaluation_seconds", "last", "lines")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


class PruningCallback(L.Callback):
    """Asks on rank 0, after an evaluation, whether to prune the run."""

    def __init__(
        self, metrics_logger: MetricsLogger, training: TrainingConfig, should_prune: ShouldPrune | None
    ) -> None:
        self.metrics_logger, self.last_step, self.should_prune = metrics_logger, training.max_steps, should_prune
        self.pruned = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, metrics = trainer.global_step, self.metrics_logger.evaluated
        if not metrics or step >= self.last_step:
            return
        prune = trainer.is_global_zero and self.should_prune is not None and self.should_prune(step, metrics)
        self.pruned = stops_by_first(trainer, prune)


class EarlyEnd(L.Callback):
    """Ends a training whose `should_stop` a callback of the user's has set: it is done, and not interrupted."""

    def __init__(self, metrics_logger: MetricsLogger, checkpoint_writer: Checkpoints) -> None:
        self.metrics_logger, self.checkpoint_writer = metrics_logger, checkpoint_writer

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        trainer.should_stop = stops_by_first(trainer, trainer.should_stop)
        if trainer.should_stop and trainer.global_step < self.checkpoint_writer.last_step:
            assert isinstance(pl_module, LitModel)
            self.checkpoint_writer.last_step = trainer.global_step
            self.metrics_logger.end_here(trainer, pl_module)


@contextmanager
def _silence_lightning(messages: bool) -> Iterator[None]:
    """Silence Lightning's notices about intended settings: no logger, no epochs, few workers. messages: all others."""
    names = ("lightning.pytorch", "lightning.fabric") if messages else ()
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
