"""Module of `FeedForwardConfig`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from lit_llm.components import liger
from lit_llm.components.convolution.cache import ConvolutionStates
from lit_llm.components.convolution.module import ConvolutionInputs, canon_inputs, canon_layers
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.few_rows import Linear
from lit_llm.components.forward_context import CacheRows, ForwardContext
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
    """The feed-forward network of a layer, with or without a gate:

    x ──┬─ gate ─ activation ─(×)─[drop]─ down ─▶     (without a gate: x ─ up ─ activation ─[drop]─ down ─▶)
        └─ up ────────────────┘                         [convolutions] of x, or of what gate and up make
    """

    def __init__(self, config: FeedForwardConfig, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        d_model = widths.row
        self.name, self.activation = config.activation, ACTIVATIONS[config.activation]
        self.gate = Linear(d_model, config.d_ff, config.bias) if config.gated else None
        self.up = Linear(d_model, config.d_ff, config.bias)
        self.down = Linear(config.d_ff, d_model, config.bias)
        self.causal, self.convolution = causal, canon_layers(config.convolved(d_model), causal)
        self.dropout = 0.0
        """Share of the entries read by `down` that are set to zero in training."""

    def prepare(  # type: ignore[override]
        self, context: ForwardContext, cache: ConvolutionStates | None
    ) -> ConvolutionInputs | None:
        return canon_inputs(context, self.causal, cache) if len(self.convolution) else None

    def new_cache(self, rows: CacheRows) -> ConvolutionStates | None:
        return ConvolutionStates(rows.self_lengths) if len(self.convolution) else None

    def forward(self, x_BTD: Tensor, inputs: ConvolutionInputs | None = None) -> Tensor:
        if inputs is not None:
            return self._convolved(x_BTD, inputs)
        if self.gate is None:
            return self._project(self.activation(self.up(x_BTD)))
        # Not for an expert without tokens: the kernel takes no empty input.
        if liger.uses_liger() and self.name in liger.GATES and len(x_BTD):
            return self._project(liger.gated(self.name, self.gate(x_BTD), self.up(x_BTD)))
        return self._project(self.activation(self.gate(x_BTD)) * self.up(x_BTD))

    def _project(self, hidden_BTF: Tensor) -> Tensor:
        """Output of the hidden entries, some of them dropped in training: B x T x D."""
        if self.dropout and self.training:
            hidden_BTF = F.dropout(hidden_BTF, self.dropout)
        return self.down(hidden_BTF)

    def _convolved(self, x_BTD: Tensor, inputs: ConvolutionInputs) -> Tensor:
        def convolve(name: str, y_BTD: Tensor) -> Tensor:
            return self.convolution[name](y_BTD, inputs, name) if name in self.convolution else y_BTD

        x_BTD = convolve("input", x_BTD)
        up = convolve("up", self.up(x_BTD))
        if self.gate is None:
            return self._project(self.activation(up))
        return self._project(self.activation(convolve("gate", self.gate(x_BTD))) * up)
