"""Value residual: values of a layer mixed with those of its stack's first layer (ResFormer, arXiv 2410.17897)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.initialisation.module import constant


class FirstValues:
    """Values of a stack's first layer in one pass, for the layers that mix theirs with them.

    Not a dataclass, so that tools that traverse a layer's arguments do not traverse it.
    """

    def __init__(self) -> None:
        self.v_BHTK: Tensor | None = None
        """None until the first layer has run."""


class ValueResidual(nn.Module):
    """Mix of a layer's values with those of the stack's first layer:

    first layer's v ─ λ₁ ─(+)─▶
    v ─────────────── λ₂ ──┘        (in the first layer v ─▶, which is kept for the others)
    """

    def __init__(self, config: ResolvedAttention) -> None:
        super().__init__()
        self.gives, self.weight = config.value_residual == "first", config.value_residual_weight
        learned = config.value_residual == "learned"
        self.weights = nn.Parameter(torch.full((2,), 0.5)) if learned else None
        self.initial = {"weights": constant(0.5)}

    def forward(self, v_BHTK: Tensor, first: FirstValues) -> Tensor:
        """B x H x T x K, after the values' norm."""
        if self.gives:
            first.v_BHTK = v_BHTK
            return v_BHTK
        assert first.v_BHTK is not None
        if self.weights is None:
            return self.weight * first.v_BHTK + (1 - self.weight) * v_BHTK
        # Numbers without dimensions, so that they do not change the values' precision.
        of_first, of_own = self.weights.unbind()
        return of_first * first.v_BHTK + of_own * v_BHTK
