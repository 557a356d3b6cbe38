"""Multi-head dot-product attention: self or cross; causal, full or prefix; with the norms that RedLLM adds.

RedLLM and DecLLM (arXiv 2510.26622, eq. 1 and 2): parameter-free RMSNorm on each head's queries, keys and values, and,
in RedLLM alone, on the attention's output. Equation 2 is typed per head, so `output_norm: head` (before W_o) is the
literal reading; `concat` and `after_out` are the other places where such a norm is found. Positions: RoPE
(arXiv 2104.09864), T5's relative bias (arXiv 1910.10683), ALiBi (arXiv 2108.12409), or none. Grouped-query attention
(kv_heads < heads): arXiv 2305.13245. Sliding windows and soft-capped scores: Gemma 2 (arXiv 2408.00118). Gated output:
Qiu et al., arXiv 2505.06708. Value residual: Zhou et al., arXiv 2410.17897 (ResFormer). Convolutions:
Allen-Zhu, arXiv 2512.17351.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lit_llm.config.section import Items, Section, config_error, partial


def _refuse_dynamic(scaling: Any) -> Any:
    if scaling == "dynamic":
        message = (
            "dynamic changes the base of the frequencies with the length of the text: keys in a cache, rotated by an "
            "earlier base, differ from recomputed ones, and a token's loss depends on how many follow it; use yarn, "
            "llama3 or linear"
        )
        raise config_error(("", message))
    return scaling


class AttentionConfig(Section):
    """One attention. `model.attention` holds the defaults; more specific addresses override single keys."""

    heads: int = Field(gt=0)
    """Number of query heads."""
    kv_heads: int | None = Field(None, gt=0)
    """Number of key and value heads; as many as `heads` when absent."""
    head_dim: int | None = Field(None, gt=0)
    """Entries per head; d_model / heads when absent."""
    qkv_bias: Items[Literal["q", "k", "v"]] = ()
    """Add a learned vector to queries, keys or values, before their norms (all three in Qwen 2, arXiv 2407.10671)."""
    qkv_norm: Items[Literal["q", "k", "v"]] = ()
    """Normalise queries, keys or values (see `qkv_norm_over`)."""
    qkv_norm_over: Literal["head", "concat"] = "head"
    """Entries that are normalised together: each head's, or those of all heads (OLMo 2, arXiv 2501.00656)."""
    qkv_norm_scale: bool = False
    """Learn a scale for each of them, of as many entries as are normalised together. The paper's norm has none."""
    output_norm: Literal["none", "head", "concat", "after_out"] = "none"
    """Norm on the output: none, per head before W_o, over all heads before W_o, or after W_o."""
    output_norm_scale: bool = False
    """Learn a scale for the output norm. The paper's norm has none."""
    norm_function: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Function of the norms above, as `norm.function`. layer_norm on queries and keys: arXiv 2302.05442."""
    gate: Literal["none", "per_head", "per_element"] = "none"
    """Multiply the input of W_o by sigmoid(x W_g), where x makes the queries: one factor for each head, or one for each
    of its entries (Qiu et al., arXiv 2505.06708). It acts after an output norm of `head` or `concat`, which would
    remove a head's factor."""
    convolution: Items[Literal["input", "qkv"]] = ()
    """Mix four neighbouring tokens by a convolution for each entry (Canon layers, arXiv 2512.17351): in the input of
    self-attention (A), or in its queries, keys and values, before their norms and rotation (B)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square under the root of the norms above."""
    value_residual: Literal["none", "fixed", "learned"] = "none"
    """Mix the values of self-attention with those of its stack's first layer (ResFormer, arXiv 2410.17897). fixed: by
    `value_residual_weight`. learned: by two numbers for each layer, which start at 0.5. Values are mixed after their
    norm, so that it does not undo the weights. The cache holds the mixed values."""
    value_residual_weight: float = Field(0.5, gt=0, lt=1)
    """Weight of the first layer's values with `value_residual: fixed`; the layer's own weigh the rest of 1."""
    rope: Literal["continuous", "restart", "none"] = "continuous"
    """Rotary positions. In cross-attention the target's positions continue after the source (RedLLM), restart at zero,
    or neither side is rotated (T5Gemma). In self-attention, which sees distances only, the first two are equal."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_factor: float = Field(1.0, gt=0)
    """Divisor of all positions (linear position interpolation, arXiv 2306.15595), or of those frequencies that
    `rope_scaling` names."""
    rope_scaling: Annotated[Literal["linear", "llama3", "yarn"], BeforeValidator(_refuse_dynamic)] = "linear"
    """Frequencies that `rope_factor` divides. linear: all. llama3, yarn: those with few turns within
    `rope_original_length`, while those with many stay (Llama 3.1, arXiv 2407.21783, turns from 1 to 4; YaRN,
    arXiv 2309.00071, from 1 to 32, which also enlarges the scores). `dynamic` of transformers is refused: its base
    grows with the text, so that cached keys would differ from recomputed ones."""
    rope_original_length: int | None = Field(None, gt=0)
    """Tokens of the texts of the training before the stretch, for `llama3` and `yarn`."""
    rope_fraction: float = Field(1.0, gt=0, le=1)
    """Part of each head's entries that is rotated, its first; the others know no position (GPT-J's partial RoPE; 0.25
    in GPT-NeoX, arXiv 2204.06745)."""
    relative_bias: Literal["none", "per_layer", "shared", "alibi"] = "none"
    """Bias on the scores by head and distance. per_layer, shared: T5's learned one, for each layer or for all layers of
    a stack as in T5. alibi: minus the distance times a slope of the head, not learned (arXiv 2108.12409). Only in
    self-attention, and in addition to RoPE: T5 and ALiBi themselves are `rope: none` with a bias."""
    relative_buckets: int = Field(32, gt=3)
    """Number of buckets of distances: half of them hold one distance each, the others grow with the logarithm."""
    relative_distance: int = Field(128, gt=0)
    """Distances from here on are in the last bucket; larger than half of `relative_buckets`."""
    window: int | None = Field(None, gt=0)
    """Self-attention sees only keys fewer than this many tokens away: in a causal one the query and window - 1 before
    it. All when absent. Cross-attention sees all of its source."""
    window_right: int | None = Field(None, gt=0)
    """Window for keys after the query, where the mask makes them visible; as `window` when absent."""
    scale: float | None = Field(None, gt=0)
    """Factor of the scores; 1 / sqrt(head_dim) when absent. T5: 1."""
    softcap: float | None = Field(None, gt=0)
    """Scores become softcap tanh(score / softcap). No fused kernel has it, so it costs time, and memory for T x S
    scores."""


_Optional: Any = partial(AttentionConfig)


class AttentionOverride(_Optional):
    """Keys of an attention that one address overrides; absent keys keep their values."""
