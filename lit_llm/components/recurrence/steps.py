"""Decay of a state by step sizes, as in Mamba-2 (arXiv 2405.21060) and gated DeltaNet (arXiv 2412.06464)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_RATE, LARGEST_RATE = 1.0, 16.0
"""Range of exp(a) at the start of training."""
SHORTEST_STEP, LONGEST_STEP = 1e-3, 0.1
"""Range of softplus(b) at the start of training."""


class StepSizes(nn.Module):
    """Δ = softplus(x + b), and the log-gate -exp(a) Δ, for each head; all in float32 at least."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.a_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def forward(self, logits_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """B x T x H -> (step sizes, log-gates), B x T x H each."""
        exact = torch.promote_types(logits_BTH.dtype, torch.float32)
        steps_BTH = F.softplus(logits_BTH.to(exact) + self.dt_bias.to(exact))
        return steps_BTH, -self.a_log.to(exact).exp() * steps_BTH

    @staticmethod
    def _rates(parameter_H: Tensor, generator: torch.Generator) -> None:
        parameter_H.uniform_(SMALLEST_RATE, LARGEST_RATE, generator=generator).log_()

    @staticmethod
    def _steps(parameter_H: Tensor, generator: torch.Generator) -> None:
        """Steps spread evenly in their logarithms; stored by the inverse of softplus."""
        steps_H = parameter_H.uniform_(math.log(SHORTEST_STEP), math.log(LONGEST_STEP), generator=generator).exp()
        parameter_H.copy_(steps_H + (-(-steps_H).expm1()).log())

    initial: ClassVar[dict[str, Callable[[Tensor, torch.Generator], None]]] = {"a_log": _rates, "dt_bias": _steps}
    """{parameter: function that fills it with initial values}; see `lit_llm.models.build.initialise`."""
