"""Speed: tokens and FLOPs per second, and the share of the device's peak where that peak is known."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
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


class Throughput(L.Callback):
    """Measures the time inside training steps, without evaluations and checkpoints.

    FLOPs are those of one forward and one backward pass, without recomputation by activation checkpointing: MFU, not
    the hardware's utilisation (PaLM, arXiv 2204.02311, appendix B).
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_step: float,
        precision: str = "fp32",
        devices: int = 1,
        batches: Callable[[int], float] = lambda steps: steps,
    ) -> None:
        """Make the callback.

        tokens_per_step, flops_per_step: of all devices together, with a whole batch. batches: number of whole batches
        in the first steps.
        """
        self.devices, self.batches = devices, batches
        self.tokens_per_step, self.flops_per_step, self.precision = tokens_per_step, flops_per_step, precision
        self.seconds = 0.0
        """Wall-clock seconds spent in training steps, evaluations excluded."""
        self.steps = 0.0
        """Number of whole batches in the mean rates: of all steps but the first of each process, which warms up."""
        self._warm_seconds = 0.0
        self._started = 0.0
        self._warm = False

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Mean rates so far by metric name; empty before the second step."""
        if not self.steps:
            return {}
        rate = self.steps / self._warm_seconds
        out = {
            TOKENS_PER_SECOND.name: rate * self.tokens_per_step,
            FLOPS_PER_SECOND.name: rate * self.flops_per_step,
        }
        has_peak = device.type == "cuda" and self.precision != "fp32"
        peak = peak_flops(torch.cuda.get_device_name(device)) if has_peak else None
        return out | ({MFU.name: rate * self.flops_per_step / (peak * self.devices)} if peak else {})

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # The step has read its sums from the device, so the device has finished it.
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        if self._warm:
            self._warm_seconds += seconds
            self.steps += self.batches(trainer.global_step) - self.batches(trainer.global_step - 1)
        self._warm = True

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "steps": self.steps, "warm_seconds": self._warm_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.steps = state_dict["seconds"], state_dict["steps"]
        self._warm_seconds = state_dict["warm_seconds"]
