"""Module of a residual branch's learned factor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_llm.components.initialisation.module import constant
from lit_llm.components.part import TensorShape


class BranchScale(nn.Module):
    """Learned factor of what a branch adds to the residual stream: one number (ReZero), or one for each entry."""

    def __init__(self, shape: TensorShape, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, initial))
        self.initial = {"scale": constant(initial)}

    def forward(self, out_BTD: Tensor) -> Tensor:
        """B x T x D -> B x T x D."""
        return out_BTD * self.scale
