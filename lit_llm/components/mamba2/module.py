"""Module of `ResolvedMamba2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.convolution.module import ShortConvolution
from lit_llm.components.few_rows import Linear
from lit_llm.components.mamba2.resolved import ResolvedMamba2
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.module import ConvolvedMixer, RecurrentInputs, by_head
from lit_llm.components.recurrence.resolved import ResolvedTwoWay
from lit_llm.components.recurrence.steps import StepSizes


class Direction(nn.Module):
    """Convolution, step sizes and skip of one direction."""

    def __init__(self, config: ResolvedMamba2) -> None:
        super().__init__()
        self.convolution = ShortConvolution(config.channels, config.form)
        self.steps = StepSizes(config.heads)
        self.d = nn.Parameter(torch.empty(config.heads))
        """Share of each head's values that is added to its output."""


class Mamba2(ConvolvedMixer):
    """
    x ─┬─ q ─┐               ┌─────────────────┐
       ├─ k ─┼─ convolution ─┼─────────────────┤
       ├─ v ─┘    and swish  └─┬─ · Δ ─────────┼─ recurrence ─(+)─(×)─ norm ─ out ─▶
       ├─ decay ─ Δ, α ────────│───────────────┘               │   │
       │                       └─ · d ─────────────────────────┘   │
       └─ output_gate ─ swish ─────────────────────────────────────┘
    """

    def __init__(self, config: ResolvedMamba2, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config
        self.decay = Linear(widths.row, config.heads)

    def new_direction(self, config: ResolvedTwoWay, widths: Widths) -> Direction:
        return Direction(cast(ResolvedMamba2, config))

    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        joined_BTC = torch.cat([self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)], dim=-1)
        return joined_BTC, self.decay(x_BTD), self.output_gate(x_BTD)

    def mix_one_way(self, direction: nn.Module, projected: Sequence[Tensor], inputs: RecurrentInputs) -> Tensor:
        assert isinstance(direction, Direction)
        joined_BTC, logits_BTH, gates_BTV = projected
        config = self.config
        assert inputs.convolution is not None
        mixed_BTC = direction.convolution(joined_BTC, inputs.convolution, "qkv")
        parts = mixed_BTC.split([config.key_width, config.key_width, config.value_width], dim=-1)
        q_BGTK, k_BGTK = (by_head(part, config.groups) for part in parts[:2])
        v_BHTV = by_head(parts[2], config.heads)
        steps_BHT1, log_gates_BHT1 = (by_head(x, config.heads) for x in direction.steps(logits_BTH))
        # Groups and, in each, the heads that share its queries and keys.
        streams = Streams(
            q_BGTK.unsqueeze(2),
            k_BGTK.unsqueeze(2),
            (v_BHTV * steps_BHT1.to(v_BHTV.dtype)).unflatten(1, (config.groups, -1)),
            log_gates_BHT1.unflatten(1, (config.groups, -1)),
        )
        out_BHTV = self.mix(streams, inputs).flatten(1, 2) + direction.d.to(v_BHTV.dtype)[:, None, None] * v_BHTV
        gated_BTV = out_BHTV.transpose(1, 2).flatten(2) * F.silu(gates_BTV)
        normed_BTV = rms_norm(gated_BTV.unflatten(-1, (config.groups, -1)), None, config.norm_eps).flatten(2)
        return normed_BTV * self.head_scale.to(normed_BTV.dtype)
