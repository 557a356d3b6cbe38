"""Float32 copies of bfloat16 parameters for the optimiser (Mixed Precision Training, arXiv 1710.03740, section 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from lit_llm.training.optimizers.shards import divided_as

Model = TypeVar("Model", bound=nn.Module)


def masters_of(model: Model) -> Model:
    """A float32 copy of a model; the model's parameters become bfloat16."""
    masters = copy.deepcopy(model)
    model.to(torch.bfloat16)
    return masters


class MasterWeights(torch.optim.Optimizer):
    """An optimiser of float32 copies of bfloat16 parameters:

    parameters ─ backward pass ─▶ gradients ─ take_gradients ─▶ gradients ─ clipping, step ─▶ masters
      bfloat16                     bfloat16                      float32                      float32
         ▲───────────────────────────────────── rounded ─────────────────────────────────────────┘

    The masters accumulate steps smaller than a bfloat16 parameter's last bit. They are in the state, beside that of
    their optimiser, so that a resume continues from them and not from their roundings.
    """

    def __init__(self, model: nn.Module, masters: nn.Module, stepper: torch.optim.Optimizer) -> None:
        """stepper: an optimiser over the parameters of `masters`, which is a float32 copy of `model`."""
        self.parameters, self.masters = list(model.parameters()), list(masters.parameters())
        self.stepper = stepper
        super().__init__(self.masters, {})
        self.param_groups = stepper.param_groups

    @torch.no_grad()
    def take_gradients(self) -> list[nn.Parameter]:
        """Move the gradients to the masters, one tensor at a time; returns the masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        return self.masters

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        self.take_gradients()
        self.stepper.step()
        self.round()
        return loss

    @torch.no_grad()
    def round(self) -> None:
        """Set the parameters to the masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        return {"masters": [master.detach() for master in self.masters], "stepper": self.stepper.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for master, saved in zip(self.masters, state_dict["masters"], strict=True):
            master.copy_(divided_as(master, saved))
        self.round()
        self.stepper.load_state_dict(state_dict["stepper"])
        self.param_groups = self.stepper.param_groups
