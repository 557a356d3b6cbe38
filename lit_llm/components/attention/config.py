"""Multi-head dot-product attention: self or cross; causal, full or prefix; with the norms that RedLLM adds.

RedLLM and DecLLM (arXiv 2510.26622, eq. 1 and 2): parameter-free RMSNorm on each head's queries, keys and values, and,
in RedLLM alone, on the attention's output. Equation 2 is typed per head, so `output_norm: head` (before W_o) is the
literal reading; `concat` and `after_out` are the other places where such a norm is found. Positions: RoPE
(arXiv 2104.09864), T5's relative bias (arXiv 1910.10683), or none. Grouped-query attention (kv_heads < heads):
arXiv 2305.13245. Sliding windows and soft-capped scores: Gemma 2 (arXiv 2408.00118).
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from lit_llm.config.section import Items, Section, partial

SCORES = 1 << 22
"""Attention scores that a probe holds at a time, 16 MB in float32; some more tensors of that size are made of them."""

Reach = tuple[int, int]
"""Keys that are seen are fewer than so many tokens before, and after, the query."""

BAND = 8
"""Blocks from which on a window is computed block by block; for fewer one mask over all is as cheap."""


def band_size(reach: Reach, causal: bool) -> int:
    """Tokens of a block: enough that a query reaches the blocks next to its own and no further."""
    return max(reach[0] - 1, 0 if causal else reach[1] - 1, 16)


class AttentionConfig(Section):
    """One attention. `model.attention` holds the default of all; more specific addresses override single keys."""

    heads: int = Field(gt=0)
    """Number of query heads."""
    kv_heads: int | None = Field(None, gt=0)
    """Number of key and value heads; as many as `heads` when absent."""
    head_dim: int | None = Field(None, gt=0)
    """Entries per head; d_model / heads when absent."""
    qkv_norm: Items[Literal["q", "k", "v"]] = ()
    """Which of queries, keys and values are normalised, per head."""
    qkv_norm_scale: bool = False
    """Learn a scale of head_dim entries for each of them. The paper's norm has none."""
    output_norm: Literal["none", "head", "concat", "after_out"] = "none"
    """Where the output is normalised: nowhere, per head before W_o, over all heads before W_o, or after W_o."""
    output_norm_scale: bool = False
    """Learn a scale for the output norm. The paper's norm has none."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square under the root of the norms above."""
    rope: Literal["continuous", "restart", "none"] = "continuous"
    """Rotary positions. In cross-attention: target positions go on where the source ended (RedLLM), restart at zero, or
    neither side is rotated (T5Gemma). Self-attention sees distances only, so the first two are one there."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_factor: float = Field(1.0, gt=0)
    """Positions are divided by it (linear position interpolation, arXiv 2306.15595)."""
    relative_bias: Literal["none", "per_layer", "shared"] = "none"
    """T5's learned bias on the scores by head and distance: of each layer, or one for all layers of a stack as in T5.
    Self-attention alone has it; it stands beside RoPE, so T5 itself is `rope: none` with it."""
    relative_buckets: int = Field(32, gt=3)
    """Distances that the bias tells apart: half of them exactly, the others by their logarithm."""
    relative_distance: int = Field(128, gt=0)
    """Distances from here on share the last bucket. Beyond half of `relative_buckets`, which are told apart exactly."""
    window: int | None = Field(None, gt=0)
    """Self-attention sees only keys fewer than this many tokens away: in a causal one the query and window - 1 before
    it. All when absent. Cross-attention sees all of its source."""
    window_right: int | None = Field(None, gt=0)
    """The same for keys after the query, where a mask lets them be seen; as `window` when absent."""
    scale: float | None = Field(None, gt=0)
    """Scores are multiplied by it; 1 / sqrt(head_dim) when absent. T5: 1."""
    softcap: float | None = Field(None, gt=0)
    """Scores become softcap tanh(score / softcap). Takes no fused kernel, so it costs time, and memory for T x S
    scores."""


_Optional: Any = partial(AttentionConfig)


class AttentionOverride(_Optional):
    """Keys of an attention that are different at one address; what is absent stays."""


class ResolvedAttention(Section):
    """An attention with nothing left open, in canonical form: two that are the same function are equal."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_norm: Items[str]
    qkv_norm_scale: bool
    output_norm: str
    output_norm_scale: bool
    norm_eps: float
    rope: str
    rope_theta: float
    # Not in the dump where they have no effect: stages from before they were there keep their fingerprints.
    rope_factor: float = Field(1.0, exclude_if=lambda value: value == 1)
    relative_bias: str = Field("none", exclude_if=lambda value: value == "none")
    relative_buckets: int | None = Field(None, exclude_if=lambda value: value is None)
    relative_distance: int | None = Field(None, exclude_if=lambda value: value is None)
    window: int | None = Field(None, exclude_if=lambda value: value is None)
    window_right: int | None = Field(None, exclude_if=lambda value: value is None)
    scale: float | None = Field(None, exclude_if=lambda value: value is None)
    softcap: float | None = Field(None, exclude_if=lambda value: value is None)
    shared_kv: bool = Field(False, exclude_if=lambda value: not value)
    """Whether keys and values are made once for all layers that say so (YOCO, arXiv 2405.05254), and not here."""

    @property
    def reach(self) -> Reach | None:
        """Keys that are seen are fewer than so many tokens (before, after) the query; None: all."""
        return None if self.window is None else (self.window, self.window_right or self.window)

    @property
    def width(self) -> int:
        """All query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """All key (or value) heads together."""
        return self.kv_heads * self.head_dim

    def query_parameters(self, d_model: int) -> int:
        """Entries of W_q and W_o, which work once per query token."""
        return 2 * d_model * self.width

    def memory_parameters(self, d_model: int) -> int:
        """Entries of W_k and W_v, which work once per key token."""
        return 0 if self.shared_kv else 2 * d_model * self.kv_width

    def tensors(self, d_model: int, memory: int | None = None) -> list[tuple[int, int]]:
        """(rows, columns) of every parameter; a learned scale is one row. memory: width of what keys and values are
        made of, d_model when absent. A bias that the stack's layers share is the stack's."""
        memory = memory or d_model
        keys_values = [] if self.shared_kv else [(self.kv_width, memory)] * 2
        matrices = [(self.width, d_model), *keys_values, (d_model, self.width)]
        output = {"none": 0, "head": self.head_dim, "concat": self.width, "after_out": d_model}[self.output_norm]
        scales = [(1, self.head_dim)] * (sum(part in self.own_parts for part in self.qkv_norm) * self.qkv_norm_scale)
        bias = self.bias_tensors() if self.relative_bias == "per_layer" else []
        return matrices + scales + [(1, output)] * self.output_norm_scale + bias

    @property
    def own_parts(self) -> str:
        """Which of queries, keys and values are projected here."""
        return "q" if self.shared_kv else "qkv"

    @property
    def shared(self) -> tuple[object, ...]:
        """All that decides what the shared keys and values are; equal in all that share them."""
        norms = tuple(part for part in self.qkv_norm if part != "q")
        normed = (norms, self.qkv_norm_scale, self.norm_eps) if norms else ()
        return (self.kv_heads, self.head_dim, self.rope, self.rope_theta, self.rope_factor, *normed)

    def shared_parameters(self, d_model: int) -> int:
        """Entries of the W_k and W_v that make the shared keys and values, once per token."""
        return 2 * d_model * self.kv_width

    def shared_tensors(self, d_model: int) -> list[tuple[int, int]]:
        """(rows, columns) of the parameters that make the shared keys and values."""
        scales = sum(part != "q" for part in self.qkv_norm) * self.qkv_norm_scale
        return [(self.kv_width, d_model)] * 2 + [(1, self.head_dim)] * scales

    def bias_tensors(self) -> list[tuple[int, int]]:
        """(rows, columns) of one relative bias."""
        return [(self.relative_buckets or 0, self.heads)]

    def parameters(self, d_model: int) -> int:
        """Number of parameters."""
        return sum(rows * columns for rows, columns in self.tensors(d_model))

    def score_flops(self, pairs: float) -> float:
        """FLOPs of QKᵀ and of the weighted sum over values, for that many visible (query, key) pairs."""
        return 2 * 2 * self.width * pairs


Place = Literal["self", "merged", "cross", "partial", "shared"]
"""self: what is attended to is the input itself; merged: the input and the encoder's output in one softmax; shared: the
row itself, by keys and values that several layers share."""


def resolve_attention(values: dict[str, object], d_model: int, place: Place) -> ResolvedAttention:
    """Fill in what was left open and drop what has no effect. Raises ValueError with a reason for impossible shapes.

    values: the fields of AttentionConfig after all overrides.
    """
    config = AttentionConfig.model_validate(values)
    if config.head_dim is None and d_model % config.heads:
        raise ValueError(f"{config.heads} heads do not divide d_model {d_model}; choose a divisor or set head_dim")
    head_dim, kv_heads = config.head_dim or d_model // config.heads, config.kv_heads or config.heads
    if config.heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads} does not divide heads {config.heads}")
    if config.relative_bias != "none" and config.relative_buckets % 4:
        raise ValueError(
            f"relative_buckets {config.relative_buckets} is no multiple of 4: half are exact, on two sides"
        )
    if config.relative_bias != "none" and config.relative_distance <= config.relative_buckets // 2:
        raise ValueError(
            f"relative_distance {config.relative_distance} is not beyond the {config.relative_buckets // 2} distances "
            f"that {config.relative_buckets} buckets tell apart exactly; make it larger, or relative_buckets smaller"
        )
    if config.window_right is not None and config.window is None:
        raise ValueError("window_right without window has no effect; set window, too")
    if config.rope != "none" and head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim {head_dim} must be even (or rope: none)")
    # One head is all heads: two names of one function.
    output_norm = "head" if config.output_norm == "concat" and config.heads == 1 else config.output_norm
    qkv_norm = tuple(part for part in "qkv" if part in config.qkv_norm)
    # Self-attention sees distances only; where there is a source, they depend on where the target begins.
    rope = "continuous" if config.rope == "restart" and place in ("self", "partial", "shared") else config.rope
    if place == "merged" and config.relative_bias != "none":
        raise ValueError("a relative bias has no distances between a target and its source; use rope with merged")
    if place == "shared" and config.relative_bias != "none":
        raise ValueError("shared keys have no relative bias; write relative_bias: none here, and use rope")
    own = place in ("self", "merged")  # what stands in one row with its keys
    window = config.window if own else None
    ahead = None if window is None or config.window_right == window else config.window_right
    biased = place == "self" and config.relative_bias != "none"
    usual = config.scale is not None and math.isclose(config.scale, head_dim**-0.5, rel_tol=1e-12)
    return ResolvedAttention(
        heads=config.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_norm=qkv_norm,
        qkv_norm_scale=config.qkv_norm_scale and bool(qkv_norm),
        output_norm=output_norm,
        output_norm_scale=config.output_norm_scale and config.output_norm != "none",
        norm_eps=config.norm_eps if qkv_norm or config.output_norm != "none" else 0.0,
        rope=rope,
        rope_theta=config.rope_theta if rope != "none" else 0.0,
        rope_factor=config.rope_factor if rope != "none" else 1.0,
        relative_bias=config.relative_bias if biased else "none",
        relative_buckets=config.relative_buckets if biased else None,
        relative_distance=config.relative_distance if biased else None,
        window=window,
        window_right=ahead,
        scale=None if usual else config.scale,
        softcap=config.softcap,
        shared_kv=place == "shared",
    )
