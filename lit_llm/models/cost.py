"""What a model costs, by arithmetic alone: parameters, FLOPs, key-value cache, memory. Loads no torch.

FLOPs count matrix products, a multiply-add as 2, and attention only over the pairs that its mask leaves visible; a
backward pass counts twice its forward. A window counts as one document: where several are kept separate, and only the
text knows where, fewer pairs are visible and the figure is an upper bound. Beside them stands the convention of the
RedLLM paper (arXiv 2510.26622, figures 2 and 8): forward only, attention unmasked, and every embedding look-up as a
product with a one-hot matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_llm.components.part import CacheBytes, Example
from lit_llm.models.parameters import embedding_shapes, parameter_shapes
from lit_llm.models.resolve import Layer, ResolvedModel


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    embedding: int
    """Rows x width of every matrix that belongs to the vocabulary, the output's included."""

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def count_parameters(model: ResolvedModel) -> Parameters:
    """Exact numbers, equal to those of the built module."""
    total = sum(map(math.prod, parameter_shapes(model).values()))
    return Parameters(total, sum(map(math.prod, embedding_shapes(model).values())))


@dataclass(frozen=True)
class Shape:
    """How much one example puts through the model, in tokens; fractions are means over an objective's cuts."""

    source: float
    """Tokens of the encoder; 0 for a decoder-only model."""
    target: float
    """Tokens of the decoder (prefix included, for a decoder-only model)."""
    outputs: float
    """Positions whose distribution over the vocabulary is computed."""
    prefix: float = 0
    """Tokens at the decoder's start that see each other."""
    partial: float = 0
    """Tokens at the decoder's start that partial attention reads as the source, where a model has it."""
    to_go_on: bool = False
    """Whether these tokens are a prompt: a cross-decoder then runs for the last of them alone, and retention keeps the
    state after them."""

    @property
    def tokens(self) -> float:
        return self.source + self.target


def forward_flops(model: ResolvedModel, shape: Shape, masked: bool = True) -> float:
    """FLOPs of one forward pass over one example. masked: whether attention counts over the visible pairs only."""
    flops = shape.outputs * _output_flops(model)
    if shared := model.shared_kv:
        flops += 2.0 * shape.target * shared.shared_products(model.widths("decoder"))
    for side, layer, example in examples(model, shape):
        example = example if masked else replace(example, masked=False)
        flops += sum(part.flops(example, model.widths(side)) for _, part in layer.parts)
    return flops


def examples(model: ResolvedModel, shape: Shape) -> Iterator[tuple[str, Layer, Example]]:
    """(side, layer, what one example puts through it) of every layer."""
    source, target = shape.source, shape.target
    for layer in model.encoder:
        yield "encoder", layer, Example(source, causal=False)
    whole = Example(target, source, prefix=shape.prefix, marked=shape.partial, keep_state=shape.to_go_on)
    last = Example(1, source, before=target - 1, marked=shape.partial)
    for layer in model.decoder:
        yield "decoder", layer, last if shape.to_go_on and layer.for_last_token else whole


def _output_flops(model: ResolvedModel) -> float:
    """FLOPs of one position's distribution over the vocabulary."""
    return 2.0 * (model.vocabulary * model.d_model + model.output.products(model.d_model))


def train_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs of one forward and backward pass over one example."""
    return 3.0 * forward_flops(model, shape)


def paper_flops(model: ResolvedModel, sequence_length: int) -> float:
    """The paper's "Flops per Seq": an encoder-decoder reads one half of the sequence and is trained on the other.

    What the paper does not have: partial attention reads one half, too, and retention is counted as it is.
    """
    d_model, split, half = model.d_model, bool(model.encoder), sequence_length // 2
    if model.family == "encoder_only":  # not the paper's; every position is read, and has a distribution
        return forward_flops(model, Shape(sequence_length, 0, outputs=sequence_length)) + (
            2.0 * sequence_length * model.vocabulary * d_model
        )
    source = half if split else 0
    target = sequence_length - source
    flops = forward_flops(model, Shape(source, target, outputs=target, partial=half), masked=False)
    # Look-ups as products.
    return flops + 2.0 * (source * model.width("encoder") + target * d_model) * model.vocabulary


def prefill_flops(model: ResolvedModel, prompt: int, open_prefix: bool = False) -> float:
    """FLOPs from a prompt to the first generated token's distribution, per prompt token.

    An encoder-decoder reads the prompt with its encoder and projects the cross-attention's keys and values; its decoder
    then starts from <s> alone. Of a decoder-decoder the cross-decoder runs for the last token alone. open_prefix: a
    decoder-only model's prompt is bidirectional. An encoder-only model generates nothing: what it reads costs this,
    with one masked token to fill in.
    """
    source, target = (prompt, 1) if model.encoder and model.decoder else (prompt * bool(model.encoder), prompt)
    target = target if model.decoder else 0
    prefix = prompt if open_prefix and not model.encoder else 0
    shape = Shape(source, target, outputs=1, prefix=prefix, partial=prompt, to_go_on=True)
    return forward_flops(model, shape) / prompt


def decode_flops(model: ResolvedModel, prompt: int, generate: int) -> float:
    """FLOPs per generated token after the prefill, averaged over `generate` tokens that use the cache; 0 for an
    encoder-only model, which generates none."""
    if not model.decoder:
        return 0.0
    flops = _output_flops(model)
    if shared := model.shared_kv:
        flops += 2.0 * shared.shared_products(model.widths("decoder"))
    # The tokens see what was there before, those generated so far, and themselves.
    example, widths = _decoding(model, prompt, generate), model.widths("decoder")
    for layer in model.decoder:
        flops += sum(part.flops(example, widths) for _, part in layer.parts) / generate
    return flops


def _decoding(model: ResolvedModel, prompt: int, generate: int, generated: int = 0) -> Example:
    """`generate` decoding steps after a prompt and `generated` earlier tokens. An encoder-decoder's row has <s> first,
    any other's the prompt."""
    before = (1 if model.encoder else prompt) + generated
    source = prompt if model.encoder else 0
    return Example(generate, source=source, before=before, marked=prompt, decoding=True, keep_state=True)


def attended_keys(model: ResolvedModel, prompt: int, number: int) -> float:
    """Keys that the token generated as this number (from 0) reads in a layer of the decoder, its own among them: mean
    over the layers, each with all of its attentions; 0 for an encoder-only model."""
    if not model.decoder:
        return 0.0
    example = _decoding(model, prompt, 1, number)
    pairs = [pairs for layer in model.decoder for _, part in layer.parts for _, pairs in part.pairs(example)]
    return sum(pairs) / len(model.decoder)


def cache_bytes(model: ResolvedModel, bytes_per_entry: int) -> CacheBytes:
    """What is kept between passes for one sequence.

    An encoder-decoder keeps keys and values of the source, and self keys and values of what it generates. A
    decoder-only model keeps self keys and values of both. Keys and values that layers share are kept once.
    """
    parts = [part for layer in model.decoder for _, part in layer.parts]
    kept = sum((part.cache_bytes(bytes_per_entry, bool(model.encoder)) for part in parts), CacheBytes())
    if model.shared_kv:
        each = 2 * model.shared_kv.kv_width * bytes_per_entry
        kept += CacheBytes(per_source_token=each, per_generated_token=each)
    return kept
