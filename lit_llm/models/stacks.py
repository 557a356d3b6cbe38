"""Blocks and stacks of them: an explicit list of layers, each built from its own config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.components.attention.masks import AttentionMask
from lit_llm.components.attention.module import (
    Attention,
    MergedAttention,
    SelfAttention,
    SharingAttention,
    relative_bias,
)
from lit_llm.components.attention.rope import Rotation, Rotations
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.norm.module import Norm
from lit_llm.components.partial_attention.module import PartialAttention
from lit_llm.components.retention.module import Retention
from lit_llm.models.cache import LayerCache
from lit_llm.models.resolve import Layer, ResolvedModel


class Block(nn.Module):
    """
    x ─┬─ norm ─ attention[self] ─ drop ─(+)─┬─ norm ─ attention[cross] ─ drop ─(+)─┬─ norm ─ feed_forward ─ drop ─(+)─▶
       └──────────────────────────────────┘  │        ▲ encoder_BSD              │  └────────────────────────────────┘
                                             └───────────────────────────────────┘
                                               only in an encoder-decoder's decoder; merged: in attention[self]

    In its place, in decoder-only layers that have one: ─┬─ norm ─┬─────────── attention[partial] ─ drop ─(+)─
                                                         │        └ source's tokens ─▲                     │
                                                         └─────────────────────────────────────────────────┘
    In a decoder-only model retention may stand in place of attention[self], and in a decoder-decoder the second half's
    attention[self] has no keys and values of its own. drop is dropout, zero unless training sets it.

    That is `norm.placement: pre`. Where the norms stand otherwise, of each f:

    post      x ─┬─ f ─ drop ─(+)─ post_norm ─▶      sandwich  x ─┬─ norm ─ f ─ post_norm ─ drop ─(+)─▶
                 └─────────────┘                                  └─────────────────────────────────┘
    output    as sandwich, without the first
    """

    def __init__(self, layer: Layer, model: ResolvedModel, side: str, first: bool) -> None:
        """side: encoder or decoder; first: whether it is the first of its stack."""
        super().__init__()
        width, norm = model.width(side), model.norm
        self.placement = norm.placement
        self.sequence_mixer = "self_attention" if layer.retention is None else "retention"
        self._norms(self.sequence_mixer, norm, width, skip=first and norm.skip_first)
        self.self_attention: SelfAttention | SharingAttention | None = None
        self.retention = None if layer.retention is None else Retention(layer.retention, width)
        if (own := layer.self_attention) is not None and own.shared_kv:
            self.self_attention = SharingAttention(own, width)
        elif own is not None:
            kind = MergedAttention if layer.merged else SelfAttention
            self.self_attention = kind(own, width, causal=side == "decoder")
        self.cross_attention = None
        if layer.cross_attention is not None:
            self._norms("cross_attention", norm, width)
            self.cross_attention = Attention(layer.cross_attention, width, model.width("encoder"))
        self.partial_attention = None
        if layer.partial_attention is not None:
            self._norms("partial_attention", norm, width)
            self.partial_attention = PartialAttention(layer.partial_attention, width)
        self._norms("feed_forward", norm, width)
        self.feed_forward = FeedForward(layer.feed_forward, width)
        self.dropout = nn.Dropout(0.0)

    def _norms(self, part: str, norm: NormConfig, width: int, skip: bool = False) -> None:
        """`<part>_norm` before it and `<part>_post_norm` after it; None where there is none."""
        after = norm.after or norm.placement == "post"
        self.add_module(f"{part}_norm", Norm(norm, width) if norm.before and not skip else None)
        self.add_module(f"{part}_post_norm", Norm(norm, width) if after else None)

    def norm_before(self, part: str) -> nn.Module | None:
        """The norm through which a part reads the residual stream."""
        return cast("nn.Module | None", getattr(self, f"{part}_norm"))

    def norm_of_added(self, part: str) -> nn.Module | None:
        """The norm of what a part adds to the residual stream."""
        return None if self.placement == "post" else cast("nn.Module | None", getattr(self, f"{part}_post_norm"))

    def _read(self, part: str, x_BTD: Tensor) -> Tensor:
        norm = self.norm_before(part)
        return x_BTD if norm is None else cast(Tensor, norm(x_BTD))

    def _added(self, part: str, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        if self.placement == "post":
            return cast(Tensor, getattr(self, f"{part}_post_norm")(x_BTD + self.dropout(out_BTD)))
        norm = self.norm_of_added(part)
        return x_BTD + self.dropout(out_BTD if norm is None else norm(out_BTD))

    def forward(
        self,
        x_BTD: Tensor,
        visible: AttentionMask,
        rotations: Rotations,
        encoder_BSD: Tensor | None = None,
        source_visible: AttentionMask | None = None,
        cache: LayerCache | None = None,
        source_tokens: int = 0,
        bias: Tensor | None = None,
        shared_k: Tensor | None = None,
        shared_v: Tensor | None = None,
    ) -> Tensor:
        """With a cache x_BTD holds the new tokens alone, and the source is read the first time only.

        source_visible: who sees which token of the source in cross-, merged or partial attention. source_tokens: how
        many of x_BTD's first tokens partial attention reads as the source; 0 when it is in the cache. bias: on the
        scores of self-attention. shared_k, shared_v: keys and values for layers that have none of their own.
        """
        x_BTD = self._mixed(x_BTD, visible, rotations, encoder_BSD, source_visible, cache, bias, shared_k, shared_v)
        if self.cross_attention is not None:
            assert source_visible is not None
            config = self.cross_attention.config
            crossed_BTD = self.cross_attention(
                self._read("cross_attention", x_BTD),
                encoder_BSD,
                source_visible,
                rotation_of(rotations, config.rope, config),
                None if encoder_BSD is None else rotation_of(rotations, "source", config),
                None if cache is None else cache.cross_attention,
            )
            x_BTD = self._added("cross_attention", x_BTD, crossed_BTD)
        if self.partial_attention is not None:
            assert source_visible is not None
            config, normed_BTD = self.partial_attention.config, self._read("partial_attention", x_BTD)
            partial_BTD = self.partial_attention(
                normed_BTD,
                normed_BTD[:, :source_tokens] if source_tokens else None,
                source_visible,
                rotation_of(rotations, "self", config),
                rotation_of(rotations, "source", config) if source_tokens else None,
                None if cache is None else cache.partial_attention,
            )
            x_BTD = self._added("partial_attention", x_BTD, partial_BTD)
        return self._added("feed_forward", x_BTD, self.feed_forward(self._read("feed_forward", x_BTD)))

    def _mixed(
        self,
        x_BTD: Tensor,
        visible: AttentionMask,
        rotations: Rotations,
        encoder_BSD: Tensor | None,
        source_visible: AttentionMask | None,
        cache: LayerCache | None,
        bias: Tensor | None,
        shared_k: Tensor | None,
        shared_v: Tensor | None,
    ) -> Tensor:
        """The residual stream after self-attention, merged or not, or after retention."""
        normed_BTD = self._read(self.sequence_mixer, x_BTD)
        if self.retention is not None:
            state = None if cache is None else cache.retention
            of = self.retention.config
            out_BTD = self.retention(normed_BTD, visible, rotations.of("self", of.rope_theta, of.head_dim), state)
            return self._added(self.sequence_mixer, x_BTD, out_BTD)
        attention = self.self_attention
        assert attention is not None
        config = attention.config
        kept = None if cache is None else cache.self_attention
        if isinstance(attention, MergedAttention):
            assert source_visible is not None
            on = config.rope == "continuous"
            out_BTD = attention.forward_merged(
                normed_BTD,
                encoder_BSD,
                visible,
                source_visible,
                rotation_of(rotations, "continuous" if on else "self", config),
                rotation_of(rotations, "source", config) if on and encoder_BSD is not None else None,
                kept,
                None if cache is None else cache.cross_attention,
            )
        elif isinstance(attention, SharingAttention):
            assert shared_k is not None
            assert shared_v is not None
            out_BTD = attention(normed_BTD, shared_k, shared_v, visible, rotation_of(rotations, "self", config))
        else:
            rotation = rotation_of(rotations, "self", config)
            out_BTD = attention(normed_BTD, normed_BTD, visible, rotation, rotation, kept, bias)
        return self._added("self_attention", x_BTD, out_BTD)


def rotation_of(rotations: Rotations, positions: str, config: ResolvedAttention) -> Rotation | None:
    """Of an attention's queries or keys at the positions of that name; None where it has none."""
    if config.rope == "none":
        return None
    return rotations.of(positions, config.rope_theta, config.head_dim, config.rope_factor)


class Stack(nn.Module):
    """Layers and the norm after the last of them."""

    def __init__(self, model: ResolvedModel, side: str) -> None:
        super().__init__()
        layers: tuple[Layer, ...] = getattr(model, side)
        self.layers = nn.ModuleList(Block(layer, model, side, index == 0) for index, layer in enumerate(layers))
        # Where norms come after the blocks, the last one has been.
        self.norm = self._norm_after(model, side)
        self.own_layers = model.self_layers if side == "decoder" else len(layers)
        """Layers whose keys and values are their own; the first. `SharingStack` has others."""
        attentions = [own for layer in layers if (own := layer.self_attention)]
        biased = [own for own in attentions if own.relative_bias == "shared"]
        self.relative_bias = relative_bias(biased[0], causal=side == "decoder") if biased else None
        self.recompute = False
        """Keep only each layer's input for the backward pass, which then computes the layer again."""

    def forward(
        self,
        x_BTD: Tensor,
        visible: AttentionMask,
        rotations: Rotations,
        encoder_BSD: Tensor | None = None,
        source_visible: AttentionMask | None = None,
        cache: Sequence[LayerCache] | None = None,
        source_tokens: int = 0,
        finish: bool = True,
    ) -> Tensor:
        """cache: one for each layer; x_BTD then holds the new tokens alone. The source's arguments are `Block`'s.

        finish: whether to go on to what follows the layers (`finish`).
        """
        layers = list(self.layers)[: self.own_layers]
        kept = [None] * len(layers) if cache is None else cache
        biases = self._biases(layers, rotations, kept)
        for layer, own, bias in zip(layers, kept, biases, strict=True):
            x_BTD = self._run(layer, x_BTD, visible, rotations, encoder_BSD, source_visible, own, source_tokens, bias)
        return self.finish(x_BTD, visible, rotations) if finish else x_BTD

    @staticmethod
    def _norm_after(model: ResolvedModel, side: str) -> Norm | None:
        """For what reads the residual stream outside of the blocks."""
        return None if model.norm.placement == "post" else Norm(model.norm, model.width(side))

    def finish(self, x_BTD: Tensor, visible: AttentionMask, rotations: Rotations) -> Tensor:
        """The norm after the last layer."""
        return x_BTD if self.norm is None else cast(Tensor, self.norm(x_BTD))

    def _biases(
        self, layers: Sequence[nn.Module], rotations: Rotations, caches: Sequence[LayerCache | None]
    ) -> list[Tensor | None]:
        """Of every layer that has one; a shared one is made once wherever the keys are the same."""
        found: list[Tensor | None] = []
        shared: dict[int | None, Tensor] = {}
        for layer, cache in zip(layers, caches, strict=True):
            assert isinstance(layer, Block)
            attention = layer.self_attention
            if not isinstance(attention, SelfAttention) or attention.config.relative_bias == "none":
                found.append(None)
                continue
            kind = attention.config.relative_bias
            queries = rotations.positions("self")
            own = None if cache is None else cache.self_attention
            held = own is not None and own.k is not None
            window = own.window if own is not None and held else None
            if kind == "shared" and window in shared:
                found.append(shared[window])
                continue
            keys = own.positions() if own is not None and held else queries
            of = self.relative_bias if kind == "shared" else attention.relative_bias
            assert of is not None
            bias = of(queries, keys)
            if kind == "shared":
                shared[window] = bias
            found.append(bias)
        return found

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # The state of the random generators is kept too, so that dropout drops the same entries again.
            return cast(Tensor, checkpoint(layer, *inputs, use_reentrant=False))
        return cast(Tensor, layer(*inputs))
