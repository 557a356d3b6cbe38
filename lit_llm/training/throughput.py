"""Speed: tokens and FLOPs per second, and the share of the device's peak where that peak is known."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from lit_llm.config.metrics import FLOPS_PER_SECOND, MFU, TOKENS_PER_SECOND

PEAK_FLOPS = {
    # Dense bfloat16 products with float32 sums, from NVIDIA's data sheets; more specific names first. MFU is reported
    # only for these devices, and not for runs in float32, whose peak differs.
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(name: str) -> float | None:
    """Peak FLOP/s of a device in bfloat16 by its name, or None for a device that is not listed."""
    return next((peak for device, peak in PEAK_FLOPS.items() if re.search(rf"\b{device}\b", name)), None)


@dataclass(frozen=True)
class StepCost:
    """Cost of one step, for the metrics."""

    tokens: int
    """Tokens read per step with a whole batch."""
    flops: float
    """FLOPs of such a step, forward and backward."""
    tokens_before: int = 0
    """Tokens read in the training of the source models."""
    flops_before: float = 0.0
    """FLOPs of the training of the source models."""
    batches: Callable[[int], float] = lambda steps: steps
    """Text that the first n steps read, in whole batches: n, or fewer where batches grow to their size."""
    whole_steps: Callable[[int], float] = lambda steps: steps
    """FLOPs of the first n steps, in steps of `flops`: n, or fewer where batches or rows grow to their size."""


class Throughput(L.Callback):
    """Measures the time inside training steps, without evaluations and checkpoints.

    FLOPs are those of one forward and one backward pass, without recomputation by activation checkpointing: MFU, not
    the hardware's utilisation (PaLM, arXiv 2204.02311, appendix B).
    """

    def __init__(self, step_cost: StepCost, precision: str = "fp32", devices: int = 1) -> None:
        """step_cost: of all devices together."""
        self.step_cost, self.precision, self.devices = step_cost, precision, devices
        self.seconds = 0.0
        """Wall-clock seconds spent in training steps, evaluations excluded."""
        self.batches = 0.0
        """Text read in the timed steps, in whole batches. Each process's first step, a slow one, is not timed."""
        self.steps = 0.0
        """FLOPs of the timed steps, in steps with a whole batch of whole rows."""
        self._warm_seconds = 0.0
        self._started = 0.0
        self._warm = False

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Mean rates so far by metric name; empty before the second step."""
        if not self.steps:
            return {}
        flops = self.steps / self._warm_seconds * self.step_cost.flops
        out = {
            TOKENS_PER_SECOND.name: self.batches / self._warm_seconds * self.step_cost.tokens,
            FLOPS_PER_SECOND.name: flops,
        }
        has_peak = device.type == "cuda" and self.precision != "fp32"
        peak = peak_flops(torch.cuda.get_device_name(device)) if has_peak else None
        return out | ({MFU.name: flops / (peak * self.devices)} if peak else {})

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # The step has read its sums from the device, so the device has finished it.
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        if self._warm:
            self._warm_seconds += seconds
            step, cost = trainer.global_step, self.step_cost
            self.batches += cost.batches(step) - cost.batches(step - 1)
            self.steps += cost.whole_steps(step) - cost.whole_steps(step - 1)
        self._warm = True

    def state_dict(self) -> dict[str, Any]:
        names = ("seconds", "batches", "steps")
        return {**{name: getattr(self, name) for name in names}, "warm_seconds": self._warm_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("seconds", "batches", "steps"):
            setattr(self, name, state_dict[name])
        self._warm_seconds = state_dict["warm_seconds"]
