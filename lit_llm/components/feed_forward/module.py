"""The feed-forward network that `FeedForwardConfig` describes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.feed_forward.config import FeedForwardConfig


class FeedForward(nn.Module):
    """
    x ──┬─ gate ─ activation ─(×)─ down ─▶     (gelu has no gate: x ─ up ─ activation ─ down ─▶)
        └─ up ────────────────┘
    """

    def __init__(self, config: FeedForwardConfig, d_model: int) -> None:
        super().__init__()
        self.activation = F.silu if config.activation == "swiglu" else F.gelu
        self.gate = nn.Linear(d_model, config.d_ff, bias=False) if config.gated else None
        self.up = nn.Linear(d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x_BTD)))
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))
