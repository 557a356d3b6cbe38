"""Build an optimiser over a model's parameters from its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lit_llm.models.families import LanguageModel
from lit_llm.training.optimizers import adafactor, muon
from lit_llm.training.optimizers.config import Adafactor, AdamW, FactoredAdafactor, Muon, Optimizer
from lit_llm.training.optimizers.multipliers import STACKS, Multipliers, multipliers_of
from lit_llm.training.optimizers.shards import divide_state

PEAK = "peak_lr"
"""Key of a parameter group: the optimiser's learning rate before the schedule's factor."""
MULTIPLIER = "lr_multiplier"
"""Key of a parameter group: its learning rate over the optimiser's."""

Named = Mapping[str, nn.Parameter]


def build_optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all parameters.

    Matrices are in groups with weight decay, scales in groups without; parameters with other multipliers are in other
    groups.
    """
    multipliers = multipliers_of(model.config, config) if isinstance(model, LanguageModel) else {}
    parameters = dict(model.named_parameters())
    if isinstance(config, Muon):
        # Matrices of the stacks, without tables, whose rows belong to ids or distances.
        of_tables = [module for module in model.modules() if getattr(module, "is_table", False)]
        tables = {id(p) for module in of_tables for p in module.parameters(recurse=False)}
        matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and id(p) not in tables}
        inside = {name: p for name, p in matrices.items() if name.startswith(STACKS)}
        rest = {name: p for name, p in parameters.items() if name not in inside}
        parts = (
            _muon(config, _groups(inside, config, multipliers)),
            _adamw(config.adamw, _groups(rest, config.adamw, multipliers)),
        )
        return Joined(*map(_loads_shards, parts))
    groups = _groups(parameters, config, multipliers)
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
    """Set every group to its peak times the factor; returns the rate of the first group's optimiser."""
    for group in groups:
        group["lr"] = group[PEAK] * factor * group[MULTIPLIER]
    return float(groups[0][PEAK] * factor)


def _groups(parameters: Named, config: Optimizer, multipliers: Mapping[str, Multipliers]) -> list[dict[str, Any]]:
    """Groups of parameters with the same settings: matrices, then scales, which do not decay.

    multipliers: those of the parameters that have some.
    """
    groups: dict[tuple[bool, Multipliers], list[nn.Parameter]] = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].dim() < 2):
        key = parameter.dim() >= 2, multipliers.get(name, Multipliers())
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": config.weight_decay * factors.weight_decay if decays else 0.0,
            PEAK: config.lr,
            MULTIPLIER: factors.lr,
            **({"eps": config.eps * factors.eps} if isinstance(config, AdamW) else {}),
        }
        for (decays, factors), params in groups.items()
    ]


def _adamw(config: AdamW, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    first, second = config.betas
    if config.kind == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.lr, betas=(first, second), eps=config.eps)
    # fused: one kernel, on CPU and CUDA.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def _muon(config: Muon, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return muon.Muon(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        scaling=config.scaling,
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
