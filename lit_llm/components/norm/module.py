"""The norm that `RMSNorm` or `LayerNorm` describes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn, ones

from lit_llm.components.norm.config import LayerNorm, RMSNorm


class Norm(nn.Module):
    """RMSNorm or LayerNorm (without bias) over the last `width` entries."""

    def __init__(self, config: RMSNorm | LayerNorm, width: int) -> None:
        super().__init__()
        self.kind, self.width, self.eps = config.kind, (width,), config.eps
        self.scale = nn.Parameter(ones(width)) if config.scale else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return F.layer_norm(x, self.width, self.scale, None, self.eps)
        return F.rms_norm(x, self.width, self.scale, self.eps)
