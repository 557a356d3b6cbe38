"""Prefill and decode: the prompt once, then one token at a time, with the keys and values of what went before kept.

decoder-only      <s> p1 p2 ─▶ decoder ─▶ logits of t1          t1 ─▶ decoder ─▶ logits of t2   ...
                               └ keys and values of <s> p1 p2         └ and of t1
                                 (in partial attention, too)            (but not in partial attention)

encoder-decoder   p1 p2 ─▶ encoder ─▶ keys and values of every cross-attention
                  <s> ─▶ decoder ─▶ logits of t1                t1 ─▶ decoder ─▶ logits of t2   ...
                         └ keys and values of <s>                     └ and of t1

decoder-decoder   <s> p1 p2 ─▶ self-decoder ─▶ shared keys and values of <s> p1 p2
                               └ windows or states, of a size that does not grow
                  p2 alone ─▶ cross-decoder ─▶ logits of t1     t1 ─▶ both ─▶ logits of t2   ...

Every token stands where a forward pass over the whole text would put it. Shorter prompts are padded at their end, and
each row goes on from its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from lit_llm.components.attention.kv_cache import CacheLengths, KeyValues
from lit_llm.components.attention.masks import AttentionMask
from lit_llm.components.attention.rope import Rotations
from lit_llm.components.retention.cache import RetentionState
from lit_llm.models.cache import LayerCache
from lit_llm.models.decoder_decoder import DecoderDecoder
from lit_llm.models.families import DecoderOnly, EncoderDecoder, LanguageModel, compute_dtype
from lit_llm.models.resolve import Layer

Prefix = Literal["causal", "bidirectional"]


class Decoding(ABC):
    """B prompts that have been read, and what is kept of them. Made by `prefill`."""

    def __init__(self, model: LanguageModel, rows: CacheLengths, layers: Sequence[LayerCache]) -> None:
        self.model = model
        self.rows = rows
        """The decoder's tokens so far."""
        self.layers = layers
        self.logits_BV: Tensor
        """Of the token that comes next in each row."""

    @abstractmethod
    def _step(self, x_B1D: Tensor, rotations: Rotations) -> Tensor:
        """The decoder's output, B x 1 x D, for one more token of each row; `rotations` know the token's own place."""

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> None:
        """Each row goes on with one more token; new `logits_BV`."""
        x_B1D = self.model.embed(tokens_B[:, None])
        rotations = Rotations(compute_dtype(x_B1D))
        rotations.place("self", self.rows.next_positions())
        hidden_B1D = self._step(x_B1D, rotations)
        self.rows.advance()
        self.logits_BV = self.model.logits(hidden_B1D[:, 0])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self.rows.keep(rows)
        for part in self._parts():
            part.keep(rows)
        self.logits_BV = self.logits_BV[rows]

    def cache_bytes(self) -> list[int]:
        """Measured: what the keys and values (and states) of each row take, without padding and room for more.

        With n tokens chosen, the last of which the model has not read yet, it is what `lit_llm.models.cost.cache_bytes`
        says of the prompt and n generated tokens: <s> stands in for the last.
        """
        return [sum(row) for row in zip(*(part.bytes() for part in self._parts()), strict=True)]

    def _parts(self) -> list[KeyValues | RetentionState]:
        return [part for layer in self.layers for part in layer.parts]


def _cache(
    layer: Layer, rows: CacheLengths, crossed: KeyValues | None = None, partial: KeyValues | None = None
) -> LayerCache:
    """What a decoder's layer keeps: of its own row, and of the source."""
    own = None if layer.self_attention is None else KeyValues(rows, layer.self_attention.window)
    return LayerCache(own, crossed, partial, None if layer.retention is None else RetentionState(rows))


class _DecoderOnly(Decoding):
    def __init__(self, model: DecoderOnly, prompts: Sequence[Sequence[int]], prefix: Prefix, begin: int) -> None:
        tokens_BT, rows = _padded([[begin, *prompt] for prompt in prompts], model)
        self.source_rows = CacheLengths(
            rows.lengths, tokens_BT.device
        )  # of partial attention; <s> is part of the source
        self.source_visible = self.source_rows.visible()
        caches = []
        for layer in model.config.decoder:
            of_source = KeyValues(self.source_rows) if layer.partial_attention else None
            caches.append(_cache(layer, rows, partial=of_source))
        super().__init__(model, rows, caches)
        visible = _of_prompts(rows, prefix)
        x_BTD = model.embed(tokens_BT)
        rotations = Rotations(compute_dtype(x_BTD))
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rotations.place("self", positions)
        rotations.place("source", positions)
        source_tokens = tokens_BT.shape[1]
        hidden_BTD = model.decoder(x_BTD, visible, rotations, None, self.source_visible, self.layers, source_tokens)
        last_BD = hidden_BTD[torch.arange(len(prompts), device=tokens_BT.device), rows.lengths_B - 1]
        self.logits_BV = model.logits(last_BD)

    def _step(self, x_B1D: Tensor, rotations: Rotations) -> Tensor:
        visible = self.rows.visible(more=1)
        return cast(Tensor, self.model.decoder(x_B1D, visible, rotations, None, self.source_visible, self.layers))

    def keep(self, rows: Sequence[int]) -> None:
        self.source_rows.keep(rows)
        super().keep(rows)
        self.source_visible = self.source_rows.visible()


class _DecoderDecoder(Decoding):
    def __init__(self, model: DecoderDecoder, prompts: Sequence[Sequence[int]], prefix: Prefix, begin: int) -> None:
        tokens_BT, rows = _padded([[begin, *prompt] for prompt in prompts], model)
        caches = [_cache(layer, rows) for layer in model.config.decoder[: model.config.self_layers]]
        super().__init__(model, rows, caches)
        self.decoder, self.shared = model.decoder, KeyValues(rows)
        x_BTD = model.embed(tokens_BT)
        rotations = Rotations(compute_dtype(x_BTD))
        rotations.place("self", torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        x_BTD, shared_kv = self._read(x_BTD, _of_prompts(rows, prefix), rotations)
        # What comes next depends on the last token's own way through the cross-decoder, and on no other's.
        last_B1D = x_BTD[torch.arange(len(prompts), device=tokens_BT.device), rows.lengths_B - 1][:, None]
        rotations = Rotations(rotations.dtype)
        rotations.place("self", rows.next_positions() - 1)
        hidden_B1D = self.decoder.answer(last_B1D, shared_kv, rows.visible(), rotations)
        self.logits_BV = model.logits(hidden_B1D[:, 0])

    def _step(self, x_B1D: Tensor, rotations: Rotations) -> Tensor:
        visible = self.rows.visible(more=1)
        x_B1D, shared_kv = self._read(x_B1D, visible, rotations)
        return self.decoder.answer(x_B1D, shared_kv, visible, rotations)

    def _read(
        self, x_BTD: Tensor, visible: AttentionMask, rotations: Rotations
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The self-decoder's output for new tokens, and the shared keys and values of all tokens so far."""
        x_BTD = self.decoder(x_BTD, visible, rotations, cache=self.layers, finish=False)
        return x_BTD, self.shared.add(*self.decoder.keys_values(x_BTD, rotations))

    def _parts(self) -> list[KeyValues | RetentionState]:
        return [*super()._parts(), self.shared]


class _EncoderDecoder(Decoding):
    def __init__(self, model: EncoderDecoder, prompts: Sequence[Sequence[int]], begin: int, end: int) -> None:
        source_BS, self.source_rows = _padded([prompt if len(prompt) else [end] for prompt in prompts], model)
        self.source_visible = self.source_rows.visible()  # one for all steps, which then share its mask
        encoder_BSD = model.encode(source_BS, self.source_visible.key_lengths)
        rows = CacheLengths([0] * len(prompts), source_BS.device)
        caches = []
        for layer in model.config.decoder:
            of_source = KeyValues(self.source_rows) if layer.cross_attention or layer.merged else None
            caches.append(_cache(layer, rows, crossed=of_source))
        super().__init__(model, rows, caches)
        self.encoder_BSD: Tensor | None = encoder_BSD
        self.step(torch.full((len(prompts),), begin, device=source_BS.device))
        self.encoder_BSD = None  # its keys and values are kept

    def _step(self, x_B1D: Tensor, rotations: Rotations) -> Tensor:
        rotations.place("restart", self.rows.next_positions())
        rotations.place("continuous", self.source_rows.next_positions() + self.rows.next_positions())
        if self.encoder_BSD is not None:
            rotations.place("source", torch.arange(self.encoder_BSD.shape[1], device=x_B1D.device))
        visible = self.rows.visible(more=1)
        out = self.model.decoder(x_B1D, visible, rotations, self.encoder_BSD, self.source_visible, self.layers)
        return cast(Tensor, out)

    def keep(self, rows: Sequence[int]) -> None:
        self.source_rows.keep(rows)
        super().keep(rows)
        self.source_visible = self.source_rows.visible()


@torch.inference_mode()
def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    prefix: Prefix = "causal",
    begin: int = 1,
    end: int = 0,
) -> Decoding:
    """Read the prompts as one batch.

    Args:
        model: A model in evaluation mode.
        prompts: Token ids of each prompt.
        prefix: `"bidirectional"` opens the attention mask over a decoder-only model's prompt, `begin` included.
        begin: Token before everything that a decoder reads.
        end: Token that stands for an empty source.

    Returns:
        The state of decoding. Its `logits_BV` are those of the first generated token of each prompt.
    """
    if isinstance(model, EncoderDecoder):
        return _EncoderDecoder(model, prompts, begin, end)
    if isinstance(model, DecoderDecoder):
        return _DecoderDecoder(model, prompts, prefix, begin)
    if not isinstance(model, DecoderOnly):
        raise ValueError(f"a model of the family {model.config.family} generates no text")
    return _DecoderOnly(model, prompts, prefix, begin)


def _of_prompts(rows: CacheLengths, prefix: Prefix) -> AttentionMask:
    """Who sees whom in prompts that a decoder reads."""
    visible = AttentionMask(causal=True)  # padding comes last: no token sees it, and what it sees is of no concern
    if prefix == "bidirectional":
        visible.prefix = rows.lengths[0] if rows.even else rows.lengths_B
    return visible


def _padded(texts: Sequence[Sequence[int]], model: LanguageModel) -> tuple[Tensor, CacheLengths]:
    """B x T ids on the model's device, padded at the end, and how many are real."""
    device = model.embedding.weight.device
    rows = CacheLengths([len(text) for text in texts], device)
    longest = max(rows.lengths)
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    return torch.tensor(padded, device=device), rows
