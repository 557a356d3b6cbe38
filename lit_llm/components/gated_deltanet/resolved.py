"""One gated DeltaNet with all settings resolved: its parameters, FLOPs, state and memory. Loads no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_llm.components.gated_deltanet.config import GatedDeltaNetConfig, GatedDeltaNetOverride
from lit_llm.components.part import FLOAT32, Defaults, LayerComponent, Precision, TensorShape, Widths
from lit_llm.components.recurrence.resolved import (
    TWO_WAY,
    TWO_WAY_HELP,
    ResolvedConvolved,
    divided,
    settings_of,
    with_sizes,
)


class ResolvedGatedDeltaNet(ResolvedConvolved):
    """A gated DeltaNet with all settings resolved."""

    module: ClassVar[str] = "lit_llm.components.gated_deltanet.module:GatedDeltaNet"
    causal_only: ClassVar[str] = "gated DeltaNet is causal"
    one_length: ClassVar[str] = "gated DeltaNet goes through a row by chunks, so each length would be another graph"
    delta_rule: ClassVar[bool] = True

    def direction_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        steps = {"steps.a_log": (self.heads,), "steps.dt_bias": (self.heads,)}
        return {**super().direction_shapes(widths), **steps}

    def shared_rows(self) -> dict[str, int]:
        return {"decay": self.heads, "beta": self.heads}

    def _kept_one_way(self, tokens: float, precision: Precision) -> float:
        compute = precision.compute
        copies = compute if compute != FLOAT32 else 0
        # What the convolution and swish read (in float32), and its output, which the norms of queries and keys read.
        kept = tokens * self.channels * (2 * compute + FLOAT32)
        # Queries and keys of length one, and those that read a state or are added to it, faded: one more read by keys.
        kept += (2 * tokens + 3 * max(tokens - self.chunk, 0)) * self.key_width * compute
        # What is missing in the state, and what is written, in float32 and as the output's product reads it.
        kept += tokens * self.value_width * (2 * FLOAT32 + copies)
        # The head norm's input, both factors of the gate, and its logits.
        kept += tokens * self.value_width * 4 * compute
        # The pairs inside of chunks: decays, products of keys, those decayed, and the triangular system in float32;
        # products of queries and keys, and those decayed.
        kept += self._pairs_kept(tokens) * (4 * FLOAT32 + 2 * compute + copies)
        return kept + self._states_kept(tokens, compute)


def resolve_gated_deltanet(values: dict[str, Any], defaults: Defaults) -> ResolvedGatedDeltaNet:
    """Fill in defaults. Raises ValueError with a reason for impossible shapes.

    values: the fields of GatedDeltaNetConfig that are set; `heads` defaults to the attention's.
    """
    config = settings_of(GatedDeltaNetConfig, values, defaults)
    head_dim = config.head_dim or divided(defaults.width, config.heads, "d_model", "head_dim")
    value_dim = config.value_dim or head_dim
    return with_sizes(ResolvedGatedDeltaNet, config, head_dim, value_dim, bidirectional=not defaults.causal)


GATED_DELTANET = LayerComponent(
    key="gated_deltanet",
    override=GatedDeltaNetOverride,
    resolve=resolve_gated_deltanet,
    role="mixer",
    help=f"Gated DeltaNet (arXiv 2412.06464) {TWO_WAY_HELP}",
    **TWO_WAY,
)
