"""The one LightningModule: any family, any objective; micro-batches are cut inside the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_llm.components.loss.module import distilled_loss, target_loss
from lit_llm.models.build import generator
from lit_llm.models.families import DecoderOnly, LanguageModel
from lit_llm.models.stacks import Stack
from lit_llm.objectives.collate import Batch, causal_text
from lit_llm.training.config import DistillConfig, TrainingConfig
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from lit_llm.training.optimizers.master_weights import MasterWeights, masters_of


class Diverged(Exception):
    """The loss or the gradient is lost; a result of the run, not a fault of it."""


@dataclass
class StepReport:
    """What one optimiser step was."""

    loss: float
    """Nats per target token, over all devices."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    targets: int
    """Target tokens, over all devices."""
    divergence: float | None = None
    """From the teacher, in nats per target token; None without one."""


@dataclass(frozen=True)
class WarmStart:
    """What training does with what a model has taken over from others."""

    newly_initialised: frozenset[str] = frozenset()
    """Names of the parameters that were taken from nowhere."""
    warmup_steps: int = 0
    """First steps, which train those alone."""
    teacher: DecoderOnly | None = None
    """In evaluation mode; its distribution is learned from where `distill` says so."""
    distill: DistillConfig | None = None


class LitModel(L.LightningModule):
    """Trains a LanguageModel: sums of losses over target tokens, divided by the count of the whole batch.

    The seed is dropout's; a model comes without it and gets that of the stage here.
    """

    def __init__(
        self, model: LanguageModel, training: TrainingConfig, seed: int = 0, warm_start: WarmStart | None = None
    ) -> None:
        super().__init__()
        # One loader batch is one optimiser step: the number of targets is known before the first backward pass, so
        # a micro-batch with few targets weighs as little as it should, on several devices too.
        self.automatic_optimization = False
        self.model: LanguageModel = model
        self.training_config, self.seed = training, seed
        self.report: StepReport | None = None
        # In a tuple, so that the teacher is no part of this module, whose checkpoints it would double.
        self._warm_start, self._frozen = (warm_start or WarmStart(),), False
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = training.dropout
            elif isinstance(module, Stack):
                module.recompute = training.execution.activation_checkpointing
        # In a tuple, so that they are no part of this module: neither wrapped nor saved twice.
        self._masters = (masters_of(model),) if training.precision == "bf16_master" else ()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.training_config.optimizer
        if not self._masters:
            return build_optimizer(config, self.model)
        masters = self._masters[0].to(self.device)
        return MasterWeights(self.model, masters, build_optimizer(config, masters))

    def restore_masters(self) -> None:
        """Make the float32 masters, where there are any, the model's weights."""
        for masters in self._masters:
            self.model.float().load_state_dict(masters.state_dict())

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        config, optimizer = self.training_config, self.optimizers()
        assert not isinstance(optimizer, list)
        lr = set_learning_rate(optimizer.param_groups, config.schedule.factor(self.global_step, config.max_steps))

        self._thaw()
        counted = self._over_devices(batch.weights.sum())
        total, divergence = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        micro_batches = list(batch.micro_batches(config.execution.micro_batch_size or len(batch)))
        for number, piece in enumerate(micro_batches):
            with self._without_sync() if number < len(micro_batches) - 1 else nullcontext():
                with self._dropout(number):
                    hidden_BTD = self.model.hidden(**piece.inputs)
                nats, squares, apart = self._losses(hidden_BTD, piece)
                learned = nats if apart is None else self._mixed(nats, apart)
                # Devices average their gradients; the sum is wanted, hence their number.
                loss = (learned + config.z_loss * squares) / counted * self.trainer.world_size
                self.manual_backward(loss)
            total += nats.detach()
            if apart is not None:
                divergence += apart.detach()

        stepped = optimizer.optimizer
        trained = stepped.take_gradients() if isinstance(stepped, MasterWeights) else self.model.parameters()
        parameters = [p for p in trained if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
        # The step's only wait for the device.
        sums = torch.stack([self._over_devices(total), self._over_devices(divergence), counted, norm.detach()])
        nats_sum, apart_sum, targets, grad_norm = sums.tolist()
        taught = apart_sum / targets if self._warm_start[0].distill else None
        self.report = StepReport(nats_sum / targets, grad_norm, lr, int(targets), taught)
        if not math.isfinite(self.report.loss) or not math.isfinite(self.report.grad_norm):
            what = "loss" if not math.isfinite(self.report.loss) else "gradient"
            raise Diverged(f"the {what} is not finite in step {self.global_step + 1}")
        optimizer.step()
        optimizer.zero_grad()

    def _thaw(self) -> None:
        """Let the parameters learn whose time has come: in the first steps of an adaptation only the fresh ones.

        The others get no gradient, so that no optimiser has anything to do with them.
        """
        warm_start = self._warm_start[0]
        if (frozen := self.global_step < warm_start.warmup_steps) != self._frozen:
            self._frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not frozen or name in warm_start.newly_initialised)

    def _losses(self, hidden_BTD: Tensor, piece: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over the targets: nats, squared log-normalisers, the divergence from the teacher if there is one."""
        own, teacher, distill = self.model.unembedding, self._warm_start[0].teacher, self._warm_start[0].distill
        if teacher is None or distill is None:
            z_loss = self.training_config.z_loss > 0
            return *target_loss(hidden_BTD, own, piece.targets, piece.weights, z_loss), None
        with torch.no_grad():
            read, places_BT = causal_text(piece)
            states_BRE = teacher.to(self.device).hidden(**read)
            teacher_BTE = states_BRE.gather(1, places_BT[..., None].expand(-1, -1, states_BRE.shape[-1]))
        return distilled_loss(
            hidden_BTD, own, teacher_BTE, teacher.unembedding, piece.targets, piece.weights, distill.temperature
        )

    def _mixed(self, nats: Tensor, divergence: Tensor) -> Tensor:
        """What is learned from, where there is a teacher."""
        distill = self._warm_start[0].distill
        assert distill is not None
        return (1 - distill.weight) * nats + distill.weight * divergence

    @contextmanager
    def _dropout(self, micro_batch: int) -> Iterator[None]:
        """What is dropped inside depends on (seed, step, micro-batch, rank) only, so that resumes are exact and arms of
        equal shapes are paired."""
        if not self.training_config.dropout:
            yield
            return
        # Dropout draws from the global generators, which are the callers' too: they are given back as they were.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            name = f"dropout/{self.global_step}/{micro_batch}/{self.global_rank}"
            torch.manual_seed(generator(self.seed, name).initial_seed())
            yield

    def _over_devices(self, numbers: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return numbers
        gathered = self.all_gather(numbers)
        assert isinstance(gathered, Tensor)
        return gathered.sum(0)

    def _without_sync(self) -> Any:
        wrapped: Any = self.trainer.strategy.model
        return wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext()
