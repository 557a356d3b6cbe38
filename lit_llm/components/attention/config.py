"""Multi-head dot-product attention: self or cross; causal, full or prefix; with the norms that RedLLM adds.

RedLLM and DecLLM (arXiv 2510.26622, eq. 1 and 2): parameter-free RMSNorm on each head's queries, keys and values, and,
in RedLLM alone, on the attention's output. Equation 2 is typed per head, so `output_norm: head` (before W_o) is the
literal reading; `concat` and `after_out` are the other places where such a norm is found. Positions: RoPE
(arXiv 2104.09864). Grouped-query attention (kv_heads < heads): arXiv 2305.13245.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.config.section import Items, Section, partial


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
        return 2 * d_model * self.kv_width

    def tensors(self, d_model: int) -> list[tuple[int, int]]:
        """(rows, columns) of every parameter; a learned scale is one row."""
        matrices = [(self.width, d_model), (self.kv_width, d_model), (self.kv_width, d_model), (d_model, self.width)]
        output = {"none": 0, "head": self.head_dim, "concat": self.width, "after_out": d_model}[self.output_norm]
        scales = [(1, self.head_dim)] * (len(self.qkv_norm) * self.qkv_norm_scale)
        return matrices + scales + [(1, output)] * self.output_norm_scale

    def parameters(self, d_model: int) -> int:
        """Number of parameters."""
        return sum(rows * columns for rows, columns in self.tensors(d_model))

    def score_flops(self, pairs: float) -> float:
        """FLOPs of QKᵀ and of the weighted sum over values, for that many visible (query, key) pairs."""
        return 2 * 2 * self.width * pairs


def resolve_attention(values: dict[str, object], d_model: int, cross: bool) -> ResolvedAttention:
    """Fill in what was left open and drop what has no effect. Raises ValueError with a reason for impossible shapes.

    values: the fields of AttentionConfig after all overrides.
    """
    config = AttentionConfig.model_validate(values)
    if config.head_dim is None and d_model % config.heads:
        raise ValueError(f"{config.heads} heads do not divide d_model {d_model}; choose a divisor or set head_dim")
    head_dim, kv_heads = config.head_dim or d_model // config.heads, config.kv_heads or config.heads
    if config.heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads} does not divide heads {config.heads}")
    if config.rope != "none" and head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim {head_dim} must be even (or rope: none)")
    # One head is all heads: two names of one function.
    output_norm = "head" if config.output_norm == "concat" and config.heads == 1 else config.output_norm
    qkv_norm = tuple(part for part in "qkv" if part in config.qkv_norm)
    rope = "continuous" if config.rope == "restart" and not cross else config.rope
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
    )
