"""Partial attention: an additional attention of every token of a decoder-only model to its source.

PALM (Fu et al. 2023, arXiv 2304.04052) adds it after self-attention, so that attention to the source does not fade as
the answer grows. Keys and values are projected from a memory P, which is made of the source's states S; queries come
from all tokens, and the only mask is the source's end:

    P1 = f(S A1)    P2 = P1 A2    P = P2 + P1    softmax(Q Kᵀ / √K) V

f is ReLU, as in public code of it; A1 and A2 are d_model x d_model, without bias. Norms, grouped heads and rotary
positions are those of every attention here: `rope: none` is the formula as it stands above; otherwise queries and keys
are rotated by their places in the row, and `restart` is `continuous`, as in self-attention.

Not part of it, though PALM has them: the source auto-encoding loss, the language embedding, and position ids that
restart at the target.
"""

from __future__ import annotations

from typing import Literal

from lit_llm.components.attention.config import AttentionOverride


class PartialAttentionOverride(AttentionOverride):
    """Puts a partial attention into a layer: `palm`, or `{heads: 2}` for settings other than `model.attention`'s."""

    kind: Literal["palm"] = "palm"
    """palm: keys and values from P = P2 + P1, as in PALM."""
