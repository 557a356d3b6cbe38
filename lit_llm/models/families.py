"""Model families: token ids in, one distribution over the vocabulary for each target position out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from lit_llm.components.embedding.module import Head, LearnedPositions, Unembedding
from lit_llm.components.few_rows import Linear
from lit_llm.components.forward_context import ForwardContext, SourceInput
from lit_llm.components.masks import AttentionMask
from lit_llm.components.norm.module import Norm
from lit_llm.models.positions import too_few_positions
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.scaling import embedding_multiplier, output_multiplier
from lit_llm.models.stacks import Stack


class LanguageModel(nn.Module, ABC):
    """Base class of the families: token ids in, one distribution over the vocabulary for each target position out."""

    stack: type[Stack] = Stack
    """Class of the decoder's stack."""
    compiled_terms: Callable[..., Tensor] | None = None
    """The loss's `terms_of_rows` where training compiles it."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.position_embedding = _positions_table(config, config.d_model)
        self.embedding_norm = Norm(config.norm, config.d_model) if config.embedding.norm else None
        self.dropout = nn.Dropout(0.0)  # on embeddings; training sets it
        tied = config.tie_embeddings in ("all", "decoder")
        self.output = None if tied else Linear(config.d_model, config.vocabulary)
        self.output_bias = nn.Parameter(torch.zeros(config.vocabulary)) if config.output.bias else None
        self.head = Head(config.norm, config.d_model) if config.output.head == "dense" else None
        if config.decoder:
            self.decoder = self.stack(config, "decoder")

    @property
    def unembedding(self) -> Unembedding:
        """The map of hidden states to logits."""
        weight_VD = self.embedding.weight if self.output is None else self.output.weight
        multiplier, softcap = output_multiplier(self.config), self.config.output.softcap
        return Unembedding(weight_VD, self.output_bias, softcap, self.head, self.compiled_terms, multiplier)

    def embed(self, tokens: Tensor, positions: Mapping[str, Tensor]) -> Tensor:
        """B x T ids -> B x T x D, the input of the first layer. positions: those of the `ForwardContext`."""
        x = _scaled(tokens, self.embedding, self.config)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions.get(self.config.embedding.positions, positions["self"]))
        return self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))

    @abstractmethod
    def hidden(self, *inputs: Any, **named: Any) -> Tensor:
        """Token ids in, the states after the last norm out: B x T x D, one for each target position."""

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        return self.unembedding(hidden_BTD)


def _scaled(tokens: Tensor, table: nn.Embedding, config: ResolvedModel) -> Tensor:
    x = cast(Tensor, table(tokens))
    return x * embedding_multiplier(config, table.embedding_dim) if config.embedding.scaled else x


def _positions_table(config: ResolvedModel, width: int) -> LearnedPositions | None:
    rows = config.embedding.max_positions
    return None if rows is None else LearnedPositions(rows, width)


class DecoderInputs(TypedDict, total=False):
    """Optional inputs of a `OneRowModel` about the rows of its tokens."""

    prefix_length: int | Tensor | None
    """Number of a row's first tokens that also see each other."""
    documents_BT: Tensor | None
    """Document numbers: tokens see only tokens of the same document. A part that reads the source in the row adds
    nothing to a token whose document has none."""
    source_length: int | Tensor | None
    """Number of a row's first tokens, at least one, that are the source for parts that read it in the row. Their
    predictions of each other must not count in the loss, since they see each other there."""
    positions_BT: Tensor | None
    """Position of each token; its index in the row when absent."""
    open_BT: Tensor | None
    """Boolean, in place of `prefix_length`: tokens that all tokens of the same document see."""


class OneRowModel(LanguageModel):
    """Base class of the families that read one row and predict the next token after each of its tokens."""

    @abstractmethod
    def hidden(self, tokens_BT: Tensor, **inputs: Unpack[DecoderInputs]) -> Tensor:
        """B x T ids -> B x T x D."""

    def forward(
        self,
        tokens_BT: Tensor,
        prefix_length: int | Tensor | None = None,
        documents_BT: Tensor | None = None,
        source_length: int | Tensor | None = None,
    ) -> Tensor:
        """B x T ids -> B x T x V logits. See `DecoderInputs`."""
        hidden_BTD = self.hidden(
            tokens_BT, prefix_length=prefix_length, documents_BT=documents_BT, source_length=source_length
        )
        return self.logits(hidden_BTD)


class DecoderOnly(OneRowModel):
    """DecLLM: embedding ─ drop ─ decoder ─ unembedding."""

    def hidden(self, tokens_BT: Tensor, **inputs: Unpack[DecoderInputs]) -> Tensor:
        """B x T ids -> B x T x D."""
        tokens, documents_BT = tokens_BT.shape[1], inputs.get("documents_BT")
        prefix, open_BT = inputs.get("prefix_length"), inputs.get("open_BT")
        _refuse_outside("prefix_length", prefix, 0, tokens)
        refuse_beyond_table(self.config, tokens)
        positions = {"self": positions_of(tokens_BT, inputs.get("positions_BT"))}
        x_BTD = self.embed(tokens_BT, positions)
        prefix = prefix if open_BT is None else open_BT
        refuse_open(self.config, prefix)
        mask = AttentionMask(causal=True, prefix=prefix, documents=document_pair(documents_BT, documents_BT))
        source = None
        if part := self.config.reads_marked:
            length = inputs.get("source_length")
            if length is None:
                raise ValueError(f"{part} needs to know where the source ends; give source_length")
            _refuse_outside("source_length", length, 1, tokens)
            longest = _length_range(length)
            source_tokens = tokens if longest is None else longest[1]
            source_mask = AttentionMask(
                key_lengths=length if isinstance(length, Tensor) else None,
                documents=None if documents_BT is None else (documents_BT, documents_BT[:, :source_tokens]),
            )
            positions["source"] = torch.arange(source_tokens, device=tokens_BT.device)
            source = SourceInput(source_mask, source_tokens, in_row=True)
        return cast(Tensor, self.decoder(x_BTD, ForwardContext(x_BTD, mask, positions, source)))


class EncoderDecoderInputs(TypedDict, total=False):
    """Optional inputs of an encoder-decoder about the rows of its tokens."""

    source_lengths: Tensor | None
    """B: number of tokens in each row of the source; padding follows."""
    documents_BS: Tensor | None
    """Document numbers of the source, only together with those of the target: tokens see only tokens of the same
    document, on either side, and cross-attention adds nothing to a target token whose document has no source."""
    documents_BT: Tensor | None
    """Document numbers of the target."""
    positions_BS: Tensor | None
    """Position of each source token; its index in the row when absent."""
    positions_BT: Tensor | None
    """Position of each target token; its index in the row when absent."""
    source_ends_BT: Tensor | None
    """Position after the last source token, for each target token; the row's when absent."""


class WithEncoder(LanguageModel):
    """Base class of the families with an encoder beside the decoder."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__(config)
        shared, width = config.tie_embeddings in ("all", "inputs"), config.width("encoder")
        self.encoder_embedding = None if shared else nn.Embedding(config.vocabulary, width)
        self.encoder_position_embedding = _positions_table(config, width)
        self.encoder_embedding_norm = Norm(config.norm, width) if config.embedding.norm else None
        self.encoder = Stack(config, "encoder", tied_to=self.decoder if config.tie_layers else None)

    def embed_source(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """B x S ids and their positions -> B x S x D, the input of the encoder's first layer."""
        x = _scaled(tokens, self.embedding if self.encoder_embedding is None else self.encoder_embedding, self.config)
        if self.encoder_position_embedding is not None:
            x = x + self.encoder_position_embedding(positions)
        return self.dropout(x if self.encoder_embedding_norm is None else self.encoder_embedding_norm(x))


class EncoderDecoder(WithEncoder):
    """RedLLM: source ─ drop ─ encoder ─▶ cross-attention of the decoder over the target ─ drop."""

    def encode(
        self,
        source_BS: Tensor,
        source_lengths: Tensor | None = None,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """B x S ids -> B x S x D. See `EncoderDecoderInputs`."""
        refuse_beyond_table(self.config, source_BS.shape[1])
        position = positions_of(source_BS, positions_BS)
        x_BSD = self.embed_source(source_BS, position)
        mask = AttentionMask(key_lengths=source_lengths, documents=document_pair(documents_BS, documents_BS))
        context = ForwardContext(x_BSD, mask, {"self": position})
        return cast(Tensor, self.encoder(x_BSD, context))

    def hidden(self, source_BS: Tensor, target_BT: Tensor, **inputs: Unpack[EncoderDecoderInputs]) -> Tensor:
        """B x S source ids, B x T decoder inputs -> B x T x D."""
        if source_BS.shape[1] == 0:
            raise ValueError("the source is empty; an empty source is one end-of-document token")
        lengths, positions_BS = inputs.get("source_lengths"), inputs.get("positions_BS")
        documents_BS, documents_BT = inputs.get("documents_BS"), inputs.get("documents_BT")
        if (documents_BS is None) != (documents_BT is None):
            raise ValueError("documents of the source without those of the target, or the other way round; give both")
        encoder_BSD = self.encode(source_BS, lengths, documents_BS, positions_BS)
        source, target = source_BS.shape[1], positions_of(target_BT, inputs.get("positions_BT"))
        # The target continues after its row's source: <s> has the position after the last source token.
        ends = source if lengths is None else lengths.to(target.device)[:, None]
        source_ends_BT = inputs.get("source_ends_BT")
        positions = {
            "self": target,
            "source": positions_of(source_BS, positions_BS),
            "restart": target,
            "continuous": target + (ends if source_ends_BT is None else source_ends_BT),
        }
        before = 0
        if self.config.embedding.positions == "continuous" and source_ends_BT is None:
            # At least: which rows of the target are padded is not known here.
            shortest = (source, source) if lengths is None else _length_range(lengths)
            before = 0 if shortest is None else shortest[0]
        refuse_beyond_table(self.config, before + target_BT.shape[1])
        x_BTD = self.embed(target_BT, positions)
        mask = AttentionMask(causal=True, documents=document_pair(documents_BT, documents_BT))
        source_mask = AttentionMask(key_lengths=lengths, documents=document_pair(documents_BT, documents_BS))
        context = ForwardContext(x_BTD, mask, positions, SourceInput(source_mask, source, encoder_BSD))
        return cast(Tensor, self.decoder(x_BTD, context))

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        source_lengths: Tensor | None = None,
        documents_BS: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """B x S source ids, B x T decoder inputs -> B x T x V logits. See `EncoderDecoderInputs`."""
        hidden_BTD = self.hidden(
            source_BS, target_BT, source_lengths=source_lengths, documents_BS=documents_BS, documents_BT=documents_BT
        )
        return self.logits(hidden_BTD)


class EncoderOnly(LanguageModel):
    """ModernBERT's family: embedding ─ drop ─ encoder ─ unembedding; a masked token is predicted in its place."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__(config)
        self.encoder = Stack(config, "encoder")

    def hidden(
        self, tokens_BT: Tensor, token_lengths: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """B x T ids -> B x T x D.

        token_lengths: B, number of tokens in each row; padding follows. documents_BT: document numbers; tokens see only
        tokens of the same document.
        """
        refuse_beyond_table(self.config, tokens_BT.shape[1])
        positions = {"self": positions_of(tokens_BT, None)}
        x_BTD = self.embed(tokens_BT, positions)
        mask = AttentionMask(key_lengths=token_lengths, documents=document_pair(documents_BT, documents_BT))
        context = ForwardContext(x_BTD, mask, positions)
        return cast(Tensor, self.encoder(x_BTD, context))

    def forward(
        self, tokens_BT: Tensor, token_lengths: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """B x T ids -> B x T x V logits."""
        return self.logits(self.hidden(tokens_BT, token_lengths, documents_BT))


def refuse_open(config: ResolvedModel, prefix: int | Tensor | None) -> None:
    """Raise ValueError for a bidirectional prefix of a model with a part that cannot see later tokens."""
    if config.causal_only and (isinstance(prefix, Tensor) or (prefix or 0) > 1):
        raise ValueError(f"{config.causal_only}: a token cannot see later ones; leave its prefix causal")


def refuse_beyond_table(config: ResolvedModel, positions: int) -> None:
    """Raise ValueError for more positions than the model has learned."""
    if problem := too_few_positions(config, positions):
        raise ValueError(problem)


def positions_of(tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """The given positions, or the indices in the row."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device) if positions_BT is None else positions_BT


def _length_range(lengths: int | Tensor) -> tuple[int, int] | None:
    """(shortest, longest) of the lengths; None for a tensor on a GPU, since reading it waits for the device."""
    if not isinstance(lengths, Tensor):
        return lengths, lengths
    return (int(lengths.min()), int(lengths.max())) if lengths.device.type == "cpu" else None


def _refuse_outside(name: str, lengths: int | Tensor | None, least: int, tokens: int) -> None:
    """Raise ValueError for a length that does not fit an input of `tokens` tokens. GPU tensors are not checked."""
    if lengths is None or (limits := _length_range(lengths)) is None:
        return
    if limits[0] < least:
        raise ValueError(f"{name} {limits[0]} is too short; at least {least}")
    if limits[1] > tokens:
        raise ValueError(f"{name} {limits[1]} is longer than the {tokens} tokens of the input")


def document_pair(of_queries: Tensor | None, of_keys: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if of_queries is None or of_keys is None else (of_queries, of_keys)
