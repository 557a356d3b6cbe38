"""Module of `ResolvedGatedDeltaNet`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.convolution.module import ShortConvolution
from lit_llm.components.few_rows import Linear
from lit_llm.components.gated_deltanet.resolved import ResolvedGatedDeltaNet
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.module import ConvolvedMixer, RecurrentInputs, by_head, exact
from lit_llm.components.recurrence.resolved import ResolvedTwoWay
from lit_llm.components.recurrence.steps import StepSizes

NORM_EPS = 1e-6
"""Added to the square of a query's or key's length under the root, as in the authors' code."""


class Direction(nn.Module):
    """Convolution and step sizes of one direction."""

    def __init__(self, config: ResolvedGatedDeltaNet) -> None:
        super().__init__()
        self.convolution = ShortConvolution(config.channels, config.form)
        self.steps = StepSizes(config.heads)


class GatedDeltaNet(ConvolvedMixer):
    """
    x ─┬─ q ─┐               ┌─ length one ─ / √K ─┐
       ├─ k ─┼─ convolution ─┼─ length one ────────┤
       ├─ v ─┘    and swish  └─────────────────────┤
       ├─ decay ─ α ───────────────────────────────┼─ delta rule ─ head norm ─(×)─ out ─▶
       ├─ beta ─ sigmoid ─ β ──────────────────────┘                           │
       └─ output_gate ─ swish ─────────────────────────────────────────────────┘
    """

    def __init__(self, config: ResolvedGatedDeltaNet, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config
        self.decay = Linear(widths.row, config.heads)
        self.beta = Linear(widths.row, config.heads)

    def new_direction(self, config: ResolvedTwoWay, widths: Widths) -> Direction:
        return Direction(cast(ResolvedGatedDeltaNet, config))

    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        joined_BTC = torch.cat([self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)], dim=-1)
        return joined_BTC, self.decay(x_BTD), self.beta(x_BTD), self.output_gate(x_BTD)

    def mix_one_way(self, direction: nn.Module, projected: Sequence[Tensor], inputs: RecurrentInputs) -> Tensor:
        assert isinstance(direction, Direction)
        joined_BTC, decays_BTH, betas_BTH, gates_BTV = projected
        config = self.config
        assert inputs.convolution is not None
        mixed_BTC = direction.convolution(joined_BTC, inputs.convolution, "qkv")
        parts = mixed_BTC.split([config.key_width, config.key_width, config.value_width], dim=-1)
        q, k, v = (by_head(part, config.heads) for part in parts)
        _, log_gates_BTH = direction.steps(decays_BTH)
        streams = Streams(
            _of_length_one(q) * config.head_dim**-0.5,
            _of_length_one(k),
            v,
            by_head(log_gates_BTH, config.heads),
            by_head(exact(betas_BTH).sigmoid(), config.heads),
        )
        out_BTHV = self.mix(streams, inputs).transpose(1, 2)
        return F.silu(gates_BTV) * rms_norm(out_BTHV, self.head_scale, config.norm_eps).flatten(2)


def _of_length_one(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + eps), by the norm of the mean square, which is |x|² / K."""
    entries = x.shape[-1]
    return rms_norm(x, None, NORM_EPS / entries) * entries**-0.5
