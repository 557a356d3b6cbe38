"""Module of `FeedForwardConfig`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from lit_llm.components import liger
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.few_rows import Linear
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.part import Widths

_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
    "reglu": F.relu,
    "glu": F.sigmoid,
    "liglu": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "swish": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "sigmoid": F.sigmoid,
    "softplus": F.softplus,
}
"""{name: function}; for gated networks the function on the gate."""


class FeedForward(LayerPart):
    """
    x ──┬─ gate ─ activation ─(×)─ down ─▶     (without a gate: x ─ up ─ activation ─ down ─▶)
        └─ up ────────────────┘
    """

    def __init__(self, config: FeedForwardConfig, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        d_model = widths.row
        self.name, self.activation = config.activation, ACTIVATIONS[config.activation]
        self.gate = Linear(d_model, config.d_ff, config.bias) if config.gated else None
        self.up = Linear(d_model, config.d_ff, config.bias)
        self.down = Linear(config.d_ff, d_model, config.bias)

    def forward(self, x_BTD: Tensor, inputs: None = None) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x_BTD)))
        if liger.uses_liger() and self.name in liger.GATES:
            return self.down(liger.gated(self.name, self.gate(x_BTD), self.up(x_BTD)))
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))
