"""One Mamba-2 mixer with all settings resolved: its parameters, FLOPs, state and memory. Loads no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_llm.components.mamba2.config import Mamba2Config, Mamba2Override
from lit_llm.components.part import FLOAT32, Defaults, LayerComponent, Precision, TensorShape, Widths
from lit_llm.components.recurrence.resolved import (
    TWO_WAY,
    TWO_WAY_HELP,
    ResolvedConvolved,
    divided,
    settings_of,
    with_sizes,
)

STATE_SIZE = 128
"""Default of `head_dim`, the paper's N."""


class ResolvedMamba2(ResolvedConvolved):
    """A Mamba-2 mixer with all settings resolved."""

    module: ClassVar[str] = "lit_llm.components.mamba2.module:Mamba2"
    causal_only: ClassVar[str] = "Mamba-2 is causal"
    one_length: ClassVar[str] = "Mamba-2 goes through a row by chunks, so each length would be another graph"

    convolution_bias: ClassVar[bool] = True

    groups: int

    @property
    def key_heads(self) -> int:
        return self.groups

    @property
    def scale_entries(self) -> int:
        return self.value_width

    @property
    def unscaled(self) -> str:
        # Their number does not grow with the width, so both would fall with it, and each has the other in its gradient.
        return "" if self.groups == self.heads else "queries and keys that heads share (mamba2.groups below heads)"

    def direction_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        heads = {"steps.a_log": (self.heads,), "steps.dt_bias": (self.heads,), "d": (self.heads,)}
        return {**super().direction_shapes(widths), **heads}

    def shared_rows(self) -> dict[str, int]:
        return {"decay": self.heads}

    def _kept_one_way(self, tokens: float, precision: Precision) -> float:
        compute = precision.compute
        copies = compute if compute != FLOAT32 else 0
        # What the convolution and swish read (in float32), and its output.
        kept = tokens * self.channels * (2 * compute + FLOAT32)
        # Values times their steps; then both factors of the gate, its logits, what the norm reads and makes.
        kept += tokens * self.value_width * 6 * compute
        # Queries that read a state and keys that are added to it, faded, of every head.
        kept += 2 * max(tokens - self.chunk, 0) * self.heads * self.head_dim * compute
        # The pairs inside of chunks: decays, in float32 and in the scores' precision, and decayed scores of each head;
        # scores of each group.
        pairs = self._pairs_kept(tokens)
        kept += pairs * (FLOAT32 + copies + compute + compute * self.groups / self.heads)
        return kept + self._states_kept(tokens, compute)


def resolve_mamba2(values: dict[str, Any], defaults: Defaults) -> ResolvedMamba2:
    """Fill in defaults. Raises ValueError with a reason for impossible shapes.

    values: the fields of Mamba2Config that are set; `heads` defaults to the attention's.
    """
    config = settings_of(Mamba2Config, values, defaults)
    if config.heads % config.groups:
        raise ValueError(f"{config.groups} groups do not divide {config.heads} heads; choose a divisor")
    head_dim = config.head_dim or STATE_SIZE
    value_dim = config.value_dim or divided(2 * defaults.width, config.heads, "twice d_model,", "value_dim")
    return with_sizes(ResolvedMamba2, config, head_dim, value_dim, bidirectional=not defaults.causal)


MAMBA2 = LayerComponent(
    key="mamba2",
    override=Mamba2Override,
    resolve=resolve_mamba2,
    role="mixer",
    help=f"Mamba-2 (arXiv 2405.21060) {TWO_WAY_HELP}",
    **TWO_WAY,
)
