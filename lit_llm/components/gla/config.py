"""Gated linear attention (GLA): a state of which each row decays by a gate of its own.

The mixer of Yang et al. 2023 (arXiv 2312.06635). For each head:

    S_t = diag(α_t) S_{t-1} + k_tᵀ v_t        o_t = q_t S_t / √K
    α_t = sigmoid(x_t W_1 W_2 + b)^(1/τ), one for each entry of a key
    out = (rms_norm(o) per head · swish(x W_G)) W_O

K is half of d_model / heads, V all of it, the rank of W_1 W_2 16 and τ 16: as in the paper. It writes LayerNorm and a
bias in the output's gate where the authors' code has RMSNorm and none; this is the code's form. No positions and no
convolution.

In an encoder it reads each row in both directions, as Caduceus does (arXiv 2403.03234): the outputs are
added; both share all matrices but W_1, W_2 and b.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.components.recurrence.config import RecurrentConfig
from lit_llm.config.section import partial


class GLAConfig(RecurrentConfig):
    """One gated linear attention."""

    head_dim: int | None = Field(None, gt=0)
    """K: entries of a head's queries and keys; d_model / (2 heads) when absent."""
    value_dim: int | None = Field(None, gt=0)
    """V: entries of a head's values; d_model / heads when absent."""
    gate_rank: int = Field(16, gt=0)
    """Rank of the product of matrices that makes the gates."""
    gate_temperature: float = Field(16.0, gt=0)
    """τ: the larger, the closer a gate is to 1, and the slower a state decays."""
    chunk: int = Field(16, gt=0)
    """Tokens that are read at once. It changes speed and memory, and the result only by rounding. Inside a chunk each
    pair of tokens has a decay for each entry of the keys, so that memory grows with T x `chunk` x K."""


_Optional: Any = partial(GLAConfig)


class GLAOverride(_Optional):
    """Puts a gated linear attention into a layer: `gated`, or `{heads: 2}` for one with other settings."""

    kind: Literal["gated"] = "gated"
    """gated: a gate for each entry of the keys."""
