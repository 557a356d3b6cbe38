"""Base class of the optimisers that update a group of parameters at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ByGroup(torch.optim.Optimizer):
    """An optimiser whose step is one update of each group's parameters with gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have gradients. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_group(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError
