"""Modules of `ResolvedAttention`: attention to the row, to a source, to both, or by shared keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn, ones

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.attention.relative import RelativeBias, alibi_slopes, buckets_of, linear_bias
from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.attention.value_residual import FirstValues, ValueResidual
from lit_llm.components.convolution.cache import CacheWithStates, ConvolutionStates
from lit_llm.components.convolution.module import ConvolutionInputs, canon_inputs, canon_layers
from lit_llm.components.few_rows import Linear
from lit_llm.components.flex import FlexAttention, FlexMask, ScoreChange
from lit_llm.components.forward_context import CacheRows, ForwardContext, cast_once, is_filled
from lit_llm.components.kv_cache import Cache, KeyValues, TwoCaches
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.masks import AttentionMask, KernelMask, Mask, MergedMask
from lit_llm.components.norm.module import layer_norm, rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.rope import Frequencies, Rotation, rotate


class AttentionInputs(NamedTuple):
    """Inputs of an attention other than activations; see `LayerPart.prepare`."""

    mask: KernelMask | FlexMask
    q_rotation: Rotation | None = None
    k_rotation: Rotation | None = None
    cache: KeyValues | None = None
    source_BSD: Tensor | None = None
    """The encoder's output; None where there is none, or where the cache has its keys and values."""
    source_tokens: int = 0
    """Number of the row's first tokens that are the source; 0 where the source is separate, or in the cache."""
    source_rotation: Rotation | None = None
    source_cache: KeyValues | None = None
    both_caches: TwoCaches | None = None
    """The two caches above, for merged attention."""
    shared_kv: tuple[Tensor, Tensor] | None = None
    buckets: Tensor | None = None
    """T x S, or B x T x S: bucket of each query-key distance. Set only with `relative_bias: per_layer`."""
    first_values: FirstValues | None = None
    """Set only with a value residual."""
    convolution: ConvolutionInputs | None = None
    """Set only with convolutions."""


class Heads(nn.Module):
    """Projections, norms and rotations that make the queries, keys or values of an attention's heads."""

    config: ResolvedAttention
    qkv_scale: nn.ParameterDict
    convolution: nn.ModuleDict

    def heads(
        self, part: str, x_BTD: Tensor, rotation: Rotation | None, convolution: ConvolutionInputs | None = None
    ) -> Tensor:
        """Queries, keys or values of every head, B x H x T x K, convolved, normalised and rotated as configured."""
        projected = getattr(self, part)(x_BTD)
        if convolution is not None:
            projected = self.convolution[part](projected, convolution, part)
        # Norm and rotation come before the transposition, since they are cheaper on contiguous memory.
        x_BTHK = projected.unflatten(-1, (-1, self.config.head_dim))
        if part in self.config.qkv_norm:
            scale = self.qkv_scale[part] if self.config.qkv_norm_scale else None
            if self.config.qkv_norm_over == "concat":
                x_BTHK = self._normed(x_BTHK.flatten(2), scale).view_as(x_BTHK)
            else:
                x_BTHK = self._normed(x_BTHK, scale)
        if rotation is not None:
            x_BTHK = rotate(x_BTHK, rotation)
        return x_BTHK.transpose(1, 2)

    def _normed(self, x: Tensor, scale: Tensor | None) -> Tensor:
        # By this file's names, which a profile of a step replaces.
        function = rms_norm if self.config.norm_function == "rms_norm" else layer_norm
        return function(x, scale, self.config.norm_eps)


def _scales(config: ResolvedAttention, parts: str) -> nn.ParameterDict:
    scaled = config.qkv_norm if config.qkv_norm_scale else ()
    return nn.ParameterDict({part: nn.Parameter(ones(config.norm_entries(part))) for part in scaled if part in parts})


def rotation_of(context: ForwardContext, positions: str, config: ResolvedAttention) -> Rotation | None:
    """The RoPE rotation at the named positions; None with `rope: none`."""
    if config.rope == "none":
        return None
    settings = config.rope_theta, config.rotary_entries, config.rope_factor, config.rope_scaling
    return context.rotation(positions, Frequencies(*settings, config.rope_original_length or 0))


class SharedKeyValues(Heads):
    """Keys and values that are made once for several layers:

    x ─┬ k ─[norm k]─[RoPE]─▶ keys
       └ v ─[norm v]────────▶ values of all layers that share them

    YOCO (arXiv 2405.05254, eq. 5): made once, of the self-decoder's output.
    """

    def __init__(self, config: ResolvedAttention, d_model: int) -> None:
        """config: that of any attention that shares the keys and values."""
        super().__init__()
        self.config = config
        self.k = Linear(d_model, config.kv_width, "k" in config.qkv_bias)
        self.v = Linear(d_model, config.kv_width, "v" in config.qkv_bias)
        self.qkv_scale = _scales(config, "kv")

    def forward(self, x_BTD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """B x T x D -> twice B x H x T x K."""
        x_BTD = cast_once(x_BTD)
        return self.heads("k", x_BTD, rotation), self.heads("v", x_BTD, None)


class Attention(Heads, LayerPart):
    """Multi-head attention of an input to a memory:

    x ────── q ─[norm q]─[RoPE]─┐         [bias]
    memory ┬ k ─[norm k]─[RoPE]─┼─ softmax(QKᵀ/√K)V ─[head norm | concat norm]─[×]─ out ─[after_out norm]─▶
           └ v ─[norm v]────────┘  within [window], [softcap]                   │
    x ──────[gate ─ sigmoid]────────────────────────────────────────────────────┘

    Subclasses define the memory.
    """

    def __init__(self, config: ResolvedAttention, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config
        self.relative_bias: RelativeBias | None = None
        memory = widths.source if config.place == "cross" else widths.row
        self.q = Linear(widths.row, config.width, "q" in config.qkv_bias)
        if not config.shared_kv:
            self.k = Linear(memory, config.kv_width, "k" in config.qkv_bias)
            self.v = Linear(memory, config.kv_width, "v" in config.qkv_bias)
        self.gate = Linear(widths.row, config.gate_width) if config.gate_width else None
        self.out = Linear(config.width, widths.row)
        self.dot_product = DotProduct(config.scale, config.softcap)
        self.qkv_scale = _scales(config, config.projected)
        entries = {"none": 0, "head": config.head_dim, "concat": config.width, "after_out": widths.row}
        self.output_scale = nn.Parameter(ones(entries[config.output_norm])) if config.output_norm_scale else None

    def keys_values(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of every token that the queries may attend to: B x H x S x K each."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        """B x T x D -> B x T x D."""
        q = self.heads("q", x_BTD, inputs.q_rotation, self._convolution_of_heads(inputs))
        k, v = self.keys_values(x_BTD, inputs)
        bias = None if self.relative_bias is None else self.relative_bias(inputs.buckets)
        return self.project(self.dot_product(q, k, v, inputs.mask, bias).transpose(1, 2), x_BTD)

    def project(self, out_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        """Output of the heads' weighted values, normalised and gated as configured: B x T x D."""
        if self.config.output_norm == "head":
            out_BTHK = self.output_norm(out_BTHK)
        joined_BTD = out_BTHK.flatten(2)
        if self.config.output_norm == "concat":
            joined_BTD = self.output_norm(joined_BTD)
        if self.gate is not None:
            joined_BTD = self._gated(joined_BTD, x_BTD)
        out_BTD = self.out(joined_BTD)
        return self.output_norm(out_BTD) if self.config.output_norm == "after_out" else out_BTD

    def _gated(self, joined_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """Entries of all heads, each times its head's factor or its own."""
        assert self.gate is not None
        factors_BTHk = self.gate(x_BTD).sigmoid().unflatten(-1, (self.config.heads, -1))
        return (joined_BTD.unflatten(-1, (self.config.heads, -1)) * factors_BTHk).flatten(2)

    def output_norm(self, x: Tensor) -> Tensor:
        """Norm over the last dimension, with the scale where it is learned."""
        return self._normed(x, self.output_scale)

    def _flex(self, context: ForwardContext) -> FlexAttention | None:
        """FlexAttention, where this pass uses it and it supports this attention."""
        return None if self.config.without_flex else context.flex

    def _kernel_mask(
        self,
        context: ForwardContext,
        key: object,
        make: Callable[[], Mask],
        keys: int,
        bias: Tensor | None = None,
    ) -> KernelMask | FlexMask:
        """The mask of `key`, shared by all layers that use the same mask and kernel.

        bias: the bias on the scores that layers share, made once in this pass.
        """
        config, size, flex = self.config, (context.queries, keys), self._flex(context)
        scores, biased = config.softcap is not None, config.relative_bias != "none"

        def made() -> KernelMask | FlexMask:
            mask, like = make(), (context.dtype, context.device)
            if flex is not None and (scores or biased or not mask.plain):
                alibi = None
                if biased:
                    slopes_H = torch.tensor(alibi_slopes(config.heads), device=context.device)
                    alibi = slopes_H, context.positions["self"]
                return FlexMask(mask, size, like, flex, ScoreChange(config.softcap, alibi))
            return KernelMask(mask, size, like, scores=scores, bias=biased if bias is None else bias)

        changes = (scores, biased, id(bias)) if flex is None else (config.softcap, biased and config.heads)
        return context.once(("mask", key, keys, changes), made)

    def _row_mask(
        self, context: ForwardContext, cache: KeyValues | None
    ) -> tuple[object, Callable[[], AttentionMask], int]:
        """(key, mask, number of keys) of self-attention within the row, or within its cache."""
        if cache is not None and is_filled(cache):
            keys = cache.capacity + context.queries - 1
            return ("kept", cache.window), lambda: cache.mask(context.mask), keys
        window = self.config.window_sides
        return ("row", window), lambda: replace(context.mask, window=window), context.queries

    def _project_row(self, part: str, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        rotation = inputs.k_rotation if part == "k" else None
        return self.heads(part, x_BTD, rotation, self._convolution_of_heads(inputs))

    def _convolution_of_heads(self, inputs: AttentionInputs) -> ConvolutionInputs | None:
        return inputs.convolution if "qkv" in self.config.convolution else None


class SelfAttention(Attention):
    """An attention whose memory is its input. Distances within a row are defined, so it may have a relative bias.

    Value residual (arXiv 2410.17897), in all layers but the first:

    first layer's v ─[norm v]─ λ₁ ─(+)─▶ values
    x ─ v ───────────[norm v]─ λ₂ ──┘

    Convolutions (arXiv 2512.17351):

    x ─[convolution A]─ q, k or v ─[convolution B]─[norm]─[RoPE]─▶
    """

    def __init__(self, config: ResolvedAttention, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.causal = causal
        self.relative_bias = self._new_bias() if config.relative_bias == "per_layer" else None
        self.value_residual = None if config.value_residual == "none" else ValueResidual(config)
        self.convolution = canon_layers(config.convolved(widths.row), causal)

    def _new_bias(self) -> RelativeBias:
        assert self.config.relative_buckets is not None
        return RelativeBias(self.config.relative_buckets, self.config.heads)

    def stack_modules(self) -> dict[str, nn.Module]:
        return {"relative_bias": self._new_bias()} if self.config.relative_bias == "shared" else {}

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        """B x T x D -> B x T x D."""
        if inputs.convolution is not None and "input" in self.config.convolution:
            x_BTD = self.convolution["input"](x_BTD, inputs.convolution, "input")
        return super().forward(x_BTD, inputs)

    def prepare(  # type: ignore[override]
        self, context: ForwardContext, cache: KeyValues | CacheWithStates | None
    ) -> AttentionInputs:
        states: ConvolutionStates | None = None
        if isinstance(cache, CacheWithStates):
            states = cache.states
            cache = cast(KeyValues, cache.cache)
        rotation = rotation_of(context, "self", self.config)
        buckets, bias = self._buckets_or_bias(context, cache)
        mask = self._kernel_mask(context, *self._row_mask(context, cache), bias)
        first_values = None
        if self.config.value_residual != "none":
            first_values = context.once("first values", FirstValues)
        convolution = canon_inputs(context, self.causal, states) if self.config.convolution else None
        return AttentionInputs(
            mask, rotation, rotation, cache, buckets=buckets, first_values=first_values, convolution=convolution
        )

    def _buckets_or_bias(self, context: ForwardContext, cache: KeyValues | None) -> tuple[Tensor | None, Tensor | None]:
        """(buckets of distances for this layer's bias, bias that all layers share); None where unused.

        FlexAttention computes ALiBi from positions, and supports no learned bias.
        """
        config = self.config
        if config.relative_bias == "none" or self._flex(context) is not None:
            return None, None
        kept = cache if is_filled(cache) else None
        queries = context.positions["self"]

        def keys() -> Tensor:
            return queries if kept is None else kept.positions()

        window = None if kept is None else (kept.window,)
        if config.relative_bias == "alibi":
            key = ("alibi", config.heads, window)
            return None, context.once(key, lambda: linear_bias(queries, keys(), config.heads))

        def made() -> Tensor:
            assert config.relative_buckets is not None
            assert config.relative_distance is not None
            return buckets_of(queries, keys(), config.relative_buckets, config.relative_distance, self.causal)

        buckets = context.once(("buckets", config.relative_buckets, config.relative_distance, window), made)
        if config.relative_bias == "per_layer":
            return buckets, None
        key_of_bias = ("bias", config.heads, config.relative_buckets, config.relative_distance, window)
        return None, context.once(key_of_bias, lambda: context.stack_modules["relative_bias"](buckets))

    def keys_values(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        k, v = self._project_row("k", x_BTD, inputs), self._project_row("v", x_BTD, inputs)
        if self.value_residual is not None:
            assert inputs.first_values is not None
            v = self.value_residual(v, inputs.first_values)
        return (k, v) if inputs.cache is None else inputs.cache.add(k, v)

    def new_cache(self, rows: CacheRows) -> Cache:
        keys_values = KeyValues(rows.self_lengths, self.config.window)
        if not self.config.convolution:
            return keys_values
        return CacheWithStates(keys_values, ConvolutionStates(rows.self_lengths))


class CrossAttention(Attention):
    """An attention whose memory is the encoder's output."""

    def prepare(self, context: ForwardContext, cache: KeyValues | None) -> AttentionInputs:  # type: ignore[override]
        source = context.source
        assert source is not None
        mask = self._kernel_mask(context, "source", lambda: source.mask, source.tokens)
        states_BSD = source.states_BSD
        return AttentionInputs(
            mask,
            rotation_of(context, self.config.rope, self.config),
            source_BSD=states_BSD,
            source_rotation=None if states_BSD is None else self.source_rotation(context),
            source_cache=cache,
        )

    def keys_values(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        return self._source_keys_values(inputs.source_BSD, inputs)

    def _source_keys_values(self, source_BSD: Tensor | None, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of a source, computed and added to the cache, or read from it."""
        if source_BSD is None:
            assert inputs.source_cache is not None
            return inputs.source_cache.cached()
        k, v = self.of_source(source_BSD, inputs.source_rotation)
        return (k, v) if inputs.source_cache is None else inputs.source_cache.add(k, v)

    def source_rotation(self, context: ForwardContext) -> Rotation | None:
        """Rotation of the source's keys; None where they are not rotated."""
        return rotation_of(context, "source", self.config)

    def of_source(self, source_BSD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output: B x H x S x K each."""
        source_BSD = cast_once(source_BSD)
        return self.heads("k", source_BSD, rotation), self.heads("v", source_BSD, None)

    def new_cache(self, rows: CacheRows) -> KeyValues:
        assert rows.source is not None
        return KeyValues(rows.source)


class MergedAttention(SelfAttention, CrossAttention):
    """An attention whose memory is its input and the encoder's output, in one softmax:

    x ──────┬─ q ─[norm]─[RoPE]─────────────────┐
            ├─ k ─[norm]─[RoPE]─┬─ concatenated ─┼─ softmax over source and target ─▶ as in `Attention`
    source ─┴─ k ─[norm]─[RoPE]─┘   (v alike)    │
              the same W_k, W_v                  ┘

    T5Gemma 2 (arXiv 2512.14856): self- and cross-attention with the same four matrices and one softmax. T5Gemma 2 does
    not rotate the source's keys (`rope: restart`); with `continuous` they are rotated, and the target's positions
    continue after the source.
    """

    def prepare(self, context: ForwardContext, cache: TwoCaches | None) -> AttentionInputs:  # type: ignore[override]
        source = context.source
        assert source is not None
        row_cache = None if cache is None else cache.row
        continuous = self.config.rope == "continuous"
        rotation = rotation_of(context, "continuous" if continuous else "self", self.config)
        key, row, keys = self._row_mask(context, row_cache)

        def merged() -> Mask:
            return MergedMask(row(), source.mask, source.tokens)

        states_BSD = source.states_BSD
        return AttentionInputs(
            self._kernel_mask(context, ("merged", key), merged, keys + source.tokens),
            rotation,
            rotation,
            row_cache,
            source_BSD=states_BSD,
            source_rotation=None if states_BSD is None else self.source_rotation(context),
            source_cache=None if cache is None else cache.source,
            both_caches=cache,
        )

    def source_rotation(self, context: ForwardContext) -> Rotation | None:
        return super().source_rotation(context) if self.config.rope == "continuous" else None

    def keys_values(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        row_kv = SelfAttention.keys_values(self, x_BTD, inputs)
        if inputs.source_BSD is None and inputs.both_caches is not None:
            return inputs.both_caches.joined(row_kv[0].shape[2])
        of_source = self._source_keys_values(inputs.source_BSD, inputs)
        return torch.cat([of_source[0], row_kv[0]], dim=2), torch.cat([of_source[1], row_kv[1]], dim=2)

    def new_cache(self, rows: CacheRows) -> TwoCaches:  # type: ignore[override]
        assert rows.source is not None
        return TwoCaches(KeyValues(rows.self_lengths, self.config.window), KeyValues(rows.source))


class SharingAttention(Attention):
    """An attention to the keys and values of a `SharedKeyValues`:

    x ─ q ─[norm q]─[RoPE]─┐
    shared keys ───────────┼─ softmax(QKᵀ/√K)V ─▶ as in `Attention`
    shared values ─────────┘

    A layer of YOCO's cross-decoder: attention over the row, with separate W_q and W_o in each layer.
    """

    def prepare(self, context: ForwardContext, cache: None) -> AttentionInputs:  # type: ignore[override]
        shared = context.shared_kv
        assert shared is not None
        mask = self._kernel_mask(context, "shared", lambda: context.mask, shared[0].shape[2])
        return AttentionInputs(mask, rotation_of(context, "self", self.config), shared_kv=shared)

    def keys_values(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        assert inputs.shared_kv is not None
        return inputs.shared_kv
