"""Adafactor without factorisation, which torch's Adafactor does not offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-30
"""Added to squared gradients (the paper's epsilon 1)."""


class UnfactoredAdafactor(torch.optim.Optimizer):
    """Adafactor with one second moment per entry, as T5X's with `factored=False`; formula in `config.py`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        decay: float = 0.8,
        clip_threshold: float = 1.0,
        parameter_scale: bool = True,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "decay": decay,
            "clip_threshold": clip_threshold,
            "parameter_scale": parameter_scale,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["second_moment"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        kept = 1.0 - float(state["step"]) ** -group["decay"]
        moment = state["second_moment"].mul_(kept).add_(gradient.square().add_(_TINY), alpha=1.0 - kept)
        update = gradient * moment.rsqrt()
        update /= (rms(update) / group["clip_threshold"]).clamp(min=1.0)
        lr = group["lr"]
        if group["weight_decay"]:
            parameter.mul_(1.0 - lr * group["weight_decay"])
        if group["parameter_scale"]:
            update *= rms(parameter.float()).clamp(min=group["eps"])
        parameter.sub_(update.to(parameter.dtype), alpha=lr)


def rms(x: Tensor) -> Tensor:
    """Root of the mean square."""
    return x.square().mean().sqrt()
