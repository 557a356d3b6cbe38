"""Refusals of Trainers and checkpoints with which a step would not be the one that the experiment describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from lit_llm.config.problems import InputError, Problem

NO_ACCUMULATION = (
    "would average the means of several batches, where a step is the mean over all of their target tokens; set it to 1,"
    " make `data.batch_size` larger, and cut the batch by `training.execution.micro_batch_size`"
)
"""Reason against Lightning's accumulation of gradients."""
NO_SCALER = (
    "has a gradient scaler, as fp16 needs: the norm would be that of scaled gradients, which are clipped, and reported"
    " as diverged where they overflow; use bf16, `bf16-mixed` or `training.precision: bf16`"
)
"""Reason against mixed precision in float16."""
STEPS_LOST = (
    "counts {steps} steps, but {counted} of them under automatic optimisation, where Lightning would go on: it was"
    " written under manual optimisation; train from the beginning, or load its weights alone by `load_from_checkpoint`"
)
"""Reason against a checkpoint of manual optimisation."""


def check_accumulation(trainer: L.Trainer) -> None:
    """Raise InputError where Lightning accumulates gradients; callbacks may change this during a training."""
    if trainer.accumulate_grad_batches != 1:
        raise InputError(Problem(NO_ACCUMULATION, "Trainer(accumulate_grad_batches)"))


def check_precision(trainer: L.Trainer) -> None:
    """Raise InputError where the precision plugin scales gradients."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise InputError(Problem(NO_SCALER, "Trainer(precision)"))


def check_steps(checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError unless a training from this checkpoint goes on at the checkpoint's step."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    steps, counted = checkpoint["global_step"], progress["optimizer"]["step"]["total"]["completed"]
    if steps != counted:
        raise InputError(Problem(STEPS_LOST.format(steps=steps, counted=counted), "checkpoint"))
