"""One gated linear attention with all settings resolved: its parameters, FLOPs, state and memory. Loads no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_llm.components.gla.config import GLAConfig, GLAOverride
from lit_llm.components.part import FLOAT32, Defaults, LayerComponent, MatrixKind, Precision, TensorShape, Widths
from lit_llm.components.recurrence.resolved import (
    TWO_WAY,
    TWO_WAY_HELP,
    ResolvedTwoWay,
    divided,
    settings_of,
    with_sizes,
)


class ResolvedGLA(ResolvedTwoWay):
    """A gated linear attention with all settings resolved."""

    module: ClassVar[str] = "lit_llm.components.gla.module:GatedLinearAttention"
    causal_only: ClassVar[str] = "gated linear attention is causal"
    one_length: ClassVar[str] = "GLA goes through a row by chunks, so each length would be another graph"

    gate_rank: int
    gate_temperature: float

    def direction_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        up = {"up.weight": (self.key_width, self.gate_rank), "up.bias": (self.key_width,)}
        return {"down.weight": (self.gate_rank, widths.row), **up}

    def matrix_kind(self, name: str) -> MatrixKind:
        """The rank of the gates' product does not grow with the width."""
        kinds: dict[str, MatrixKind] = {"down.weight": "readout", "up.weight": "input"}
        return kinds.get(name.partition("directions.")[2].partition(".")[2], super().matrix_kind(name))

    def shared_rows(self) -> dict[str, int]:
        return {}

    def _kept_one_way(self, tokens: float, precision: Precision) -> float:
        compute = precision.compute
        copies = compute if compute != FLOAT32 else 0
        # Queries, scaled, and keys; what the gates' second matrix reads; values.
        kept = tokens * (2 * self.key_width + self.gate_rank + self.value_width) * compute
        # In float32 the gates' logits and what is left of the state and of each key.
        kept += tokens * self.key_width * 4 * FLOAT32
        # Queries that read a state and keys that are added to it, faded, and the copies of what fades them.
        beyond = max(tokens - self.chunk, 0) * self.key_width
        kept += 2 * beyond * (compute + copies)
        # The head norm's input, both factors of the gate, and its logits.
        kept += tokens * self.value_width * 4 * compute
        # The pairs inside of chunks: decays of each entry in float32 and in the scores' precision, keys that they fade,
        # and the scores.
        pairs = self._pairs_kept(tokens)
        kept += pairs * (self.head_dim * (FLOAT32 + copies + compute) + compute)
        return kept + self._states_kept(tokens, compute)


def resolve_gla(values: dict[str, Any], defaults: Defaults) -> ResolvedGLA:
    """Fill in defaults. Raises ValueError with a reason for impossible shapes.

    values: the fields of GLAConfig that are set; `heads` defaults to the attention's.
    """
    config = settings_of(GLAConfig, values, defaults)
    head_dim = config.head_dim or divided(defaults.width // 2, config.heads, "half of d_model,", "head_dim")
    value_dim = config.value_dim or divided(defaults.width, config.heads, "d_model", "value_dim")
    return with_sizes(ResolvedGLA, config, head_dim, value_dim, bidirectional=not defaults.causal)


GLA = LayerComponent(
    key="gla",
    override=GLAOverride,
    resolve=resolve_gla,
    role="mixer",
    help=f"Gated linear attention (arXiv 2312.06635) {TWO_WAY_HELP}",
    **TWO_WAY,
)
