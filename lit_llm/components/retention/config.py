"""Gated retention: in place of attention a state of fixed size, which every token fades and adds to.

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

from lit_llm.config.section import Section, partial


class RetentionConfig(Section):
    """One gated retention."""

    heads: int = Field(gt=0)
    """Number of heads, each with a gate and a state of its own."""
    head_dim: int | None = Field(None, gt=0)
    """Entries of a head's queries and keys; d_model / heads when absent."""
    value_dim: int | None = Field(None, gt=0)
    """Entries of a head's values; as many as `head_dim` when absent."""
    gate_temperature: float = Field(16.0, gt=0)
    """τ: the larger, the closer a gate is to 1, and the slower a state fades."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square under the root of the norm over each head's output."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    chunk: int = Field(256, gt=0)
    """Tokens that are read at once. A choice of speed and memory: the result is the same up to rounding."""


_Optional: Any = partial(RetentionConfig)


class RetentionOverride(_Optional):
    """Where this is written there is a retention: `gated`, or `{heads: 2}` for one with keys of its own."""

    kind: Literal["gated"] = "gated"
    """gated: gated retention, as YOCO has it."""


class ResolvedRetention(Section):
    """A gated retention with nothing left open."""

    heads: int
    head_dim: int
    value_dim: int
    gate_temperature: float
    norm_eps: float
    rope_theta: float
    chunk: int

    @property
    def width(self) -> int:
        """The queries (or keys) of all heads together."""
        return self.heads * self.head_dim

    @property
    def value_width(self) -> int:
        """The values of all heads together."""
        return self.heads * self.value_dim

    @property
    def state_entries(self) -> int:
        """Entries of the state of one sequence: K x V for each head, however long the sequence is."""
        return self.heads * self.head_dim * self.value_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of the same. Float32 whatever the precision: it is a sum over thousands of tokens."""
        return 4 * self.state_entries

    def tensors(self, d_model: int) -> list[tuple[int, int]]:
        """(rows, columns) of every parameter: of queries, keys, values, W_γ, W_G and W_O."""
        inputs = [self.width, self.width, self.value_width, self.heads, self.value_width]
        return [*((rows, d_model) for rows in inputs), (d_model, self.value_width)]

    def parameters(self, d_model: int) -> int:
        """Number of parameters; each takes part in one multiply-add per token."""
        return sum(rows * columns for rows, columns in self.tensors(d_model))

    def flops(self, tokens: float, d_model: int, keep_state: bool = False) -> float:
        """FLOPs of reading that many tokens chunk by chunk, the projections among them.

        Pairs inside a chunk count where they are visible. A chunk but the first also reads the state, and a chunk but
        the last adds to it; keep_state: the last does, too, for the tokens that are to come.
        """
        chunks, rest = divmod(tokens, self.chunk)
        pairs = (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / 2
        read = max(tokens - self.chunk, 0)
        added = tokens if keep_state else tokens - (rest or min(self.chunk, tokens))
        mixing = pairs * (self.width + self.value_width) + (read + added) * self.state_entries
        return 2.0 * (tokens * self.parameters(d_model) + mixing)

    def step_flops(self, d_model: int) -> float:
        """FLOPs of one more token behind a kept state, the projections among them; the same at every length."""
        return 2.0 * (self.parameters(d_model) + 2 * self.state_entries)


def resolve_retention(values: dict[str, object], d_model: int) -> ResolvedRetention:
    """Fill in what was left open. Raises ValueError with a reason for impossible shapes.

    values: the fields of RetentionConfig after all overrides.
    """
    config = RetentionConfig.model_validate(values)
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
