"""Attention's settings after all overrides, resolved or refused. Loads no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from lit_llm.components.attention.config import AttentionConfig
from lit_llm.components.attention.resolved import Place, ResolvedAttention
from lit_llm.config.tree import KIND


class _Heads(NamedTuple):
    """Shape of the heads."""

    queries: int
    keys: int
    head_dim: int


def resolve_attention(values: dict[str, object], d_model: int, place: Place) -> ResolvedAttention:
    """Fill in defaults and drop settings without effect. Raises ValueError with a reason for impossible shapes.

    values: the fields of AttentionConfig after all overrides.
    """
    config = AttentionConfig.model_validate({key: value for key, value in values.items() if key != KIND})
    heads = _heads(config, d_model)
    bucketed, stretched = config.relative_bias in ("per_layer", "shared"), _is_stretched(config)
    if bucketed:
        _check_buckets(config)
    if config.window_right is not None and config.window is None:
        raise ValueError("window_right without window has no effect; set window, too")
    if config.rope != "none":
        _check_rope(config, heads.head_dim)
    _check_place(config, place)
    # With one head, head and concat are the same function.
    output_norm = "head" if config.output_norm == "concat" and heads.queries == 1 else config.output_norm
    qkv_norm = tuple(part for part in "qkv" if part in config.qkv_norm)
    many_heads = any((heads.queries if part == "q" else heads.keys) > 1 for part in qkv_norm)
    # Self-attention depends on distances only; those to a source depend on the target's first position.
    rope = "continuous" if config.rope == "restart" and place in ("self", "partial", "shared") else config.rope
    value_residual = config.value_residual if place == "self" else "none"
    in_row = place in ("self", "merged")  # queries and keys are in one row
    window = config.window if in_row else None
    window_right = None if window is None or config.window_right == window else config.window_right
    biased = place == "self" and config.relative_bias != "none"
    default_scale = config.scale is not None and math.isclose(config.scale, heads.head_dim**-0.5, rel_tol=1e-12)
    return ResolvedAttention(
        heads=heads.queries,
        kv_heads=heads.keys,
        head_dim=heads.head_dim,
        qkv_norm=qkv_norm,
        qkv_norm_scale=config.qkv_norm_scale and bool(qkv_norm),
        output_norm=output_norm,
        output_norm_scale=config.output_norm_scale and config.output_norm != "none",
        norm_eps=config.norm_eps if qkv_norm or config.output_norm != "none" else 0.0,
        norm_function=config.norm_function if qkv_norm or config.output_norm != "none" else "rms_norm",
        rope=rope,
        rope_theta=config.rope_theta if rope != "none" else 0.0,
        rope_factor=config.rope_factor if rope != "none" else 1.0,
        rope_scaling=config.rope_scaling if stretched else "linear",
        rope_original_length=config.rope_original_length if stretched else None,
        rope_fraction=config.rope_fraction if rope != "none" else 1.0,
        relative_bias=config.relative_bias if biased else "none",
        relative_buckets=config.relative_buckets if biased and bucketed else None,
        relative_distance=config.relative_distance if biased and bucketed else None,
        window=window,
        window_right=window_right,
        scale=None if default_scale else config.scale,
        softcap=config.softcap,
        qkv_norm_over=config.qkv_norm_over if many_heads else "head",
        qkv_bias=tuple(part for part in "qkv" if part in config.qkv_bias),
        # With heads of one entry both are the same function.
        gate="per_element" if config.gate == "per_head" and heads.head_dim == 1 else config.gate,
        convolution=tuple(name for name in ("input", "qkv") if name in config.convolution) if place == "self" else (),
        value_residual=value_residual,
        value_residual_weight=config.value_residual_weight if value_residual == "fixed" else 0.5,
        place=place,
    )


def _heads(config: AttentionConfig, d_model: int) -> _Heads:
    """Shape of the heads. Raises ValueError where it is impossible."""
    if config.head_dim is None and d_model % config.heads:
        raise ValueError(f"{config.heads} heads do not divide d_model {d_model}; choose a divisor or set head_dim")
    kv_heads = config.kv_heads or config.heads
    if config.heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads} does not divide heads {config.heads}")
    return _Heads(config.heads, kv_heads, config.head_dim or d_model // config.heads)


def _check_buckets(config: AttentionConfig) -> None:
    """Raise ValueError for buckets of a relative bias that T5's rule cannot make."""
    if config.relative_buckets % 4:
        raise ValueError(
            f"relative_buckets {config.relative_buckets} is no multiple of 4: half are exact, on two sides"
        )
    if config.relative_distance <= config.relative_buckets // 2:
        raise ValueError(
            f"relative_distance {config.relative_distance} is not beyond the {config.relative_buckets // 2} distances "
            f"that {config.relative_buckets} buckets tell apart exactly; make it larger, or relative_buckets smaller"
        )


def _is_stretched(config: AttentionConfig) -> bool:
    """True where RoPE's frequencies are scaled, each by a factor of its own."""
    return config.rope != "none" and config.rope_factor != 1 and config.rope_scaling != "linear"


def _check_rope(config: AttentionConfig, head_dim: int) -> None:
    """Raise ValueError for a rotation that heads of this size cannot have, or a scaling without what it needs."""
    if head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim {head_dim} must be even (or rope: none)")
    rotary = head_dim * config.rope_fraction
    pairs = max(1, round(rotary / 2))
    if not math.isclose(rotary, 2 * pairs, rel_tol=1e-6):
        raise ValueError(
            f"rope_fraction {config.rope_fraction:g} of head_dim {head_dim} is {rotary:g} entries, and RoPE rotates "
            f"pairs; write rope_fraction: {2 * pairs / head_dim:g} for {2 * pairs} entries"
        )
    if _is_stretched(config) and config.rope_original_length is None:
        raise ValueError(f"rope_scaling {config.rope_scaling} needs rope_original_length: the tokens of training texts")
    if _is_stretched(config) and config.rope_theta <= 1:
        raise ValueError(f"rope_scaling {config.rope_scaling} needs a rope_theta above 1, so that frequencies differ")


def _check_place(config: AttentionConfig, place: Place) -> None:
    """Raise ValueError for settings that attention at this place cannot have."""
    if place == "merged" and config.relative_bias != "none":
        raise ValueError("a relative bias has no distances between a target and its source; use rope with merged")
    if place == "shared" and config.relative_bias != "none":
        raise ValueError("shared keys have no relative bias; write relative_bias: none here, and use rope")
    if place == "merged" and config.value_residual != "none":
        raise ValueError(
            "value_residual: merged attention's values are the source's and the target's, and no first layer has both; "
            "write value_residual: none here"
        )
    if place == "merged" and config.convolution:
        raise ValueError(
            "convolution: merged attention reads the source by the matrices of its row, and a source has no neighbours "
            "in the row; write convolution: [] here"
        )
