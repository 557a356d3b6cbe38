"""The one LightningModule: any family, any objective; micro-batches are cut inside the step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_llm.components.loss.module import target_loss
from lit_llm.models.transformer import LanguageModel
from lit_llm.objectives.layout import Batch
from lit_llm.training.config import TrainingConfig
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate


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


class LitModel(L.LightningModule):
    """Trains a LanguageModel: sums of losses over target tokens, divided by the count of the whole batch."""

    def __init__(self, model: LanguageModel, training: TrainingConfig) -> None:
        super().__init__()
        # One loader batch is one optimiser step: the number of targets is known before the first backward pass, so
        # a micro-batch with few targets weighs as little as it should, on several devices too.
        self.automatic_optimization = False
        self.model: LanguageModel = model
        self.training_config = training
        self.report: StepReport | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.training_config.optimizer, self.model)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        config, optimizer = self.training_config, self.optimizers()
        assert not isinstance(optimizer, list)
        lr = set_learning_rate(optimizer.param_groups, config.schedule.factor(self.global_step, config.max_steps))

        counted = self._over_devices(batch.weights.sum())
        total = torch.zeros((), device=self.device)
        pieces = list(batch.pieces(config.execution.micro_batch_size or len(batch)))
        for number, piece in enumerate(pieces):
            with self._without_sync() if number < len(pieces) - 1 else nullcontext():
                hidden_BTD = self.model.hidden(**piece.inputs)
                nats, squares = target_loss(
                    hidden_BTD, self.model.unembedding_VD, piece.targets, piece.weights, config.z_loss > 0
                )
                # Devices average their gradients; the sum is wanted, hence their number.
                loss = (nats + config.z_loss * squares) / counted * self.trainer.world_size
                self.manual_backward(loss)
            total += nats.detach()

        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
        # The step's only wait for the device.
        nats_sum, targets, grad_norm = torch.stack([self._over_devices(total), counted, norm.detach()]).tolist()
        self.report = StepReport(nats_sum / targets, grad_norm, lr, int(targets))
        if not math.isfinite(self.report.loss) or not math.isfinite(self.report.grad_norm):
            what = "loss" if not math.isfinite(self.report.loss) else "gradient"
            raise Diverged(f"the {what} is not finite in step {self.global_step + 1}")
        optimizer.step()
        optimizer.zero_grad()

    def _over_devices(self, numbers: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return numbers
        gathered = self.all_gather(numbers)
        assert isinstance(gathered, Tensor)
        return gathered.sum(0)

    def _without_sync(self) -> Any:
        wrapped: Any = self.trainer.strategy.model
        return wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext()
