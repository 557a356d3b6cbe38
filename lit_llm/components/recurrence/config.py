"""Settings that the recurrent mixers share."""

from __future__ import annotations

from pydantic import Field

from lit_llm.config.section import Section

TRITON_F32, TRITON_F32_IN_FP32 = "TRITON_F32_DEFAULT", "ieee"
"""Environment variable by which Triton rounds the factors of products in float32, to TF32 when absent; and its value
for kernels of flash-linear-attention in float32, unless the user has set another."""


class RecurrentConfig(Section):
    """Settings of a mixer with a state of K x V for each head."""

    heads: int = Field(gt=0)
    """Number of heads, each with a separate gate and state; as many as the attention's when absent."""
    head_dim: int | None = Field(None, gt=0)
    """K: entries of a head's queries and keys; d_model / heads when absent."""
    value_dim: int | None = Field(None, gt=0)
    """V: entries of a head's values; as many as `head_dim` when absent."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square under the root of the norm over each head's output."""
    chunk: int = Field(64, gt=0)
    """Tokens that are read at once. It changes speed and memory, and the result only by rounding."""
