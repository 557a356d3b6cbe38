"""One gated retention with all settings resolved: its parameters, FLOPs, state and memory. Loads no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_llm.components.part import FLOAT32, Defaults, Example, LayerComponent, Precision, TensorShape, Widths
from lit_llm.components.recurrence.resolved import ResolvedRecurrence, divided, settings_of, with_sizes
from lit_llm.components.retention.config import RetentionConfig, RetentionOverride


class ResolvedRetention(ResolvedRecurrence):
    """A gated retention with all settings resolved."""

    module: ClassVar[str] = "lit_llm.components.retention.module:Retention"
    causal_only: ClassVar[str] = "retention is causal"
    one_length: ClassVar[str] = "retention goes through a row chunk by chunk, so each length would be another graph"

    gate_temperature: float
    rope_theta: float

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        rows = {"q": self.key_width, "k": self.key_width, "v": self.value_width, "decay": self.heads}
        rows["output_gate"] = self.value_width
        inputs = {f"{name}.weight": (each, widths.row) for name, each in rows.items()}
        return {**inputs, "out.weight": (widths.row, self.value_width)}

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        compute, tokens = precision.compute, example.row
        # Queries, keys, values; then of the values' width what the head norm reads, what it and the gate make, before
        # and after swish, and the product.
        kept = tokens * (2 * self.key_width + 6 * self.value_width) * compute
        # The pairs inside of chunks: scores, how much of each is left (in float32, then in the scores' precision), and
        # their product.
        kept += self._pairs_kept(tokens) * (FLOAT32 + (3 if compute != FLOAT32 else 2) * compute)
        # Queries that read a state and keys that are added to it, faded; the states.
        kept += 2 * max(tokens - self.chunk, 0) * self.key_width * compute
        return kept + self._states_kept(tokens, compute)


def resolve_retention(values: dict[str, Any], defaults: Defaults) -> ResolvedRetention:
    """Fill in defaults. Raises ValueError with a reason for impossible shapes.

    values: the fields of RetentionConfig that are set; `heads` defaults to the attention's.
    """
    config = settings_of(RetentionConfig, values, defaults)
    head_dim = config.head_dim or divided(defaults.width, config.heads, "d_model", "head_dim")
    if head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim {head_dim} must be even")
    return with_sizes(ResolvedRetention, config, head_dim, config.value_dim or head_dim)


RETENTION = LayerComponent(
    key="retention",
    override=RetentionOverride,
    resolve=resolve_retention,
    stacks=("decoder", "self_decoder"),
    role="mixer",
    help="Gated retention (YOCO, arXiv 2405.05254) in place of self-attention, in the layers for which this is "
    "written; with as many heads as `model.attention` unless it says so. It is causal: no prefix can be opened to it.",
)
