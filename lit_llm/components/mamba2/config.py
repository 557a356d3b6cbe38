"""Mamba-2: a state-space model with one decay for each head, which is a linear attention (SSD).

The mixer of Dao & Gu 2024 (arXiv 2405.21060). For each head, with its B, C and x as keys k, queries q and values
v:

    S_t = exp(-exp(a) Δ_t) S_{t-1} + k_tᵀ Δ_t v_t        y_t = q_t S_t + d v_t        Δ_t = softplus(x_t W_Δ + b)
    out = rms_norm(y · swish(x W_G)) W_O

q, k and v go through a short causal convolution with bias and swish. All heads of a group share q and k. The paper's
state size N is `head_dim`, its head dimension P `value_dim`, its n_groups `groups`.

In an encoder it reads each row in both directions, as Caduceus does (arXiv 2403.03234): the outputs are
added; both share all matrices, and each has its own convolution, a, b and d. The norm's scale is shared, too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.components.recurrence.config import RecurrentConfig
from lit_llm.config.section import partial


class Mamba2Config(RecurrentConfig):
    """One Mamba-2 mixer."""

    head_dim: int | None = Field(None, gt=0)
    """K: entries of a head's queries and keys, the state size N; 128 when absent."""
    value_dim: int | None = Field(None, gt=0)
    """V: entries of a head's values; 2 d_model / heads when absent."""
    groups: int = Field(1, gt=0)
    """Number of different queries and keys; each is shared by heads / groups heads."""
    conv: int = Field(4, gt=0)
    """Tokens that the short convolution of queries, keys and values covers; 1: only a scale, a bias and swish."""


_Optional: Any = partial(Mamba2Config)


class Mamba2Override(_Optional):
    """Puts a Mamba-2 mixer into a layer: `ssd`, or `{heads: 2}` for one with other settings."""

    kind: Literal["ssd"] = "ssd"
    """ssd: state-space dual, with one decay for each head."""
