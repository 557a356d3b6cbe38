"""The attention that `ResolvedAttention` describes: one module for self, cross, causal, full and prefix."""

from __future__ import annotations

import torch
from torch import Tensor, nn, ones

from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.attention.kv_cache import KeyValues
from lit_llm.components.attention.masks import AttentionMask, Merged
from lit_llm.components.attention.relative import RelativeBias
from lit_llm.components.attention.rope import Rotation, rotate
from lit_llm.components.norm.module import rms_norm


class Heads(nn.Module):
    """From activations to the queries, keys or values of an attention's heads: what projects, and what norms."""

    config: ResolvedAttention
    qkv_scale: nn.ParameterDict

    def heads(self, part: str, x_BTD: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries, keys or values of every head, B x H x T x K, normalised and rotated where they should be."""
        projection = getattr(self, part)
        # Norm and rotation before the transposition: on contiguous memory they are cheaper.
        x_BTHK = projection(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        if part in self.config.qkv_norm:
            scale = self.qkv_scale[part] if self.config.qkv_norm_scale else None
            x_BTHK = rms_norm(x_BTHK, scale, self.config.norm_eps)
        if rotation is not None:
            x_BTHK = rotate(x_BTHK, rotation)
        return x_BTHK.transpose(1, 2)


def _scales(config: ResolvedAttention, parts: str) -> nn.ParameterDict:
    scaled = config.qkv_norm if config.qkv_norm_scale else ()
    return nn.ParameterDict({part: nn.Parameter(ones(config.head_dim)) for part in scaled if part in parts})


class SharedKeyValues(Heads):
    """
    x ─┬ k ─[norm k]─[RoPE]─▶ keys
       └ v ─[norm v]────────▶ values of all layers that share them

    YOCO (arXiv 2405.05254, eq. 5): made once, of the self-decoder's output.
    """

    def __init__(self, config: ResolvedAttention, d_model: int) -> None:
        """config: of any of the attentions that share them."""
        super().__init__()
        self.config = config
        self.k = nn.Linear(d_model, config.kv_width, bias=False)
        self.v = nn.Linear(d_model, config.kv_width, bias=False)
        self.qkv_scale = _scales(config, "kv")

    def forward(self, x_BTD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """B x T x D -> twice B x H x T x K."""
        return self.heads("k", x_BTD, rotation), self.heads("v", x_BTD, None)


class _Attending(Heads):
    """What all attentions have; keys and values of their own where they do not share them."""

    def __init__(self, config: ResolvedAttention, d_model: int, memory_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(d_model, config.width, bias=False)
        if not config.shared_kv:
            self.k = nn.Linear(memory_width or d_model, config.kv_width, bias=False)
            self.v = nn.Linear(memory_width or d_model, config.kv_width, bias=False)
        self.out = nn.Linear(config.width, d_model, bias=False)
        self.dot_product = DotProduct(config.scale, config.softcap)
        self.qkv_scale = _scales(config, config.own_parts)
        widths = {"none": 0, "head": config.head_dim, "concat": config.width, "after_out": d_model}
        self.output_scale = nn.Parameter(ones(widths[config.output_norm])) if config.output_norm_scale else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, visible: AttentionMask | Merged, bias: Tensor | None = None
    ) -> Tensor:
        """From the heads' queries, keys and values to what the layer adds: B x T x D."""
        out_BTHK = self.dot_product(q, k, v, visible, bias).transpose(1, 2)
        if self.config.output_norm == "head":
            out_BTHK = self.output_norm(out_BTHK)
        joined_BTD = out_BTHK.flatten(2)
        if self.config.output_norm == "concat":
            joined_BTD = self.output_norm(joined_BTD)
        out_BTD = self.out(joined_BTD)
        return self.output_norm(out_BTD) if self.config.output_norm == "after_out" else out_BTD

    def output_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.output_scale, self.config.norm_eps)


class Attention(_Attending):
    """
    x ────── q ─[norm q]─[RoPE]─┐         [bias]
    memory ┬ k ─[norm k]─[RoPE]─┼─ softmax(QKᵀ/√K)V ─[head norm | concat norm]─ out ─[after_out norm]─▶
           └ v ─[norm v]────────┘  within [window], [softcap]

    In self-attention memory is x; in cross-attention it is the encoder's output, `memory_width` wide.
    """

    def forward(
        self,
        x_BTD: Tensor,
        kv_BSD: Tensor | None,
        visible: AttentionMask,
        query_rotation: Rotation | None = None,
        key_rotation: Rotation | None = None,
        cache: KeyValues | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """With a cache the memory is what is new; none at all when everything is in the cache.

        bias: what is added to the scores, H x T x S or B x H x T x S.
        """
        visible = _seen(visible, self.config, cache)
        q = self.heads("q", x_BTD, query_rotation)
        if kv_BSD is None:
            assert cache is not None
            k, v = cache.held()
        else:
            k = self.heads("k", kv_BSD, key_rotation)
            v = self.heads("v", kv_BSD, None)
            if cache is not None:
                k, v = cache.add(k, v)
        return self.attend(q, k, v, visible, bias)


class SelfAttention(Attention):
    """An attention whose memory is its input, so that distances within a row mean something: it may have a bias."""

    def __init__(self, config: ResolvedAttention, d_model: int, causal: bool) -> None:
        super().__init__(config, d_model)
        self.relative_bias = relative_bias(config, causal) if config.relative_bias == "per_layer" else None


class MergedAttention(SelfAttention):
    """
    x ──────┬─ q ─[norm]─[RoPE]─────────────────┐
            ├─ k ─[norm]─[RoPE]─┬─ concatenated ─┼─ softmax over target and source ─▶ as in `Attention`
    source ─┴─ k ─[norm]─[RoPE]─┘   (v alike)    │
              the same W_k, W_v                  ┘

    T5Gemma 2 (arXiv 2512.14856): self- and cross-attention with the same four matrices and one softmax. There the
    source's keys are not rotated (`rope: restart`); with `continuous` they are, and the target goes on where the source
    ended.
    """

    def forward_merged(
        self,
        x_BTD: Tensor,
        source_BSD: Tensor | None,
        visible: AttentionMask,
        source_visible: AttentionMask,
        rotation: Rotation | None,
        source_rotation: Rotation | None,
        cache: KeyValues | None = None,
        source_cache: KeyValues | None = None,
    ) -> Tensor:
        """With caches x_BTD is what is new, and the source is given the first time only."""
        visible = _seen(visible, self.config, cache)
        q, k, v = self.heads("q", x_BTD, rotation), self.heads("k", x_BTD, rotation), self.heads("v", x_BTD, None)
        if cache is not None:
            k, v = cache.add(k, v)
        if source_BSD is None:
            assert source_cache is not None
            of_source = source_cache.held()
        else:
            of_source = self.heads("k", source_BSD, source_rotation), self.heads("v", source_BSD, None)
            if source_cache is not None:
                of_source = source_cache.add(*of_source)
        k, v = torch.cat([k, of_source[0]], dim=2), torch.cat([v, of_source[1]], dim=2)
        return self.attend(q, k, v, visible.merged(source_visible, of_source[0].shape[2]))


class SharingAttention(_Attending):
    """
    x ─ q ─[norm q]─[RoPE]─┐
    shared keys ───────────┼─ softmax(QKᵀ/√K)V ─▶ as in `Attention`
    shared values ─────────┘

    A layer of YOCO's cross-decoder: over its own row, with W_q and W_o of its own.
    """

    def forward(self, x_BTD: Tensor, k: Tensor, v: Tensor, visible: AttentionMask, rotation: Rotation | None) -> Tensor:
        """k, v: what `SharedKeyValues` has made of all tokens that may be seen, B x H x S x K each."""
        return self.attend(self.heads("q", x_BTD, rotation), k, v, visible)


def _seen(visible: AttentionMask, config: ResolvedAttention, cache: KeyValues | None) -> AttentionMask:
    """What is seen within the window: to be asked before the cache takes what is new."""
    if cache is not None and cache.k is not None:
        return cache.visible(visible)
    return visible.within(config.reach)


def relative_bias(config: ResolvedAttention, causal: bool) -> RelativeBias:
    """The bias that an attention's configuration asks for."""
    assert config.relative_buckets is not None
    assert config.relative_distance is not None
    return RelativeBias(config.relative_buckets, config.relative_distance, config.heads, causal)
