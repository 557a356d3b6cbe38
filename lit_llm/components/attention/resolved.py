"""One attention with all settings resolved: its parameters, FLOPs, cache and memory. Loads no torch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from lit_llm.components.convolution.resolved import (
    KERNEL,
    NEIGHBOURS,
    convolution_activations,
    convolution_shapes,
    convolution_state,
    is_convolution,
)
from lit_llm.components.part import FLOAT32, CacheBytes, Example, MatrixKind, Part, Precision, TensorShape, Widths
from lit_llm.components.windows import BAND, Window, band_size, block_mask_bytes
from lit_llm.config.section import Items

SCORES = 1 << 22
"""Attention scores that an analysis of them holds at a time, 16 MB in float32; it makes some tensors of that size."""
NARROWEST = 16
"""Least entries of a head for FlexAttention, whose products have no smaller kernel."""

MATRICES: dict[str, MatrixKind] = {"q": "query", "k": "key", "v": "value", "out": "out", "relative_bias": "table"}
"""{module: role of its matrix}; the gate's is hidden."""

Place = Literal["self", "cross", "merged", "partial", "shared"]
"""Memory that keys and values are projected from. self: the row; cross: the encoder's output; merged: both, in one
softmax; partial: the row's beginning; shared: projected once for several layers."""


ValueResidual = Literal["none", "first", "fixed", "learned"]
"""Part of a layer in a value residual. first: later layers mix their values with this layer's."""


class ResolvedAttention(Part):
    """An attention with all settings resolved, in canonical form: equal functions compare equal."""

    drops: ClassVar[tuple[str, ...]] = ("attention_dropout",)

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
    # Left out of the dump where they have no effect, so that equal functions have equal fingerprints.
    rope_factor: float = Field(1.0, exclude_if=lambda value: value == 1)
    rope_scaling: str = Field("linear", exclude_if=lambda value: value == "linear")
    rope_original_length: int | None = Field(None, exclude_if=lambda value: value is None)
    rope_fraction: float = Field(1.0, exclude_if=lambda value: value == 1)
    relative_bias: str = Field("none", exclude_if=lambda value: value == "none")
    relative_buckets: int | None = Field(None, exclude_if=lambda value: value is None)
    relative_distance: int | None = Field(None, exclude_if=lambda value: value is None)
    window: int | None = Field(None, exclude_if=lambda value: value is None)
    window_right: int | None = Field(None, exclude_if=lambda value: value is None)
    scale: float | None = Field(None, exclude_if=lambda value: value is None)
    softcap: float | None = Field(None, exclude_if=lambda value: value is None)
    norm_function: str = Field("rms_norm", exclude_if=lambda value: value == "rms_norm")
    qkv_norm_over: str = Field("head", exclude_if=lambda value: value == "head")
    qkv_bias: Items[str] = Field((), exclude_if=lambda value: not value)
    gate: str = Field("none", exclude_if=lambda value: value == "none")
    convolution: Items[str] = Field((), exclude_if=lambda value: not value)
    value_residual: ValueResidual = Field("none", exclude_if=lambda value: value == "none")
    value_residual_weight: float = Field(0.5, exclude_if=lambda value: value == 0.5)
    place: Place = Field("self", exclude_if=lambda value: value == "self")

    modules: ClassVar[dict[str, str]] = {
        "self": "lit_llm.components.attention.module:SelfAttention",
        "cross": "lit_llm.components.attention.module:CrossAttention",
        "merged": "lit_llm.components.attention.module:MergedAttention",
        "shared": "lit_llm.components.attention.module:SharingAttention",
    }

    @property
    def module(self) -> str:  # type: ignore[override]
        """Path of its module."""
        return self.modules[self.place]

    @property
    def window_sides(self) -> Window | None:
        """(n, m): visible keys are fewer than n tokens before the query and m after it; None: all are visible."""
        return None if self.window is None else (self.window, self.window_right or self.window)

    @property
    def width(self) -> int:
        """Entries of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Entries of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def rotary_entries(self) -> int:
        """Entries of each head that RoPE rotates."""
        return round(self.head_dim * self.rope_fraction)

    def matrix_kind(self, name: str) -> MatrixKind:
        return "table" if is_convolution(name) else MATRICES.get(name.removesuffix(".weight"), "hidden")

    @property
    def source_matrices(self) -> tuple[str, ...]:
        return ("k.weight", "v.weight") if self.place == "cross" else ()

    def at_base_head_dim(self, base: int) -> Self:
        """The attention at the base model's head_dim, as in `Part`; a written `scale` is the base model's."""
        scale = (base**-0.5 if self.scale is None else self.scale) * base / self.head_dim
        usual = math.isclose(scale, self.head_dim**-0.5, rel_tol=1e-12)
        return self.model_copy(update={"scale": None if usual else scale})

    @property
    def without_flex(self) -> str:
        if self.relative_bias in ("per_layer", "shared"):
            return "the gradient of a learned relative bias would be added up in varying order"
        if self.head_dim < NARROWEST:
            return f"heads of {self.head_dim} entries are narrower than {NARROWEST}"
        return ""

    @property
    def smallest(self) -> dict[str, int]:
        # Which frequencies are scaled depends on all of them, and a share of few entries is no whole number.
        return {} if self.rope_scaling == "linear" and self.rope_fraction == 1 else {"head_dim": self.head_dim}

    @property
    def differs_by_stack(self) -> str:
        if self.relative_bias in ("per_layer", "shared"):
            return "a learned relative bias has distances to later tokens in an encoder alone"
        return NEIGHBOURS if self.convolution else ""

    @property
    def gate_width(self) -> int:
        """Factors of the gate on one token's output; 0 without a gate."""
        return {"none": 0, "per_head": self.heads, "per_element": self.width}[self.gate]

    @property
    def shared_kv(self) -> bool:
        """True where keys and values are made once for several layers (YOCO, arXiv 2405.05254), and not here."""
        return self.place == "shared"

    @property
    def projected(self) -> str:
        """Letters of those among queries, keys and values that are projected here."""
        return "q" if self.shared_kv else "qkv"

    def settings(self) -> dict[str, Any]:
        """`Part.settings` without `place`, which no study sets."""
        return {key: value for key, value in super().settings().items() if key != "place"}

    # --- parameters ---

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        keys = (self.kv_width, self._memory_width(widths))
        shapes: dict[str, TensorShape] = {"q.weight": (self.width, widths.row)}
        if not self.shared_kv:
            shapes |= {"k.weight": keys, "v.weight": keys}
        if self.gate_width:
            shapes["gate.weight"] = (self.gate_width, widths.row)
        shapes["out.weight"] = (widths.row, self.width)
        shapes |= self._bias_shapes(self.projected)
        if self.qkv_norm_scale:
            shapes |= self._scale_shapes(self.projected)
        if self.output_norm_scale:
            entries = {"head": self.head_dim, "concat": self.width, "after_out": widths.row}
            shapes["output_scale"] = (entries[self.output_norm],)
        if self.relative_bias == "per_layer":
            shapes["relative_bias.weight"] = self._bias_shape
        if self.value_residual == "learned":
            shapes["value_residual.weights"] = (2,)
        return shapes | convolution_shapes(self.convolved(widths.row))

    def convolved(self, width: int) -> dict[str, int]:
        """{name: entries of a token} of the convolutions. width: that of the residual stream."""
        names = {"input": {"input": width}, "qkv": {"q": self.width, "k": self.kv_width, "v": self.kv_width}}
        return {name: entries for place in self.convolution for name, entries in names[place].items()}

    def norm_entries(self, part: str) -> int:
        """Entries of the queries, keys or values of one token that are normalised together."""
        return self.head_dim if self.qkv_norm_over == "head" else self.width if part == "q" else self.kv_width

    def _scale_shapes(self, parts: str) -> dict[str, TensorShape]:
        return {f"qkv_scale.{part}": (self.norm_entries(part),) for part in self.qkv_norm if part in parts}

    def _bias_shapes(self, parts: str) -> dict[str, TensorShape]:
        return {
            f"{part}.bias": (self.width if part == "q" else self.kv_width,) for part in self.qkv_bias if part in parts
        }

    def stack_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        return {"relative_bias.weight": self._bias_shape} if self.relative_bias == "shared" else {}

    def _memory_width(self, widths: Widths) -> int:
        """Input width of W_k and W_v."""
        return widths.source if self.place == "cross" else widths.row

    @property
    def _bias_shape(self) -> TensorShape:
        return (self.relative_buckets or 0, self.heads)

    def shared_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        """{name: shape} of the parameters that make the shared keys and values."""
        keys = (self.kv_width, widths.row)
        matrices = {"k.weight": keys, "v.weight": keys, **self._bias_shapes("kv")}
        return {**matrices, **(self._scale_shapes("kv") if self.qkv_norm_scale else {})}

    @property
    def frequencies(self) -> tuple[object, ...]:
        """Settings on which the rotary frequencies depend."""
        scaling = self.rope_factor, self.rope_scaling, self.rope_original_length
        return (self.rope_theta, self.rope_fraction, *scaling)

    @property
    def shared(self) -> tuple[object, ...]:
        """Settings on which the shared keys and values depend; equal in all layers that share them."""
        norms = tuple(part for part in self.qkv_norm if part != "q")
        normed = (norms, self.qkv_norm_over, self.qkv_norm_scale, self.norm_function, self.norm_eps) if norms else ()
        biases = tuple(part for part in self.qkv_bias if part != "q")
        return (self.kv_heads, self.head_dim, biases, self.rope, *self.frequencies, *normed)

    # --- FLOPs ---

    @property
    def for_last_token(self) -> bool:
        return self.shared_kv

    def products(self, widths: Widths) -> int:
        convolved = KERNEL * sum(self.convolved(widths.row).values())
        memory = 0 if self.place == "cross" else self._memory_products(widths)
        return self._query_products(widths) + memory + convolved

    def _query_products(self, widths: Widths) -> int:
        """Entries of W_q, W_o and the gate's matrix, which are multiplied once per query token."""
        return (2 * self.width + self.gate_width) * widths.row

    def _memory_products(self, widths: Widths) -> int:
        """Entries of W_k and W_v, which are multiplied once per key token."""
        return 0 if self.shared_kv else 2 * self._memory_width(widths) * self.kv_width

    def shared_products(self, widths: Widths) -> int:
        """Entries of the shared W_k and W_v, which are multiplied once per token."""
        return 2 * widths.row * self.kv_width

    def pairs(self, example: Example) -> list[tuple[float, float]]:
        if self.place == "cross":
            return [(example.source, example.source_pairs())]
        row = [(example.before + example.row, example.row_pairs(self.window_sides))]
        return [*row, (example.source, example.source_pairs())] if self.place == "merged" else row

    def flops(self, example: Example, widths: Widths) -> float:
        memory = 0.0 if example.decoding or self.place not in ("cross", "merged") else example.source
        products = example.row * self.products(widths) + memory * self._memory_products(widths)
        return 2.0 * products + sum(self.score_flops(pairs) for _, pairs in self.pairs(example))

    def score_flops(self, pairs: float) -> float:
        """FLOPs of QKᵀ and of the weighted sum over values, for that many visible (query, key) pairs."""
        return 2 * 2 * self.width * pairs

    # --- memory ---

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes of the keys and values of the row, up to its window, and of the source; states of convolutions."""
        states = CacheBytes(states=entry * convolution_state(self.convolved(widths.row)))
        return self._key_value_bytes(2 * self.kv_width * entry, encoder) + states

    def _key_value_bytes(self, each: int, encoder: bool) -> CacheBytes:
        if self.place == "cross":
            return CacheBytes(per_source_token=each)
        if self.place == "shared":
            return CacheBytes()  # kept once, for all layers
        source = each if self.place == "merged" else 0
        if self.window is not None:
            windows = ((self.window, each),)
            return CacheBytes(per_source_token=source, windows=windows, prompt_in_windows=not encoder)
        return CacheBytes(per_source_token=source if encoder else each, per_generated_token=each)

    @property
    def reads_encoder(self) -> bool:
        return self.place in ("cross", "merged")

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        memory = example.source if self.place == "cross" else 0.0 if self.shared_kv else example.row
        kept = example.row * self._query_bytes(widths, precision) + memory * self._key_bytes(precision)
        if self.reads_encoder and precision.autocast:  # a copy for W_k and W_v
            kept += example.source * self._memory_width(widths) * precision.compute
        if self.place == "merged":  # a second copy of the keys, concatenated with the target's
            kept += example.source * self._key_bytes(precision)
            kept += (example.source + example.row) * 2 * self.kv_width * precision.compute
        if self.place != "merged" and example.block and (self.without_flex or not precision.flex):
            # A copy of the output, with zeros where no key is seen.
            kept += example.row * self.width * precision.compute
        if self.place in ("self", "shared") and self._is_band(example) and not self._in_blocks(precision):
            kept += self._band_bytes(example, precision)
        kept += convolution_activations(self.convolved(widths.row), example.row) * precision.compute
        if self.value_residual == "learned":  # the values before they are mixed, for the gradients of the weights
            kept += example.row * self.kv_width * precision.compute
        return kept + self._score_bytes(example, precision)

    def bytes_for_later_layers(self, example: Example, precision: Precision) -> float:
        return example.row * self.kv_width * precision.compute if self.value_residual == "first" else 0.0

    def _query_bytes(self, widths: Widths, precision: Precision) -> int:
        """Bytes kept for each query token."""
        # Queries in the kernel's precision, and its output, which W_o reads too unless a norm is in between.
        kept = 2 * self.width * precision.compute
        if "q" in self.qkv_norm:
            kept += self.width * precision.compute  # what the norm reads
        if self.output_norm in ("head", "concat"):
            kept += self.width * precision.compute  # what W_o reads; the norm reads the kernel's output
        if self.gate_width:
            kept += (self.width + self.gate_width) * precision.compute  # what W_o reads, and the factors
        if self.output_norm == "after_out":
            kept += widths.row * precision.compute
        return kept

    def _key_bytes(self, precision: Precision) -> int:
        """Bytes kept for each key token: keys and values for the kernel, and before their norms."""
        norms = ("k" in self.qkv_norm) + ("v" in self.qkv_norm)
        return self.kv_width * (2 + norms) * precision.compute

    def shared_activation_bytes(self, widths: Widths, precision: Precision) -> int:
        """Bytes kept for each token: the input of the shared W_k and W_v, and their outputs."""
        return widths.row * precision.compute + self._key_bytes(precision)

    def _is_band(self, example: Example) -> bool:
        if self.relative_bias != "none":
            return False
        return self.window_sides is not None and example.row >= BAND * band_size(self.window_sides, example.causal)

    def _band_bytes(self, example: Example, precision: Precision) -> float:
        """Bytes of a window computed as a band: copies of keys and values for the neighbouring blocks, and the blocks'
        masks as numbers."""
        assert self.window_sides is not None
        sides = 2 if example.causal else 3
        keys = 2 * (sides - 1) * self.kv_width
        return example.row * (keys + sides * band_size(self.window_sides, example.causal)) * precision.compute

    def _score_bytes(self, example: Example, precision: Precision) -> float:
        """Bytes for all (query, key) pairs, where no fused kernel avoids them: a cap's tanh and the weights, or a
        learned bias with its mask and the weights. With dropout of weights also its mask and the rest."""
        if self._in_blocks(precision):
            return 0.0
        weights = example.row * self._keys(example) * self.heads
        if self.softcap is None and self.relative_bias in ("none", "alibi"):
            return weights * precision.dropped_in_kernel
        entry = 2 * FLOAT32 + (precision.compute if precision.autocast else 0)
        return weights * (entry + precision.dropped_weights)

    def _keys(self, example: Example) -> float:
        if self.place == "cross":
            return example.source
        return example.row + (example.source if self.place == "merged" else 0)

    def _in_blocks(self, precision: Precision) -> bool:
        """True where FlexAttention computes it, by the blocks of its mask."""
        changed = self.softcap is not None or self.relative_bias != "none" or self.window_sides is not None
        return precision.flex and changed and not self.without_flex

    def shares_mask(self, precision: Precision) -> bool:
        return self._in_blocks(precision) or (self.relative_bias == "alibi" and self.softcap is None)

    def mask_bytes(self, example: Example, precision: Precision) -> float:
        """Bytes of the mask of a window that is not computed as a band, of a bias that is not learned, and of the
        masks of FlexAttention, which also a cap needs."""
        if self._in_blocks(precision):
            return float(block_mask_bytes(math.ceil(example.row), math.ceil(self._keys(example))))
        if self.relative_bias == "alibi" and self.softcap is None:
            return self.heads * example.row * self._keys(example) * precision.compute
        if self.window_sides is None or self._is_band(example):
            return 0.0
        return example.row * self._keys(example) * precision.compute

    def logit_bytes(self, example: Example, widths: Widths, rows: int) -> float:
        """Bytes of the scores of one chunk of queries, the bias on all queries, and queries, keys and values."""
        queries, keys = example.row, self._keys(example)
        if not queries or not keys:
            return 0.0
        row = rows * self.heads * keys
        scores = min(row * queries, max(SCORES, row)) * FLOAT32
        bias = 0.0 if self.relative_bias == "none" else self.heads * queries * keys * FLOAT32
        heads = rows * (2 * queries + 4 * keys) * self.width * FLOAT32
        return 3 * scores + bias + heads + rows * 4 * queries * widths.row * FLOAT32
