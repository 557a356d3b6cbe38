"""The families: token ids in, one distribution over the vocabulary for each target position out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_llm.components.attention.masks import AttentionMask
from lit_llm.components.attention.rope import Rotations
from lit_llm.components.embedding.module import Head, Unembedding
from lit_llm.components.norm.module import Norm
from lit_llm.models.resolve import ResolvedModel
from lit_llm.models.stacks import Stack


class LanguageModel(nn.Module, ABC):
    """What the families share: token ids in, and one distribution over the vocabulary for each target position."""

    stack: type[Stack] = Stack
    """Of the decoder."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.embedding_norm = Norm(config.norm, config.d_model) if config.embedding.norm else None
        self.dropout = nn.Dropout(0.0)  # on embeddings; training sets it
        tied = config.tie_embeddings in ("all", "decoder")
        self.output = None if tied else nn.Linear(config.d_model, config.vocabulary, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocabulary)) if config.output.bias else None
        self.head = Head(config.norm, config.d_model) if config.output.head == "dense" else None
        if config.decoder:
            self.decoder = self.stack(config, "decoder")

    @property
    def unembedding(self) -> Unembedding:
        """What turns hidden states into logits."""
        weight_VD = self.embedding.weight if self.output is None else self.output.weight
        return Unembedding(weight_VD, self.output_bias, self.config.output.softcap, self.head)

    def embed(self, tokens: Tensor) -> Tensor:
        """B x T ids -> B x T x D: what the first layer reads."""
        return self.dropout(_embedded(tokens, self.embedding, self.embedding_norm, self.config))

    @abstractmethod
    def hidden(self, *inputs: Any, **named: Any) -> Tensor:
        """Token ids in, the states after the last norm out: B x T x D, one for each target position."""

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        return self.unembedding(hidden_BTD)


def _embedded(tokens: Tensor, table: nn.Embedding, norm: Norm | None, config: ResolvedModel) -> Tensor:
    x = cast(Tensor, table(tokens))
    if config.embedding.scaled:
        x = x * table.embedding_dim**0.5
    return x if norm is None else norm(x)


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
        x_BTD = self.embed(tokens_BT)
        rotations = Rotations(compute_dtype(x_BTD))
        rotations.place("self", _places(tokens_BT, positions_BT))
        prefix = prefix_length if open_BT is None else open_BT
        visible = AttentionMask(causal=True, prefix=prefix, documents=_pair(documents_BT, documents_BT))
        if not self.config.has_partial_attention:
            return cast(Tensor, self.decoder(x_BTD, visible, rotations))
        if source_length is None:
            raise ValueError("partial attention needs to know where the source ends; give source_length")
        _refuse_outside("source_length", source_length, 1, tokens)
        longest = _known(source_length)
        source = tokens if longest is None else longest[1]
        source_visible = AttentionMask(
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
        shared, width = config.tie_embeddings in ("all", "inputs"), config.width("encoder")
        self.encoder_embedding = None if shared else nn.Embedding(config.vocabulary, width)
        self.encoder_embedding_norm = Norm(config.norm, width) if config.embedding.norm else None
        self.encoder = Stack(config, "encoder")

    def encode(
        self,
        source_BS: Tensor,
        source_lengths: Tensor | None = None,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """B x S ids -> B x S x D. Rows are padded at the end; `source_lengths` (B) says where."""
        table = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        x_BSD = self.dropout(_embedded(source_BS, table, self.encoder_embedding_norm, self.config))
        rotations = Rotations(compute_dtype(x_BSD))
        rotations.place("self", _places(source_BS, positions_BS))
        visible = AttentionMask(key_lengths=source_lengths, documents=_pair(documents_BS, documents_BS))
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
        x_BTD = self.embed(target_BT)
        source, target = source_BS.shape[1], _places(target_BT, positions_BT)
        rotations = Rotations(compute_dtype(x_BTD))
        rotations.place("self", target)
        rotations.place("source", _places(source_BS, positions_BS))
        rotations.place("restart", target)
        # The target goes on where its own row's source ended: <s> takes the slot after the last source token.
        ends = source if source_lengths is None else source_lengths.to(target.device)[:, None]
        ends = ends if source_ends_BT is None else source_ends_BT
        rotations.place("continuous", target + ends)
        visible = AttentionMask(causal=True, documents=_pair(documents_BT, documents_BT))
        source_visible = AttentionMask(key_lengths=source_lengths, documents=_pair(documents_BT, documents_BS))
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


class EncoderOnly(LanguageModel):
    """ModernBERT's family: embedding ─ drop ─ encoder ─ unembedding, in which a masked token's own place names it."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__(config)
        self.encoder = Stack(config, "encoder")

    def hidden(
        self, tokens_BT: Tensor, token_lengths: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """B x T ids -> B x T x D. Rows are padded at the end; `token_lengths` (B) says where.

        documents_BT: numbers; tokens see only those with their own.
        """
        x_BTD = self.embed(tokens_BT)
        rotations = Rotations(compute_dtype(x_BTD))
        rotations.place("self", torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        visible = AttentionMask(key_lengths=token_lengths, documents=_pair(documents_BT, documents_BT))
        return cast(Tensor, self.encoder(x_BTD, visible, rotations))

    def forward(
        self, tokens_BT: Tensor, token_lengths: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """B x T ids -> B x T x V logits."""
        return self.logits(self.hidden(tokens_BT, token_lengths, documents_BT))


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
