"""Stability of a run: gradient norm, loss spikes, divergence, the largest attention logit, the experts' shares."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_llm.components.attention.dot_product import DotProduct, largest_logit
from lit_llm.config.metrics import BUSIEST_EXPERT, EXPERT_ENTROPY, LOSS_SPIKES, MAX_ATTENTION_LOGIT, MAX_GRAD_NORM
from lit_llm.objectives.collate import Batch
from lit_llm.training.balance import ExpertLoad
from lit_llm.training.config import StabilityConfig
from lit_llm.training.module import LitModel, StepReport


class Stability(L.Callback):
    """Counts spikes, detects divergence, and measures attention logits every `logit_every` steps."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.window: deque[float] = deque(maxlen=config.spike_window)
        self.spikes = 0
        self.first_loss: float | None = None
        self.lost_steps = 0
        self.max_grad_norm = 0.0
        self.max_logit = 0.0
        self.expert_load: ExpertLoad | None = None
        """Of the last step; None without experts."""
        self.lost: str | None = None
        """Reason why the run has diverged, or None. `MetricsLogger` raises it after writing the step."""

    def metrics(self) -> dict[str, float]:
        """Totals so far, and the experts' shares in the last step, by metric name."""
        out = {LOSS_SPIKES.name: float(self.spikes), MAX_GRAD_NORM.name: self.max_grad_norm}
        if self.config.logit_every:
            out[MAX_ATTENTION_LOGIT.name] = self.max_logit
        if self.expert_load is not None:
            out |= {BUSIEST_EXPERT.name: self.expert_load.busiest, EXPERT_ENTROPY.name: self.expert_load.entropy}
        return out

    def watch(self, report: StepReport) -> None:
        """Update the statistics by one step."""
        config, loss = self.config, report.loss
        self.expert_load = report.expert_load
        self.max_grad_norm = max(self.max_grad_norm, report.grad_norm)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        if len(self.window) == config.spike_window:
            mean, deviation = statistics.fmean(self.window), statistics.stdev(self.window)
            self.spikes += loss > mean + config.spike_deviations * deviation
        self.window.append(loss)
        self.lost_steps = self.lost_steps + 1 if loss > self.first_loss + config.diverged_margin else 0
        if self.lost_steps >= config.diverged_patience:
            self.lost = (
                f"the loss has been more than {config.diverged_margin} nats above its first value "
                f"({self.first_loss:.2f}) for {self.lost_steps} steps"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        every = self.config.logit_every
        if every and trainer.global_step % every == 0:
            assert isinstance(pl_module, LitModel)
            few = next(batch.micro_batches(self.config.logit_sequences))
            self.max_logit = max(self.max_logit, largest_attention_logit(pl_module.model, few))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitModel)
        assert pl_module.report is not None
        self.watch(pl_module.report)

    def state_dict(self) -> dict[str, Any]:
        names = ("spikes", "first_loss", "lost_steps", "max_grad_norm", "max_logit")
        return {"window": list(self.window), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.window.extend(state_dict.pop("window"))
        for name, value in state_dict.items():
            setattr(self, name, value)


@torch.no_grad()
def largest_attention_logit(model: nn.Module, batch: Batch) -> float:
    """The largest |score| (q·k/√K plus bias) of all attentions on these examples, without dropout."""
    logits: list[Tensor] = []

    def measure(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, DotProduct)
        q_BHTK, k_BHSK, _, *mask_and_bias = inputs
        logits.append(largest_logit(module, q_BHTK, k_BHSK, *mask_and_bias))

    hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, DotProduct)]
    training = model.training
    model.eval()
    try:
        model.hidden(**batch.inputs)  # type: ignore[operator]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return max((float(logit) for logit in logits), default=math.nan)
