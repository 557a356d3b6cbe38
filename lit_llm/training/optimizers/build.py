"""Build an optimiser over a model's parameters from its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lit_llm.training.optimizers import adafactor, muon
from lit_llm.training.optimizers.config import Adafactor, AdamW, FactoredAdafactor, Muon, Optimizer
from lit_llm.training.optimizers.shards import divide_state

PEAK = "peak_lr"
"""Key of a parameter group: its learning rate before the schedule's factor."""


def build_optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all parameters. Matrices are in groups with weight decay, scales in groups without."""
    if isinstance(config, Muon):
        # Matrices of the stacks, without tables, whose rows belong to ids or distances.
        inside = [
            p
            for name, module in model.named_modules()
            if name.startswith(("encoder.", "decoder.")) and not getattr(module, "is_table", False)
            for p in module.parameters(recurse=False)
            if p.dim() == 2
        ]
        inside_ids = {id(p) for p in inside}
        rest = [p for p in model.parameters() if id(p) not in inside_ids]
        return Joined(*map(_loads_shards, (_muon(config, inside), _adamw(config.adamw, _groups(rest, config.adamw)))))
    groups = _groups(list(model.parameters()), config)
    return _loads_shards(_adamw(config, groups) if isinstance(config, AdamW) else _adafactor(config, groups))


def _loads_shards(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, which now divides a loaded state among the devices that share its parameters."""
    optimizer.register_load_state_dict_pre_hook(divide_state)
    return optimizer


def _adafactor(config: Adafactor | FactoredAdafactor, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return adafactor.Adafactor(
        groups,
        lr=config.lr,
        decay=config.decay,
        clip_threshold=config.clip_threshold,
        parameter_scale=True if isinstance(config, FactoredAdafactor) else config.parameter_scale,
        eps=config.eps,
        factored=isinstance(config, FactoredAdafactor),
    )


def set_learning_rate(groups: list[dict[str, Any]], factor: float) -> float:
    """Set every group to its peak times the factor; returns the first group's rate."""
    for group in groups:
        group["lr"] = group[PEAK] * factor
    return float(groups[0]["lr"])


def _groups(parameters: list[nn.Parameter], config: AdamW | Adafactor | FactoredAdafactor) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.dim() >= 2]
    scales = [p for p in parameters if p.dim() < 2]
    decays = ((matrices, config.weight_decay), (scales, 0.0))
    return [{"params": params, "weight_decay": decay, PEAK: config.lr} for params, decay in decays if params]


def _adamw(config: AdamW, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    first, second = config.betas
    if config.kind == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.lr, betas=(first, second), eps=config.eps)
    # fused: one kernel, on CPU and CUDA.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def _muon(config: Muon, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    return muon.Muon(
        [{"params": matrices, PEAK: config.lr}],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        scaling=config.scaling,
        weight_decay=config.weight_decay,
    )


class Joined(torch.optim.Optimizer):
    """Several optimisers over disjoint parameters behind one interface."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
