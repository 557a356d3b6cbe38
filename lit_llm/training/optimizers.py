"""Optimisers by their config."""

from __future__ import annotations

import torch
from torch import nn

from lit_llm.training.config import AdamW


def build_optimizer(config: AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all parameters; matrices are in a group that decays, scales in one that does not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    first, second = config.betas
    # foreach and fused are the same function; fused exists for CPU and CUDA and launches one kernel.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(first, second), eps=config.eps, fused=True
    )
