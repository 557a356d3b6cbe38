"""Prefill and decode: the prompt once, then one token at a time, with cached keys and values.

decoder-only      <s> p1 p2 ─▶ decoder ─▶ logits of t1          t1 ─▶ decoder ─▶ logits of t2   ...
                               └ keys and values of <s> p1 p2         └ and of t1
                                 (also for attention to the source)     (self-attention only)

encoder-decoder   p1 p2 ─▶ encoder ─▶ keys and values of every cross-attention
                  <s> ─▶ decoder ─▶ logits of t1                t1 ─▶ decoder ─▶ logits of t2   ...
                         └ keys and values of <s>                     └ and of t1

decoder-decoder   <s> p1 p2 ─▶ self-decoder ─▶ shared keys and values of <s> p1 p2
                               └ windows or states, of a size that does not grow
                  p2 alone ─▶ cross-decoder ─▶ logits of t1     t1 ─▶ both ─▶ logits of t2   ...

double decoder    <s> p1 ─▶ encoder ─▶ its keys and values, and those of every cross-attention (the complete blocks)
                  p2 ─▶ decoder ─▶ logits of t1                 t1 ─▶ decoder ─▶ logits of t2   ...
                        └ keys and values of the open block           └ and of t1
                                                                (then the encoder reads the block p2 t1, once)

Every token has the position that it has in a forward pass over the whole text. Shorter prompts are padded at their end,
and each row continues after its last token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.attention.module import CrossAttention
from lit_llm.components.few_rows import few_rows
from lit_llm.components.forward_context import CacheRows, ForwardContext, SourceInput
from lit_llm.components.kv_cache import CacheLengths, KeyValues, StackCache, TwoCaches
from lit_llm.components.masks import AttentionMask
from lit_llm.models.double_decoder import DoubleDecoder
from lit_llm.models.families import DecoderOnly, EncoderDecoder, LanguageModel, refuse_open
from lit_llm.models.positions import prompt_beyond_table
from lit_llm.models.stacks import Block

Prefix = Literal["causal", "bidirectional"]


class Decoding(ABC):
    """State of decoding of B prompts that have been read. Made by `prefill`."""

    def __init__(self, model: LanguageModel, rows: CacheRows) -> None:
        self.model = model
        self.rows = rows
        """Numbers of tokens so far, of the decoder and of the source."""
        self.cache: StackCache = model.decoder.new_cache(rows)
        self.caches = [self.cache]
        """Those of all stacks that keep something."""
        self.logits_BV: Tensor
        """Logits of the next token of each row."""

    @abstractmethod
    def _texts(self) -> list[tuple[int, int]]:
        """(tokens of the source, tokens that the decoder has read) of each row."""

    @abstractmethod
    def _positions(self) -> dict[str, Tensor]:
        """Positions of one more token of each row, by name as in `ForwardContext`."""

    @abstractmethod
    def _context(self, x_B1D: Tensor, positions: Mapping[str, Tensor]) -> ForwardContext:
        """Context of a pass over one more token of each row."""

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> None:
        """Append one token to each row and update `logits_BV`.

        Raises ValueError for a row that is longer than a table of learned positions. A row of exactly that length may
        be read once more, since `stream` does so with rows that have ended; its logits have no meaning.
        """
        for text in self._texts() if self.model.config.embedding.max_positions else ():
            if problem := prompt_beyond_table(self.model.config, *text):
                raise ValueError(problem)
        with few_rows():
            positions = self._positions()
            x_B1D = self.model.embed(tokens_B[:, None], positions)
            hidden_B1D = cast(Tensor, self.model.decoder(x_B1D, self._context(x_B1D, positions)))
            self.rows.self_lengths.advance()
            self.logits_BV = self.model.logits(hidden_B1D[:, 0])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        for lengths in self.rows:
            if lengths is not None:
                lengths.keep(rows)
        for cache in self.caches:
            cache.keep(rows)
        self.logits_BV = self.logits_BV[rows]

    @torch.inference_mode()
    def replace(self, rows: Sequence[int], other: Decoding) -> None:
        """Put the prompts of another decoding, by the same model, in the place of these rows."""
        for cache, new_cache in zip(self.caches, other.caches, strict=True):
            cache.replace(rows, new_cache)
        for lengths, new in zip(self.rows, other.rows, strict=True):
            if lengths is not None and new is not None:
                lengths.replace(rows, new)
        self.logits_BV[rows] = other.logits_BV

    def cache_bytes(self) -> list[int]:
        """Bytes of the keys and values (and states) of each row, measured, without padding and spare capacity.

        With n tokens chosen, the last of which the model has not read yet, it equals `lit_llm.models.cost.cache_bytes`
        of the prompt and n generated tokens: <s> counts in place of the last.
        """
        return [sum(row) for row in zip(*(cache.bytes() for cache in self.caches), strict=True)]


class _DecoderOnly(Decoding):
    def __init__(
        self, model: DecoderOnly, prompts: Sequence[Sequence[int]], prefix: Prefix, begin: int, more: int
    ) -> None:
        tokens_BT, lengths = _pad([[begin, *prompt] for prompt in prompts], model, more)
        # For parts that read the source in the row, <s> belongs to it.
        source = CacheLengths(lengths.lengths, tokens_BT.device)
        super().__init__(model, CacheRows(lengths, source))
        mask = _prompt_mask(lengths, prefix)
        refuse_open(model.config, mask.prefix)
        position = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions = {"self": position, "source": position}
        x_BTD = model.embed(tokens_BT, positions)
        context = ForwardContext(
            x_BTD,
            mask,
            positions,
            SourceInput(source.mask(), tokens_BT.shape[1], in_row=True),
            self.cache,
        )
        hidden_BTD = model.decoder(x_BTD, context)
        # Some stacks return only the last token of each prompt.
        last_B = lengths.lengths_B - 1 if hidden_BTD.shape[1] > 1 else torch.zeros_like(lengths.lengths_B)
        self.logits_BV = model.logits(hidden_BTD[torch.arange(len(prompts), device=tokens_BT.device), last_B])

    def _texts(self) -> list[tuple[int, int]]:
        return [(0, length) for length in self.rows.self_lengths.lengths]

    def _positions(self) -> dict[str, Tensor]:
        return {"self": self.rows.self_lengths.next_positions()}

    def _context(self, x_B1D: Tensor, positions: Mapping[str, Tensor]) -> ForwardContext:
        lengths, source = self.rows
        assert source is not None
        kept = SourceInput(source.mask(), max(source.lengths))
        return ForwardContext(x_B1D, lengths.mask(more=1), positions, kept, self.cache)


class _EncoderDecoder(Decoding):
    def __init__(
        self, model: EncoderDecoder, prompts: Sequence[Sequence[int]], begin: int, end: int, more: int
    ) -> None:
        source_BS, source = _pad([prompt if len(prompt) else [end] for prompt in prompts], model)
        lengths = CacheLengths([0] * len(prompts), source_BS.device, capacity=more)
        super().__init__(model, CacheRows(lengths, source))
        self.encoder_BSD: Tensor | None = model.encode(source_BS, source.mask().key_lengths)
        self.step(torch.full((len(prompts),), begin, device=source_BS.device))
        self.encoder_BSD = None  # its keys and values are kept

    def _texts(self) -> list[tuple[int, int]]:
        lengths, source = self.rows
        assert source is not None
        return [*zip(source.lengths, lengths.lengths, strict=True)]

    def _positions(self) -> dict[str, Tensor]:
        lengths, source = self.rows
        assert source is not None
        position = lengths.next_positions()
        return {"self": position, "restart": position, "continuous": source.next_positions() + position}

    def _context(self, x_B1D: Tensor, positions: Mapping[str, Tensor]) -> ForwardContext:
        lengths, source = self.rows
        assert source is not None
        encoder_BSD, tokens = self.encoder_BSD, max(source.lengths)
        if encoder_BSD is not None:
            tokens = encoder_BSD.shape[1]
            positions = {**positions, "source": torch.arange(tokens, device=x_B1D.device)}
        read = SourceInput(source.mask(), tokens, encoder_BSD)
        return ForwardContext(x_B1D, lengths.mask(more=1), positions, read, self.cache)


class _DoubleDecoder(Decoding):
    """The decoder keeps the open block, whose length is `rows.self_lengths`, the encoder all complete ones."""

    def __init__(self, model: DoubleDecoder, prompts: Sequence[Sequence[int]], begin: int, more: int) -> None:
        tokens_BT, text = _pad([[begin, *prompt] for prompt in prompts], model, more)
        device, count = tokens_BT.device, len(prompts)
        *complete, most = (
            int(model.config.in_earlier_blocks(length)) for length in [*text.lengths, text.capacity or 0]
        )
        opened = [length - read for length, read in zip(text.lengths, complete, strict=True)]
        source = CacheLengths(complete, device, capacity=most)
        lengths = CacheLengths(opened, device, capacity=model.block)
        super().__init__(model, CacheRows(lengths, source))
        self.double, self.source = model, source
        self.read: StackCache = model.encoder.new_cache(CacheRows(source))
        """The encoder's keys and values of complete blocks."""
        self.caches.append(self.read)
        self._read_blocks([*range(count)], tokens_BT[:, : max(complete)], 0)
        within = torch.arange(max(opened), device=device)
        columns_BT = (source.lengths_B[:, None] + within).clamp_max(tokens_BT.shape[1] - 1)
        tokens_BT = tokens_BT.gather(1, columns_BT)
        self.open_BN = F.pad(tokens_BT, (0, model.block - len(within)))
        """Tokens of the open blocks."""
        positions = self._positions_in_block(within)
        x_BTD = model.embed(tokens_BT, positions)
        # Padding comes last: no token sees it, and its outputs are not used.
        hidden_BTD = model.decoder(x_BTD, self._in_block(x_BTD, AttentionMask(causal=True), positions))
        self.logits_BV = model.logits(hidden_BTD[torch.arange(count, device=device), lengths.lengths_B - 1])

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> None:
        lengths, size = self.rows.self_lengths, self.double.block
        full = [row for row, length in enumerate(lengths.lengths) if length == size]
        by_start: dict[int, list[int]] = {}
        for row in full:
            by_start.setdefault(self.source.lengths[row], []).append(row)
        for start, rows in by_start.items():
            self._read_blocks(rows, self.open_BN[rows], start)
            self.source.set(rows, [start + size] * len(rows))
            lengths.set(rows, [0] * len(rows))
        self.open_BN[torch.arange(len(tokens_B), device=tokens_B.device), lengths.lengths_B] = tokens_B
        super().step(tokens_B)

    def _read_blocks(self, rows: list[int], tokens_RS: Tensor, start: int) -> None:
        """Read complete blocks of these rows, which follow their first `start` tokens, by the encoder.

        Its keys and values are kept, and those of its output for the decoder.
        """
        held, end = CacheLengths([start] * len(rows), tokens_RS.device), start + tokens_RS.shape[1]
        layers = [
            {name: cast(KeyValues, cache).of_rows(rows, held) for name, cache in layer.items()}
            for layer in self.read.layers
        ]
        position = torch.arange(start, end, device=tokens_RS.device)
        x_RSD, mask = self.double.embed_source(tokens_RS, position), AttentionMask(causal=True, before=start)
        context = ForwardContext(x_RSD, mask, {"self": position, "source": position}, cache=StackCache(layers))
        states_RSD = self.double.encoder(x_RSD, context)
        for layer, copied in zip(self.read.layers, layers, strict=True):
            for name, new in copied.items():
                assert new.k is not None
                assert new.v is not None
                keys_values = new.k[:, :, start:end], new.v[:, :, start:end]
                cast(KeyValues, layer[name]).extend(rows, keys_values, start)
        for block, caches in zip(self.double.decoder.layers, self.cache.layers, strict=True):
            for name, held_by in caches.items():
                part = cast(Block, block).part(name)
                if isinstance(part, CrossAttention):
                    of_source = held_by.source if isinstance(held_by, TwoCaches) else cast(KeyValues, held_by)
                    of_source.extend(rows, part.of_source(states_RSD, part.source_rotation(context)), start)

    def _positions_in_block(self, within: Tensor) -> dict[str, Tensor]:
        """Positions of tokens of the open blocks, by name. within: their positions there."""
        return {"self": within, "restart": within, "continuous": self.source.next_positions() + within}

    def _in_block(self, x_BTD: Tensor, mask: AttentionMask, positions: Mapping[str, Tensor]) -> ForwardContext:
        """Context of a pass over tokens of the open blocks."""
        source, tokens = self.source, max(self.source.lengths)
        of_source = source.mask()
        if tokens > min(source.lengths) == 0:  # rows in their first block see no source
            size, key = self.double.block, torch.arange(tokens, device=x_BTD.device)
            own_BT = (source.lengths_B // size)[:, None].expand(-1, x_BTD.shape[1])
            of_source = AttentionMask(blocks=(own_BT, (key // size)[None]))
        return ForwardContext(x_BTD, mask, positions, SourceInput(of_source, tokens), self.cache)

    def _texts(self) -> list[tuple[int, int]]:
        # As one row, which `positions_read` cuts into blocks.
        return [(0, sum(of_row)) for of_row in zip(self.source.lengths, self.rows.self_lengths.lengths, strict=True)]

    def _positions(self) -> dict[str, Tensor]:
        return self._positions_in_block(self.rows.self_lengths.next_positions())

    def _context(self, x_B1D: Tensor, positions: Mapping[str, Tensor]) -> ForwardContext:
        return self._in_block(x_B1D, self.rows.self_lengths.mask(more=1), positions)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.open_BN = self.open_BN[rows]

    @torch.inference_mode()
    def replace(self, rows: Sequence[int], other: Decoding) -> None:
        assert isinstance(other, _DoubleDecoder)
        self.open_BN[rows] = other.open_BN
        super().replace(rows, other)


@torch.inference_mode()
def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    prefix: Prefix = "causal",
    begin: int = 1,
    end: int = 0,
    max_new_tokens: int = 0,
) -> Decoding:
    """Read the prompts as one batch.

    Args:
        model: A model in evaluation mode.
        prompts: Token ids of each prompt.
        prefix: `"bidirectional"` opens the attention mask over a decoder-only model's prompt, `begin` included.
        begin: Token before everything that a decoder reads.
        end: Token that stands for an empty source.
        max_new_tokens: Tokens for which the caches have room at once; with more of them they are enlarged.

    Returns:
        The state of decoding. Its `logits_BV` are those of the first generated token of each prompt.

    Raises:
        ValueError: The model generates no text, or a text is longer than its table of learned positions.
    """
    for prompt in prompts:
        if problem := prompt_beyond_table(model.config, len(prompt), max(1, max_new_tokens)):
            raise ValueError(problem)
    if isinstance(model, DoubleDecoder):
        return _DoubleDecoder(model, prompts, begin, max_new_tokens)
    if isinstance(model, EncoderDecoder):
        return _EncoderDecoder(model, prompts, begin, end, max_new_tokens)
    if not isinstance(model, DecoderOnly):
        raise ValueError(f"a model of the family {model.config.family} generates no text")
    return _DecoderOnly(model, prompts, prefix, begin, max_new_tokens)


def _prompt_mask(rows: CacheLengths, prefix: Prefix) -> AttentionMask:
    """Mask of self-attention over the prompts of a decoder."""
    opened = None if prefix == "causal" else rows.lengths[0] if rows.even else rows.lengths_B
    # Padding comes last: no token sees it, and its outputs are not used.
    return AttentionMask(causal=True, prefix=opened)


def _pad(texts: Sequence[Sequence[int]], model: LanguageModel, more: int = 0) -> tuple[Tensor, CacheLengths]:
    """(B x T ids on the model's device, padded at the end; lengths without padding, with room for `more` tokens)."""
    device, longest = model.embedding.weight.device, max(map(len, texts))
    rows = CacheLengths([len(text) for text in texts], device, capacity=longest + more)
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    return torch.tensor(padded, device=device), rows
