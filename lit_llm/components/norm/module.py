"""Module of `NormConfig`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn, ones

from lit_llm.components.norm.config import NormConfig


class Norm(nn.Module):
    """RMSNorm or LayerNorm (without bias) over the last `width` entries."""

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        self.function, self.eps = config.function, config.eps
        self.scale = nn.Parameter(ones(width)) if config.scale else None

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.function](x, self.scale, self.eps)


def layer_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps), times a scale, over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), scale, None, eps)


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps), times a scale, over the last dimension."""
    # The scale in x's dtype, which the fused kernel requires.
    return F.rms_norm(x, (x.shape[-1],), None if scale is None else scale.to(x.dtype), eps)


FUNCTIONS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
"""{`norm.function`: function of the entries, the scale and eps}."""
