"""The two families as modules: an explicit list of layers, each built from its own config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llm.components.attention.cache import LayerCache
from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.components.attention.module import Attention
from lit_llm.components.attention.rope import Rotation, Rotations
from lit_llm.components.attention.visibility import Visibility
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.norm.module import Norm
from lit_llm.components.partial_attention.module import PartialAttention
from lit_llm.models.config import Layer, ResolvedModel


class Block(nn.Module):
    """
    x ─┬─ norm ─ attention[self] ─ drop ─(+)─┬─ norm ─ attention[cross] ─ drop ─(+)─┬─ norm ─ feed_forward ─ drop ─(+)─▶
       └──────────────────────────────────┘  │        ▲ encoder_BSD              │  └────────────────────────────────┘
                                             └───────────────────────────────────┘
                                               only in an encoder-decoder's decoder

    In its place, in decoder-only layers that have one: ─┬─ norm ─┬─────────── attention[partial] ─ drop ─(+)─
                                                         │        └ source's tokens ─▲                     │
                                                         └─────────────────────────────────────────────────┘
    drop is dropout, zero unless training sets it.
    """

    def __init__(self, layer: Layer, model: ResolvedModel) -> None:
        super().__init__()
        self.self_attention_norm = Norm(model.norm, model.d_model)
        self.self_attention = Attention(layer.self_attention, model.d_model)
        self.cross_attention_norm = self.cross_attention = None
        if layer.cross_attention is not None:
            self.cross_attention_norm = Norm(model.norm, model.d_model)
            self.cross_attention = Attention(layer.cross_attention, model.d_model)
        self.partial_attention_norm = self.partial_attention = None
        if layer.partial_attention is not None:
            self.partial_attention_norm = Norm(model.norm, model.d_model)
            self.partial_attention = PartialAttention(layer.partial_attention, model.d_model)
        self.feed_forward_norm = Norm(model.norm, model.d_model)
        self.feed_forward = FeedForward(layer.feed_forward, model.d_model)
        self.dropout = nn.Dropout(0.0)

    def forward(
        self,
        x_BTD: Tensor,
        visible: Visibility,
        rotations: Rotations,
        encoder_BSD: Tensor | None = None,
        source_visible: Visibility | None = None,
        cache: LayerCache | None = None,
        source_tokens: int = 0,
    ) -> Tensor:
        """With a cache x_BTD holds the new tokens alone, and the source is read the first time only.

        source_visible: who sees which token of the source in cross- or partial attention. source_tokens: how many of
        x_BTD's first tokens partial attention reads as the source; 0 when it is in the cache.
        """
        normed_BTD = self.self_attention_norm(x_BTD)
        rotation = _rotation(rotations, "self", self.self_attention.config)
        kept, crossed = (None, None) if cache is None else (cache.self_attention, cache.cross_attention)
        x_BTD = x_BTD + self.dropout(self.self_attention(normed_BTD, normed_BTD, visible, rotation, rotation, kept))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert source_visible is not None
            config = self.cross_attention.config
            crossed_BTD = self.cross_attention(
                self.cross_attention_norm(x_BTD),
                encoder_BSD,
                source_visible,
                _rotation(rotations, config.rope, config),
                None if encoder_BSD is None else _rotation(rotations, "source", config),
                crossed,
            )
            x_BTD = x_BTD + self.dropout(crossed_BTD)
        if self.partial_attention is not None and self.partial_attention_norm is not None:
            assert source_visible is not None
            config, normed_BTD = self.partial_attention.config, self.partial_attention_norm(x_BTD)
            partial_BTD = self.partial_attention(
                normed_BTD,
                normed_BTD[:, :source_tokens] if source_tokens else None,
                source_visible,
                _rotation(rotations, "self", config),
                _rotation(rotations, "source", config) if source_tokens else None,
                None if cache is None else cache.partial_attention,
            )
            x_BTD = x_BTD + self.dropout(partial_BTD)
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


def _rotation(rotations: Rotations, positions: str, config: ResolvedAttention) -> Rotation | None:
    return None if config.rope == "none" else rotations.of(positions, config.rope_theta, config.head_dim)


class Stack(nn.Module):
    """Layers and the norm after the last of them."""

    def __init__(self, layers: tuple[Layer, ...], model: ResolvedModel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(layer, model) for layer in layers)
        self.norm = Norm(model.norm, model.d_model)
        self.recompute = False
        """Keep only each layer's input for the backward pass, which then computes the layer again."""

    def forward(
        self,
        x_BTD: Tensor,
        visible: Visibility,
        rotations: Rotations,
        encoder_BSD: Tensor | None = None,
        source_visible: Visibility | None = None,
        cache: Sequence[LayerCache] | None = None,
        source_tokens: int = 0,
    ) -> Tensor:
        """cache: one for each layer; x_BTD then holds the new tokens alone. The source's arguments are `Block`'s."""
        kept = [None] * len(self.layers) if cache is None else cache
        for layer, own in zip(self.layers, kept, strict=True):
            x_BTD = self._run(layer, x_BTD, visible, rotations, encoder_BSD, source_visible, own, source_tokens)
        return self.norm(x_BTD)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # The state of the random generators is kept too, so that dropout drops the same entries again.
            return cast(Tensor, checkpoint(layer, *inputs, use_reentrant=False))
        return cast(Tensor, layer(*inputs))


class LanguageModel(nn.Module, ABC):
    """What the families share: token ids in, and one distribution over the vocabulary for each target position."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.dropout = nn.Dropout(0.0)  # on embeddings; training sets it
        self.output = (
            None if config.tie_embeddings == "all" else nn.Linear(config.d_model, config.vocabulary, bias=False)
        )
        self.decoder = Stack(config.decoder, config)

    @property
    def unembedding_VD(self) -> Tensor:
        """The matrix that turns a hidden state into logits."""
        return self.embedding.weight if self.output is None else self.output.weight

    @abstractmethod
    def hidden(self, *inputs: Any, **named: Any) -> Tensor:
        """Token ids in, the states after the last norm out: B x T x D, one for each target position."""

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        return F.linear(hidden_BTD, self.unembedding_VD)


class DecoderOnly(LanguageModel):
    """DecLLM: embedding ─ drop ─ decoder ─ unembedding."""

    def hidden(
        self,
        tokens_BT: Tensor,
        prefix_length: int | Tensor | None = None,
        documents_BT: Tensor | None = None,
        source_length: int | Tensor | None = None,
        positions_BT: Tensor | None = None,
        open_BT: Tensor | None = None,
    ) -> Tensor:
        """B x T ids -> B x T x D. `prefix_length`: the first tokens of a row that also see each other.

        documents_BT: numbers; tokens see only those with their own, and partial attention adds nothing to one whose
        document has no source. Positions are those of the row, unless `positions_BT` has others.
        open_BT: in place of `prefix_length`, boolean: what all tokens of the same document see.
        source_length: the first tokens of a row that all of its tokens see in partial attention, at least one; models
        without it do not read it. No loss belongs on what these tokens predict of each other: they see it.
        """
        tokens = tokens_BT.shape[1]
        _refuse_outside("prefix_length", prefix_length, 0, tokens)
        x_BTD = self.dropout(self.embedding(tokens_BT))
        rotations = Rotations(compute_dtype(x_BTD))
        rotations.place("self", _places(tokens_BT, positions_BT))
        prefix = prefix_length if open_BT is None else open_BT
        visible = Visibility(causal=True, prefix=prefix, documents=_pair(documents_BT, documents_BT))
        if not self.config.has_partial_attention:
            return cast(Tensor, self.decoder(x_BTD, visible, rotations))
        if source_length is None:
            raise ValueError("partial attention needs to know where the source ends; give source_length")
        _refuse_outside("source_length", source_length, 1, tokens)
        longest = _known(source_length)
        source = tokens if longest is None else longest[1]
        source_visible = Visibility(
            key_lengths=source_length if isinstance(source_length, Tensor) else None,
            documents=None if documents_BT is None else (documents_BT, documents_BT[:, :source]),
        )
        rotations.place("source", torch.arange(source, device=tokens_BT.device))
        out_BTD = self.decoder(x_BTD, visible, rotations, source_visible=source_visible, source_tokens=source)
        return cast(Tensor, out_BTD)

    def forward(
        self,
        tokens_BT: Tensor,
        prefix_length: int | Tensor | None = None,
        documents_BT: Tensor | None = None,
        source_length: int | Tensor | None = None,
    ) -> Tensor:
        """B x T ids -> B x T x V logits."""
        return self.logits(self.hidden(tokens_BT, prefix_length, documents_BT, source_length))


class EncoderDecoder(LanguageModel):
    """RedLLM: source ─ drop ─ encoder ─▶ cross-attention of the decoder over the target ─ drop."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__(config)
        shared = config.tie_embeddings != "none"
        self.encoder_embedding = None if shared else nn.Embedding(config.vocabulary, config.d_model)
        self.encoder = Stack(config.encoder, config)

    def encode(
        self,
        source_BS: Tensor,
        source_lengths: Tensor | None = None,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """B x S ids -> B x S x D. Rows are padded at the end; `source_lengths` (B) says where."""
        embed = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        x_BSD = self.dropout(embed(source_BS))
        rotations = Rotations(compute_dtype(x_BSD))
        rotations.place("self", _places(source_BS, positions_BS))
        visible = Visibility(key_lengths=source_lengths, documents=_pair(documents_BS, documents_BS))
        return cast(Tensor, self.encoder(x_BSD, visible, rotations))

    def hidden(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        source_lengths: Tensor | None = None,
        documents_BS: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        source_ends_BT: Tensor | None = None,
    ) -> Tensor:
        """B x S source ids, B x T decoder inputs -> B x T x D.

        documents_BS, documents_BT: numbers, both or neither; tokens see only those with their own, on either side, and
        cross-attention adds nothing to a target token whose document has no source. Positions are those of the row,
        unless `positions_BS` and `positions_BT` have others.
        source_ends_BT: the position after the last source token, for each target token; the row's when absent.
        """
        if source_BS.shape[1] == 0:
            raise ValueError("the source is empty; an empty source is one end-of-document token")
        if (documents_BS is None) != (documents_BT is None):
            raise ValueError("documents of the source without those of the target, or the other way round; give both")
        encoder_BSD = self.encode(source_BS, source_lengths, documents_BS, positions_BS)
        x_BTD = self.dropout(self.embedding(target_BT))
        source, target = source_BS.shape[1], _places(target_BT, positions_BT)
        rotations = Rotations(compute_dtype(x_BTD))
        rotations.place("self", target)
        rotations.place("source", _places(source_BS, positions_BS))
        rotations.place("restart", target)
        # The target goes on where its own row's source ended: <s> takes the slot after the last source token.
        ends = source if source_lengths is None else source_lengths.to(target.device)[:, None]
        ends = ends if source_ends_BT is None else source_ends_BT
        rotations.place("continuous", target + ends)
        visible = Visibility(causal=True, documents=_pair(documents_BT, documents_BT))
        source_visible = Visibility(key_lengths=source_lengths, documents=_pair(documents_BT, documents_BS))
        return cast(Tensor, self.decoder(x_BTD, visible, rotations, encoder_BSD, source_visible))

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        source_lengths: Tensor | None = None,
        documents_BS: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """B x S source ids, B x T decoder inputs -> B x T x V logits."""
        return self.logits(self.hidden(source_BS, target_BT, source_lengths, documents_BS, documents_BT))


def _places(tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """The positions of a row's tokens, where no others are given."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device) if positions_BT is None else positions_BT


def _known(lengths: int | Tensor) -> tuple[int, int] | None:
    """The shortest and the longest; None for a tensor on a GPU, since every step would wait for the device."""
    if not isinstance(lengths, Tensor):
        return lengths, lengths
    return (int(lengths.min()), int(lengths.max())) if lengths.device.type == "cpu" else None


def _refuse_outside(name: str, lengths: int | Tensor | None, least: int, tokens: int) -> None:
    """Raises ValueError where a length is known not to fit an input of that many tokens."""
    if lengths is None or (known := _known(lengths)) is None:
        return
    if known[0] < least:
        raise ValueError(f"{name} {known[0]} is too short; at least {least}")
    if known[1] > tokens:
        raise ValueError(f"{name} {known[1]} is longer than the {tokens} tokens of the input")


def _pair(of_queries: Tensor | None, of_keys: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if of_queries is None or of_keys is None else (of_queries, of_keys)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that queries and keys will have: under autocast not the embedding's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else x.dtype
