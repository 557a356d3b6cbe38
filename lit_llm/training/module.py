"""LightningModule for any family and objective; a step splits its batch into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.liger import liger_kernels
from lit_llm.components.loss.module import Losses, LossWeights, Teacher, target_loss
from lit_llm.config.metrics import GRAD_NORM, LEARNING_RATE, LOSSES_AHEAD, TEACHER_DIVERGENCE, TRAIN_LOSS
from lit_llm.models.build import generator
from lit_llm.models.families import DecoderOnly, LanguageModel
from lit_llm.models.stacks import Stack
from lit_llm.objectives.collate import Batch, causal_text
from lit_llm.training.balance import ExpertBalance, ExpertLoad
from lit_llm.training.config import DistillConfig, TrainingConfig
from lit_llm.training.devices import discard_gathered, is_sharded, shard
from lit_llm.training.optimizers.averaged_weights import AveragedWeights
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from lit_llm.training.optimizers.master_weights import MasterWeights, masters_of
from lit_llm.training.optimizers.shards import whole
from lit_llm.training.trainer_checks import check_accumulation, check_precision, check_steps


class Diverged(Exception):
    """The loss or the gradient diverged, which is a result of the run and not an error."""


@dataclass
class StepReport:
    """Loss, gradient norm and learning rate of one optimiser step."""

    loss: float
    """Nats per target token, over all devices."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    targets: int
    """Target tokens, over all devices."""
    divergence: float | None = None
    """Divergence from the teacher, in nats per target token; None without a teacher."""
    losses_ahead: tuple[float, ...] = ()
    """Nats per token of further tokens, the nearest first."""
    expert_load: ExpertLoad | None = None
    """Shares of the experts in the whole batch; None without experts."""

    def metrics(self) -> dict[str, float]:
        """The step's metrics by name."""
        values = {TRAIN_LOSS.name: self.loss, LEARNING_RATE.name: self.lr, GRAD_NORM.name: self.grad_norm}
        values |= {metric.name: nats for metric, nats in zip(LOSSES_AHEAD, self.losses_ahead, strict=False)}
        return values if self.divergence is None else {**values, TEACHER_DIVERGENCE.name: self.divergence}


@dataclass
class _StepSums:
    """Sums that a step reports, of the micro-batches so far on this device."""

    lr: float
    targets: int
    """Target tokens of the whole batch, over all devices."""
    nats: Tensor
    divergence: Tensor
    ahead: Tensor
    """(nats, number of targets) of each further token."""
    choices: Sequence[float] = ()
    """How often each expert was chosen, over all devices; once the step is reported."""


@dataclass(frozen=True)
class WarmStart:
    """Settings of the training of a model with parameters from other models."""

    newly_initialised: frozenset[str] = frozenset()
    """Names of the parameters that were taken from no model."""
    warmup_steps: int = 0
    """Number of first steps that train only the newly initialised parameters."""
    teacher: DecoderOnly | None = None
    """Teacher in evaluation mode, for `distill`."""
    distill: DistillConfig | None = None


class LitModel(L.LightningModule):
    """Trains a LanguageModel: sums of losses over target tokens, divided by the count of the whole batch.

    seed: seed of dropout. Models have no dropout when they are built; the stage's is set here.
    """

    def __init__(
        self, model: LanguageModel, training: TrainingConfig, seed: int = 0, warm_start: WarmStart | None = None
    ) -> None:
        super().__init__()
        self.model: LanguageModel = model
        self.training_config, self.seed = training, seed
        self._experts = ExpertBalance(model)
        self.report: StepReport | None = None
        self._sums: _StepSums | None = None
        # In a tuple, so that the teacher is not a submodule, which checkpoints would save.
        self._warm_start, self._frozen = (warm_start or WarmStart(),), False
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = training.dropout
            elif isinstance(module, Stack):
                module.recompute = training.execution.activation_checkpointing
            elif isinstance(module, DotProduct):
                module.reference = training.execution.kernels == "reference"
                module.dropout = training.attention_dropout
            elif isinstance(module, FeedForward):
                module.dropout = training.feed_forward_dropout
        # In a tuple, so that they are not submodules, which would be wrapped, and saved twice.
        self._masters = (masters_of(model),) if training.precision == "bf16_master" else ()
        self._average: AveragedWeights | None = None

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer on which the numbers of the training depend."""
        config = self.training_config
        return {
            "max_steps": config.max_steps,
            "max_epochs": -1,
            "precision": "bf16-mixed" if config.precision == "bf16" else "32-true",
            "use_distributed_sampler": False,  # each batch has a share for every rank
            # In steps, as the whole training is one epoch: EarlyStopping then reads each validation.
            "val_check_interval": config.max_steps,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": config.execution.log_every,
        }

    def configure_model(self) -> None:
        """Divide the model among the devices where they share it; called once the devices are known."""
        if self.device_mesh is not None and not is_sharded(self.model):
            for model in (self.model, *self._masters):
                shard(model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.training_config
        trained = self._masters[0].to(self.device) if self._masters else self.model
        optimizer = build_optimizer(config.optimizer, trained)
        if config.weight_averaging is not None:
            parameters = list(trained.parameters())
            optimizer = AveragedWeights(parameters, optimizer, config.weight_averaging, config.max_steps)
            self._average = optimizer
        return MasterWeights(self.model, trained, optimizer) if self._masters else optimizer

    @contextmanager
    def averaged(self) -> Iterator[LanguageModel]:
        """The model with the average of its weights inside of this context, once the training has one."""
        if self._average is None or not self._average.begun:
            yield self.model
            return
        try:
            with self._average.in_parameters():
                self._read_parameters()
                yield self.model
        finally:
            self._read_parameters()

    def _read_parameters(self) -> None:
        """Make the model compute with parameters that were set outside of a step."""
        discard_gathered(self.model)
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, MasterWeights):
            optimizer.round()

    def trained_model(self) -> LanguageModel:
        """The model with the weights that are saved at the end, in float32. Training cannot go on after this.

        These are the average, where the training has one.
        """
        if self._average is not None:
            self._average.take()
            discard_gathered(self.model)
        for masters in self._masters:
            for buffer, trained in zip(masters.buffers(), self.model.buffers(), strict=True):
                buffer.copy_(trained)
            if is_sharded(masters):
                return masters
            self.model.float().load_state_dict(masters.state_dict())
        return self.model

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device, non_blocking=True)

    def on_fit_start(self) -> None:
        check_precision(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A test and `load_from_checkpoint` want the weights alone.
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_steps(checkpoint)

    def on_train_start(self) -> None:
        self._set_learning_rate(self.global_step)

    def _set_learning_rate(self, steps: int) -> float:
        """Set the learning rate of the step after this many in the optimiser, where callbacks read it; returns it."""
        config, optimizer = self.training_config, self.optimizers()
        assert not isinstance(optimizer, list)
        return set_learning_rate(optimizer.param_groups, config.schedule.factor(steps, config.max_steps))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the batch's last micro-batch, after the backward passes of those before it.

        Lightning does the rest of the step. A batch is one step: the number of its targets, over all devices, is known
        before the first backward pass, which weights micro-batches by their targets.
        """
        check_accumulation(self.trainer)
        config, lr = self.training_config, self._set_learning_rate(self.global_step)
        self._update_frozen()
        # Filled on the device: a copy from the host would wait for it.
        counted = torch.full((), float(batch.total), device=self.device)
        sums = self._sums = _StepSums(
            lr,
            batch.total,
            torch.zeros((), device=self.device),
            torch.zeros((), device=self.device),
            torch.zeros(2 * self.model.config.output.future_tokens, device=self.device),
        )
        windows = config.execution.micro_batch_size or len(batch)
        *earlier, last = enumerate(batch.micro_batches(windows * batch.rows_of_window))
        # Devices average their gradients; multiplied by their number it is the sum.
        ranks = self.trainer.world_size
        for number, piece in earlier:
            with self._unsynchronised():
                self.trainer.strategy.backward(self._loss(number, piece, sums) / counted * ranks, None)
        return self._loss(*last, sums) / counted * ranks

    def _loss(self, number: int, piece: Batch, sums: _StepSums) -> Tensor:
        """Objective of a micro-batch as a sum over its targets; what the step reports is added to `sums`."""
        with liger_kernels(self._liger):
            self._experts.begin()
            with self._dropout(number):
                hidden_BTD = self.model.hidden(**piece.inputs)
            losses = self._losses(hidden_BTD, piece)
            objective = losses.objective
            if len(sums.ahead):
                objective = objective + self._losses_ahead(piece, sums.ahead)
            if self._experts.layers:
                objective = objective + self._experts.loss(piece)
        sums.nats += losses.nats
        sums.divergence += losses.divergence
        return objective

    @property
    def _liger(self) -> bool:
        return self.training_config.execution.kernels == "liger"

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients in the contexts of the forward pass, which activation checkpointing computes again."""
        with liger_kernels(self._liger), self.trainer.precision_plugin.train_step_context():
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Report the step, and clip its gradient. The Trainer's `gradient_clip_val` takes the place of `clip_norm`."""
        self._drop_frozen_gradients()
        trained = optimizer.take_gradients() if isinstance(optimizer, MasterWeights) else self.model.parameters()
        limit = self.training_config.clip_norm if gradient_clip_val is None else gradient_clip_val
        norm = self._clip(list(trained), limit, by_value=gradient_clip_algorithm == GradClipAlgorithmType.VALUE)
        self.report_step(whole(norm))

    def _clip(self, parameters: Sequence[nn.Parameter], limit: float | None, by_value: bool) -> Tensor:
        """Clip the gradients of parameters. Returns the norm that they had together.

        limit: the largest norm, or with `by_value` the largest entry; none clips nothing.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit and by_value:
            torch.nn.utils.clip_grad_value_(parameters, limit)
        elif limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def report_step(self, norm: Tensor) -> None:
        """Set the step's report. Raises Diverged where its loss or gradient is not finite."""
        sums = self._sums
        assert sums is not None
        # The only wait for the device in a step. All ranks report rank 0's norm, to decide alike.
        choices_n = self._experts.take_choices(self.device)
        numbers = torch.stack([norm.detach(), sums.nats, sums.divergence]), sums.ahead, choices_n
        sums_RN = self._of_all_ranks(torch.cat(numbers))
        grad_norm, nats_sum, divergence_sum, *others = torch.cat([sums_RN[0, :1], sums_RN[:, 1:].sum(0)]).tolist()
        of_ahead, choices = others[: len(sums.ahead)], others[len(sums.ahead) :]
        means_ahead = tuple(nats / max(count, 1) for nats, count in zip(of_ahead[::2], of_ahead[1::2], strict=True))
        targets = sums.targets
        mean_divergence = divergence_sum / targets if self._warm_start[0].distill else None
        load = self._experts.load(choices)
        self.report = StepReport(nats_sum / targets, grad_norm, sums.lr, targets, mean_divergence, means_ahead, load)
        if not math.isfinite(self.report.loss) or not math.isfinite(self.report.grad_norm):
            what = "loss" if not math.isfinite(self.report.loss) else "gradient"
            raise Diverged(f"the {what} is not finite in step {self.global_step + 1}")
        sums.choices = choices

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # now, so that evaluations and the next forward pass have the memory
        self._set_learning_rate(self.global_step + 1)
        assert self._sums is not None
        self._experts.step_biases(self._sums.choices)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients: Lightning calls this when the gradients of earlier micro-batches are already summed."""

    def _update_frozen(self) -> None:
        """Freeze all but the newly initialised parameters in the first steps of an adaptation; unfreeze them after.

        Frozen parameters get no gradient, so that no optimiser updates them. Several devices agree on the gradients
        that they exchange before the first step, so there all parameters get one, which is dropped.
        """
        frozen = self.trainer.world_size == 1 and self._is_frozen
        if frozen != self._frozen:
            self._frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not frozen or name in self._warm_start[0].newly_initialised)

    @property
    def _is_frozen(self) -> bool:
        """True in the steps that train the newly initialised parameters alone."""
        return self.global_step < self._warm_start[0].warmup_steps

    def _drop_frozen_gradients(self) -> None:
        if self._is_frozen:
            for name, parameter in self.model.named_parameters():
                if name not in self._warm_start[0].newly_initialised:
                    parameter.grad = None

    def _losses(self, hidden_BTD: Tensor, piece: Batch) -> Losses:
        """Sums over the targets of a micro-batch; with a teacher, its divergence has a weight in the objective."""
        warm_start, z_loss = self._warm_start[0], self.training_config.z_loss
        teacher, distill, targets = warm_start.teacher, warm_start.distill, (piece.targets, piece.places)
        if teacher is None or distill is None:
            return target_loss(hidden_BTD, self.model.unembedding, targets, LossWeights(squares=z_loss))
        with torch.no_grad():
            read, places_BT = causal_text(piece)
            states_BRE = teacher.to(self.device).hidden(**read)
            teacher_BTE = states_BRE.gather(1, places_BT[..., None].expand(-1, -1, states_BRE.shape[-1]))
        predictions = Teacher(teacher_BTE, teacher.unembedding, distill.temperature)
        weights = LossWeights(1 - distill.weight, z_loss, distill.weight)
        return target_loss(hidden_BTD, self.model.unembedding, targets, weights, predictions)

    def _losses_ahead(self, piece: Batch, sums: Tensor) -> Tensor:
        """Losses of further tokens. sums: (nats, number of targets) of each so far, to which these are added."""
        objective = torch.zeros((), device=self.device)
        distill = self._warm_start[0].distill
        weights = LossWeights(1.0 if distill is None else 1 - distill.weight, self.training_config.z_loss)
        for number, states_BTD in enumerate(self.model.decoder.take_future_states()):
            targets = piece.ahead(number + 1)
            losses = target_loss(states_BTD, self.model.unembedding, targets, weights)
            objective = objective + losses.objective
            sums[2 * number] += losses.nats
            sums[2 * number + 1] += len(targets[1])
        return objective

    @contextmanager
    def _dropout(self, micro_batch: int) -> Iterator[None]:
        """Seed dropout by (seed, step, micro-batch, rank), so that resumes are exact and arms of equal shapes are
        paired."""
        if not self.training_config.draws:
            yield
            return
        # Dropout draws from the global generators, whose state is restored for other users.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            name = f"dropout/{self.global_step}/{micro_batch}/{self.global_rank}"
            torch.manual_seed(generator(self.seed, name).initial_seed())
            yield

    def _of_all_ranks(self, numbers_N: Tensor) -> Tensor:
        """N -> R x N: the numbers of every rank."""
        if self.trainer.world_size == 1:
            return numbers_N[None]
        gathered = self.all_gather(numbers_N)
        assert isinstance(gathered, Tensor)
        return gathered

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        """Context of a micro-batch but the last, whose backward pass alone adds up the devices' gradients."""
        wrapped: Any = self.trainer.strategy.model
        sharded = cast(FSDPModule, self.model) if is_sharded(self.model) else None
        if sharded is not None:
            sharded.set_requires_gradient_sync(False)
        try:
            with wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext():
                yield
        finally:
            if sharded is not None:
                sharded.set_requires_gradient_sync(True)
