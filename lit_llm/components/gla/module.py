"""Module of `ResolvedGLA`, gated linear attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.few_rows import Linear
from lit_llm.components.gla.resolved import ResolvedGLA
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.module import RecurrentInputs, TwoWayMixer, by_head, exact
from lit_llm.components.recurrence.resolved import ResolvedTwoWay


class Direction(nn.Module):
    """The gates' matrices, which each direction has for itself."""

    def __init__(self, config: ResolvedGLA, widths: Widths) -> None:
        super().__init__()
        self.down = Linear(widths.row, config.gate_rank)
        self.up = Linear(config.gate_rank, config.key_width, bias=True)


class GatedLinearAttention(TwoWayMixer):
    """
    x ─┬─ q ─ / √K ────────┐
       ├─ k ───────────────┤
       ├─ v ───────────────┼─ recurrence ─ head norm ─(×)─ out ─▶
       ├─ down ─ up ─ α ───┘                           │
       └─ output_gate ─ swish ─────────────────────────┘
    """

    def __init__(self, config: ResolvedGLA, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config

    def new_direction(self, config: ResolvedTwoWay, widths: Widths) -> Direction:
        return Direction(cast(ResolvedGLA, config), widths)

    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        return x_BTD, self.q(x_BTD), self.k(x_BTD), self.v(x_BTD), self.output_gate(x_BTD)

    def mix_one_way(self, direction: nn.Module, projected: Sequence[Tensor], inputs: RecurrentInputs) -> Tensor:
        assert isinstance(direction, Direction)
        x_BTD, *projections, gates_BTV = projected
        config = self.config
        q, k, v = (by_head(part, config.heads) for part in projections)
        log_gates_BTK = F.logsigmoid(exact(direction.up(direction.down(x_BTD)))) / config.gate_temperature
        streams = Streams(q * config.head_dim**-0.5, k, v, by_head(log_gates_BTK, config.heads))
        out_BTHV = self.mix(streams, inputs).transpose(1, 2)
        return F.silu(gates_BTV) * rms_norm(out_BTHV, self.head_scale, config.norm_eps).flatten(2)
