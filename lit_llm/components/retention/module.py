"""Module of `ResolvedRetention`, gated retention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.few_rows import Linear
from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.recurrence.cache import RecurrentState
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.module import RecurrentInputs, RecurrentMixer, by_head, exact
from lit_llm.components.retention.resolved import ResolvedRetention
from lit_llm.components.rope import Frequencies, rotate


class Retention(RecurrentMixer):
    """
    x ─┬─ q ─ RoPE ────────┐
       ├─ k ─ RoPE ─ / √K ─┤
       ├─ v ───────────────┼─ retention ─ head norm ─(×)─ out ─▶
       ├─ decay ─ γ ───────┘                          │
       └─ output_gate ─ swish ────────────────────────┘
    """

    def __init__(self, config: ResolvedRetention, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config
        self.q = Linear(widths.row, config.key_width)
        self.k = Linear(widths.row, config.key_width)
        self.v = Linear(widths.row, config.value_width)
        self.decay = Linear(widths.row, config.heads)
        self.output_gate = Linear(widths.row, config.value_width)
        self.out = Linear(config.value_width, widths.row)

    def prepare(self, context: ForwardContext, cache: RecurrentState | None) -> RecurrentInputs:  # type: ignore[override]
        """Make the inputs of `forward`. Raises ValueError for a bidirectional prefix."""
        frequencies = Frequencies(self.config.rope_theta, self.config.head_dim)
        return super().prepare(context, cache)._replace(rotation=context.rotation("self", frequencies))

    def forward(self, x_BTD: Tensor, inputs: RecurrentInputs) -> Tensor:
        """B x T x D -> B x T x D. Each document starts from an empty state."""
        assert inputs.rotation is not None
        heads = self.config.heads
        q, k = (
            rotate(part(x_BTD).unflatten(-1, (heads, -1)), inputs.rotation).transpose(1, 2) for part in (self.q, self.k)
        )
        k = k * self.config.head_dim**-0.5
        streams = Streams(q, k, by_head(self.v(x_BTD), heads), self._log_gates(x_BTD))
        out_BHTV = self.mix(streams, inputs)
        joined_BTD = rms_norm(out_BHTV.transpose(1, 2), None, self.config.norm_eps).flatten(2)
        out_BTD: Tensor = self.out(F.silu(self.output_gate(x_BTD)) * joined_BTD)
        return out_BTD

    def _log_gates(self, x_BTD: Tensor) -> Tensor:
        """log γ: B x H x T x 1."""
        logits_BTH = exact(self.decay(x_BTD))
        return by_head(F.logsigmoid(logits_BTH), self.config.heads) / self.config.gate_temperature
