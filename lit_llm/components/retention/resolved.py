"""One gated retention with all settings resolved: its parameters, FLOPs, state and memory. Loads no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_llm.components.part import (
    FLOAT32,
    CacheBytes,
    Defaults,
    Example,
    LayerComponent,
    Part,
    Precision,
    TensorShape,
    Widths,
)
from lit_llm.components.retention.config import RetentionConfig, RetentionOverride
from lit_llm.config.tree import KIND


class ResolvedRetention(Part):
    """A gated retention with all settings resolved."""

    module: ClassVar[str] = "lit_llm.components.retention.module:Retention"
    causal_only: ClassVar[str] = "retention is causal"
    one_length: ClassVar[str] = "retention goes through a row chunk by chunk, so each length would be another graph"

    heads: int
    head_dim: int
    value_dim: int
    gate_temperature: float
    norm_eps: float
    rope_theta: float
    chunk: int

    @property
    def width(self) -> int:
        """Entries of the queries (or keys) of all heads together."""
        return self.heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Entries of the values of all heads together."""
        return self.heads * self.value_dim

    @property
    def state_entries(self) -> int:
        """Entries of one sequence's state: K x V for each head, for any length."""
        return self.heads * self.head_dim * self.value_dim

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        rows = {"q": self.width, "k": self.width, "v": self.value_width, "decay": self.heads}
        rows["output_gate"] = self.value_width
        inputs = {f"{name}.weight": (each, widths.row) for name, each in rows.items()}
        return {**inputs, "out.weight": (widths.row, self.value_width)}

    def flops(self, example: Example, widths: Widths) -> float:
        """FLOPs of the projections, and of mixing tokens chunk by chunk, or in decoding one at a time.

        Visible pairs inside a chunk count. Every chunk but the first also reads the state, and every chunk but the last
        adds to it; with `example.keep_state` the last one does too.
        """
        # Chunks are counted in whole tokens; a mean over cuts may be off by rounding.
        tokens, products = round(example.row, 6), self.products(widths)
        if example.decoding:
            return 2.0 * tokens * (products + 2 * self.state_entries)
        chunks, rest = divmod(tokens, self.chunk)
        pairs = (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / 2
        read = max(tokens - self.chunk, 0)
        added = tokens if example.keep_state else tokens - (rest or min(self.chunk, tokens))
        mixing = pairs * (self.width + self.value_width) + (read + added) * self.state_entries
        return 2.0 * (tokens * products + mixing)

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes of the state, in float32 in any precision: it is a sum over thousands of tokens."""
        return CacheBytes(states=FLOAT32 * self.state_entries)

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        compute, tokens = precision.compute, example.row
        # Queries, keys, values; then of the values' width what the head norm reads, what it and the gate make, before
        # and after swish, and the product.
        kept = tokens * (2 * self.width + 6 * self.value_width) * compute
        # The pairs inside of chunks: scores, how much of each is left (in float32, then in the scores' precision), and
        # their product.
        whole, rest = divmod(tokens, self.chunk)
        pairs = (whole * self.chunk**2 + rest**2) * self.heads
        kept += pairs * (FLOAT32 + (3 if compute != FLOAT32 else 2) * compute)
        # Queries that read a state and keys that are added to it, faded; the states.
        kept += 2 * max(tokens - self.chunk, 0) * self.width * compute
        copy = compute if compute != FLOAT32 else 0
        return kept + max(whole + (rest > 0) - 1, 0) * self.state_entries * (FLOAT32 + copy)


def resolve_retention(values: dict[str, Any], defaults: Defaults) -> ResolvedRetention:
    """Fill in defaults. Raises ValueError with a reason for impossible shapes.

    values: the fields of RetentionConfig that are set; `heads` defaults to the attention's.
    """
    settings = {key: value for key, value in values.items() if key != KIND}
    config = RetentionConfig.model_validate({"heads": defaults.attention["heads"], **settings})
    d_model = defaults.width
    if config.head_dim is None and d_model % config.heads:
        raise ValueError(f"{config.heads} heads do not divide d_model {d_model}; choose a divisor or set head_dim")
    head_dim = config.head_dim or d_model // config.heads
    if head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim {head_dim} must be even")
    return ResolvedRetention(
        heads=config.heads,
        head_dim=head_dim,
        value_dim=config.value_dim or head_dim,
        gate_temperature=config.gate_temperature,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        chunk=config.chunk,
    )


RETENTION = LayerComponent(
    key="retention",
    override=RetentionOverride,
    resolve=resolve_retention,
    stacks=("decoder", "self_decoder"),
    role="mixer",
    help="Gated retention (YOCO, arXiv 2405.05254) in place of self-attention, in the layers for which this is "
    "written; with as many heads as `model.attention` unless it says so. It is causal: no prefix can be opened to it.",
)
