"""Gated DeltaNet: a state that decays, and in which each value replaces the one that was kept for the same key.

The mixer of Yang et al. 2024 (arXiv 2412.06464). For each head, with q and k of length one:

    S_t = α_t (I - β_t k_tᵀ k_t) S_{t-1} + β_t k_tᵀ v_t        o_t = q_t S_t / √K
    α_t = exp(-exp(a) softplus(x_t W_α + b))        β_t = sigmoid(x_t W_β)
    out = (rms_norm(o) per head · swish(x W_G)) W_O

q, k and v go through a short causal convolution with swish. β near one writes the value, near zero keeps what is there.

The authors' models have head_dim 256 and values of twice that; K times heads is 3/4 of d_model, so that the matrices
have 6 d_model² entries. Here values are as wide as keys unless `value_dim` says otherwise.

In an encoder it reads each row in both directions, as Caduceus does (arXiv 2403.03234): the outputs are
added; both share all matrices, and each has its own convolution, a and b.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.components.recurrence.config import RecurrentConfig
from lit_llm.config.section import partial


class GatedDeltaNetConfig(RecurrentConfig):
    """One gated DeltaNet."""

    conv: int = Field(4, gt=0)
    """Tokens that the short convolution of queries, keys and values covers; 1: only swish."""


_Optional: Any = partial(GatedDeltaNetConfig)


class GatedDeltaNetOverride(_Optional):
    """Puts a gated DeltaNet into a layer: `gated`, or `{heads: 2}` for one with other settings."""

    kind: Literal["gated"] = "gated"
    """gated: the delta rule with a decay."""
