"""Gated retention: in place of attention a state of fixed size, which decays with every token and which it adds to.

The mixer of YOCO's self-decoder (Sun et al. 2024, arXiv 2405.05254, section 3.1). For each head, with q and k rotated
by their positions (RoPE):

    γ_t = sigmoid(x_t W_γ)^(1/τ)        S_t = γ_t S_{t-1} + k_tᵀ v_t / √K        o_t = q_t S_t
    out = (rms_norm(o) per head, without parameters · swish(x W_G)) W_O

K is the width of a head's queries and keys, V that of its values. 1/√K, ε and τ = 16 are those of the authors' code.
Its RoPE pairs neighbouring entries, and spaces its frequencies from 1 to exactly 1 / rope_theta; here it is the RoPE of
every attention.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.components.recurrence.config import RecurrentConfig
from lit_llm.config.section import partial


class RetentionConfig(RecurrentConfig):
    """One gated retention."""

    gate_temperature: float = Field(16.0, gt=0)
    """τ: the larger, the closer a gate is to 1, and the slower a state decays."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    chunk: int = Field(256, gt=0)
    """Tokens that are read at once. It changes speed and memory, and the result only by rounding."""


_Optional: Any = partial(RetentionConfig)


class RetentionOverride(_Optional):
    """Puts a retention into a layer: `gated`, or `{heads: 2}` for one with other settings."""

    kind: Literal["gated"] = "gated"
    """gated: gated retention as in YOCO."""
