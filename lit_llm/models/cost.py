"""Cost of a model by arithmetic alone: parameters, FLOPs, key-value cache. Loads no torch.

FLOPs count matrix products, a multiply-add as 2, and attention only over visible pairs; a backward pass counts twice
its forward. A window counts as one document: with masks between documents fewer pairs are visible, and the figure is an
upper bound. `paper_flops` has the convention of the RedLLM paper (arXiv 2510.26622, figures 2 and 8): forward only,
attention unmasked, and every embedding look-up as a product with a one-hot matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lit_llm.components.part import CacheBytes, Example, Part
from lit_llm.models.layer import Layer
from lit_llm.models.parameters import embedding_shapes, parameter_shapes
from lit_llm.models.resolved import ResolvedModel


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    embedding: int
    """Entries of the tables of tokens and of positions, and of the output's matrix."""
    unused: int = 0
    """Parameters of experts that one token does not use, and of layers for further tokens, which training alone has."""

    @property
    def active(self) -> int:
        """Parameters that one token uses outside of training."""
        return self.total - self.unused

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def count_parameters(model: ResolvedModel) -> Parameters:
    """Exact numbers of parameters, equal to those of the built module."""
    shapes = parameter_shapes(model)
    unused = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("decoder.future."))
    unused += sum(
        part.unused_parameters(model.widths(side))
        for side, layers in model.stacks
        for layer in layers
        for _, part in layer.parts
    )
    total = sum(map(math.prod, shapes.values()))
    return Parameters(total, sum(map(math.prod, embedding_shapes(model).values())), unused)


@dataclass(frozen=True)
class Shape:
    """Numbers of tokens that the model processes for one example; fractions are means over an objective's cuts."""

    source: float
    """Tokens of the encoder; 0 for a decoder-only model."""
    target: float
    """Tokens of the decoder (prefix included, for a decoder-only model)."""
    outputs: float
    """Positions whose distribution over the vocabulary is computed."""
    prefix: float = 0
    """Tokens at the decoder's start that see each other."""
    partial: float = 0
    """Tokens at the decoder's start that a part of a decoder-only model may read as the source."""
    to_go_on: bool = False
    """Whether these tokens are a prompt: a cross-decoder then runs for its last token alone, and recurrent states after
    the prompt are kept."""

    @property
    def tokens(self) -> float:
        return self.source + self.target


def forward_flops(model: ResolvedModel, shape: Shape, masked: bool = True) -> float:
    """FLOPs of one forward pass over one example. masked: count attention over visible pairs only."""
    flops = shape.outputs * _output_flops(model)
    if shared := model.shared_kv:
        flops += 2.0 * shape.target * shared.shared_products(model.widths("decoder"))
    for side, layer, example in examples(model, shape):
        example = example if masked else replace(example, masked=False)
        flops += sum(part.flops(example, model.widths(side)) for _, part in layer.parts)
    return flops


def examples(model: ResolvedModel, shape: Shape) -> Iterator[tuple[str, Layer, Example]]:
    """(side, layer, tokens that the layer processes) of every layer, for one example."""
    source, target = encoder_tokens(model, shape), shape.target
    for layer in model.encoder:
        yield "encoder", layer, Example(source, causal=bool(model.block))
    whole = Example(target, source, prefix=shape.prefix, marked=shape.partial, keep_state=shape.to_go_on)
    if model.block:
        # Of a prompt the decoder reads the last block alone.
        before = source if shape.to_go_on else 0
        whole = Example(target - before, source, before=before, block=model.block)
    last = Example(1, source, before=target - 1, marked=shape.partial)
    for layer in model.decoder:
        yield "decoder", layer, last if shape.to_go_on and layer.for_last_token else whole


def encoder_tokens(model: ResolvedModel, shape: Shape) -> float:
    """Tokens that the encoder processes for one example; a double decoder's reads earlier blocks of the row."""
    if not model.block:
        return shape.source
    return model.in_earlier_blocks(shape.target) if shape.to_go_on else model.read_by_encoder(shape.target)


def _output_flops(model: ResolvedModel) -> float:
    """FLOPs of one position's distribution over the vocabulary."""
    return 2.0 * (model.vocabulary * model.d_model + model.output.products(model.d_model))


def train_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs of one forward and backward pass over one example, with those of layers for further tokens."""
    return 3.0 * (forward_flops(model, shape) + _future_flops(model, shape))


def _future_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs of the layers for further tokens, each with as many outputs as the next token has."""
    if not (ahead := model.output.future_tokens):
        return 0.0
    *_, (side, layer, example) = examples(model, shape)
    layer_flops = sum(part.flops(example, model.widths(side)) for _, part in layer.parts)
    return ahead * (layer_flops + shape.outputs * _output_flops(model))


def unused_train_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs that `train_flops` would count in addition if each token visited all experts; 0 without experts."""
    layers = [
        2.0 * example.row * sum(part.unused_products(model.widths(side)) for _, part in layer.parts)
        for side, layer, example in examples(model, shape)
    ]
    return 3.0 * (sum(layers) + model.output.future_tokens * layers[-1])


def paper_flops(model: ResolvedModel, sequence_length: int) -> float:
    """The paper's "Flops per Seq": an encoder-decoder reads one half of the sequence and is trained on the other.

    Parts that the paper does not have: one that reads the source in the row reads one half, too; all others count by
    their exact FLOPs.
    """
    d_model, half = model.d_model, sequence_length // 2
    if model.family == "encoder_only":  # not the paper's; every position is read, and has a distribution
        return forward_flops(model, Shape(sequence_length, 0, outputs=sequence_length)) + (
            2.0 * sequence_length * model.vocabulary * d_model
        )
    source = half if model.source_apart else 0
    target = sequence_length - source
    shape = Shape(source, target, outputs=target, partial=half)
    flops = forward_flops(model, shape, masked=False)
    # Look-ups as products.
    looked_up = encoder_tokens(model, shape) * model.width("encoder") + target * d_model
    return flops + 2.0 * looked_up * model.vocabulary


def prefill_flops(model: ResolvedModel, prompt: int, open_prefix: bool = False) -> float:
    """FLOPs from a prompt to the first generated token's distribution, per prompt token.

    An encoder-decoder reads the prompt with its encoder and projects the cross-attention's keys and values; its decoder
    then starts from <s> alone. The cross-decoder of a decoder-decoder runs for the last token alone, and the decoder of
    a double decoder for the last block. open_prefix: a decoder-only model's prompt is bidirectional. For an
    encoder-only model, which generates nothing: FLOPs of reading a text with one masked token to predict.
    """
    source, target = (prompt, 1) if model.source_apart else (0 if model.decoder else prompt, prompt)
    target = target if model.decoder else 0
    prefix = prompt if open_prefix and not model.encoder else 0
    shape = Shape(source, target, outputs=1, prefix=prefix, partial=prompt, to_go_on=True)
    return forward_flops(model, shape) / prompt


def decode_flops(model: ResolvedModel, prompt: int, generate: int) -> float:
    """FLOPs per generated token after the prefill, averaged over `generate` tokens that use the cache; 0 for an
    encoder-only model, which generates none.

    A double decoder's encoder reads each block when the first token after it is read."""
    if not model.decoder:
        return 0.0
    flops = _output_flops(model)
    if shared := model.shared_kv:
        flops += 2.0 * shared.shared_products(model.widths("decoder"))
    # Each token sees the prompt, the tokens generated so far, and itself.
    example = _decoding(model, prompt, generate)
    processed = [("decoder", layer, example) for layer in model.decoder]
    if model.block:
        completed = Example(example.source, before=model.in_earlier_blocks(prompt))
        processed += [("encoder", layer, completed) for layer in model.encoder]
    for side, layer, example in processed:
        flops += sum(part.flops(example, model.widths(side)) for _, part in layer.parts) / generate
    return flops


def _decoding(model: ResolvedModel, prompt: int, generate: int, generated: int = 0) -> Example:
    """`generate` decoding steps after a prompt and `generated` earlier tokens.

    An encoder-decoder's row begins with <s>, any other's with the prompt."""
    before = (1 if model.source_apart else prompt) + generated
    if model.block:
        completed = model.in_earlier_blocks(before + generate) - model.in_earlier_blocks(before)
        return Example(generate, source=completed, before=before, block=model.block)
    source = prompt if model.source_apart else 0
    return Example(generate, source=source, before=before, marked=prompt, decoding=True, keep_state=True)


def attended_keys(model: ResolvedModel, prompt: int, number: int) -> float:
    """Keys that generated token `number` (from 0) reads in all attentions of a decoder layer, mean over the layers.

    Its own key counts. 0 for an encoder-only model."""
    if not model.decoder:
        return 0.0
    example = _decoding(model, prompt, 1, number)
    pairs = [pairs for layer in model.decoder for _, part in layer.parts for _, pairs in part.pairs(example)]
    return sum(pairs) / len(model.decoder)


def cache_bytes(model: ResolvedModel, bytes_per_entry: int) -> CacheBytes:
    """Bytes kept between passes for one sequence.

    An encoder-decoder caches keys and values of the source, and self-attention's of the generated tokens. A
    decoder-only model caches self-attention's of both. Keys and values that layers share are cached once. A double
    decoder caches the decoder's of the open block, and of complete ones those of the encoder and of what the decoder
    reads.
    """
    widths = model.widths("decoder")
    kept = sum(
        (part.cache_bytes(bytes_per_entry, bool(model.encoder), widths) for part in _parts(model.decoder)), CacheBytes()
    )
    if model.shared_kv:
        each = 2 * model.shared_kv.kv_width * bytes_per_entry
        kept += CacheBytes(per_source_token=each, per_generated_token=each)
    if model.block:
        widths = model.widths("encoder")
        read = sum((part.cache_bytes(bytes_per_entry, False, widths) for part in _parts(model.encoder)), CacheBytes())
        complete, opened = read.per_source_token + kept.per_source_token, kept.per_generated_token
        return CacheBytes(complete, complete, open_blocks=((model.block, opened - complete),))
    return kept


def _parts(layers: Iterable[Layer]) -> Iterator[Part]:
    for layer in layers:
        yield from (part for _, part in layer.parts)
