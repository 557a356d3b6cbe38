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
from dataclasses import dataclass

from lit_llm.components.attention.config import Reach, ResolvedAttention
from lit_llm.models.resolve import Layer, ResolvedModel


def causal_pairs(tokens: float, prefix: float = 0, reach: Reach | None = None) -> float:
    """Visible (query, key) pairs among `tokens`, of which the first `prefix` also see each other, within a window.

    Without one a polynomial in both, so that it can be averaged over cuts; hence no integer division.
    """
    behind, ahead = reach or (math.inf, math.inf)
    return _sum_up_to(tokens, behind) + _sum_up_to(prefix - 1, ahead - 1)


def full_pairs(tokens: float, reach: Reach | None = None) -> float:
    """Visible (query, key) pairs among `tokens` that all see each other, within a window."""
    behind, ahead = reach or (math.inf, math.inf)
    return tokens + _sum_up_to(tokens - 1, behind - 1) + _sum_up_to(tokens - 1, ahead - 1)


def _sum_up_to(last: float, most: float) -> float:
    """min(1, most) + min(2, most) + ... + min(last, most)."""
    return last * (last + 1) / 2 if last <= most else most * (most + 1) / 2 + (last - most) * most


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
    embedding = sum(rows * columns for rows, columns in embedding_tensors(model))
    return Parameters(embedding + sum(rows * columns for rows, columns in layer_tensors(model)), embedding)


def embedding_tensors(model: ResolvedModel) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of the vocabulary, the output's included."""
    own = [(model.vocabulary, model.d_model)] * (1 if model.tie_embeddings in ("all", "decoder") else 2)
    apart = model.family == "encoder_decoder" and model.tie_embeddings in ("decoder", "none")
    return own + [(model.vocabulary, model.width("encoder"))] * apart


def layer_tensors(model: ResolvedModel) -> list[tuple[int, int]]:
    """(rows, columns) of all other parameters; a learned scale is one row."""
    d_model, encoder_width = model.d_model, model.width("encoder")
    found = model.output.tensors(d_model, model.vocabulary, model.norm)
    found += model.embedding.tensors(d_model, model.norm)
    if model.family == "encoder_decoder":
        found += model.embedding.tensors(encoder_width, model.norm)
    for side, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        if not layers:
            continue
        width = model.width(side)
        norm, skipped = model.norm.tensors(width), model.norm.skip_first
        each = model.norm.before + (model.norm.after or model.norm.placement == "post")  # of every part
        for index, layer in enumerate(layers):
            parts = [layer.sequence_mixer.tensors(width), layer.feed_forward.tensors(width)]
            if cross := layer.cross_attention:
                parts.append(cross.tensors(width, encoder_width))
            if partial := layer.partial_attention:
                parts.append(partial.tensors(width))
            found += [tensor for part in parts for tensor in part]
            found += norm * (each * len(parts) - (skipped and index == 0))
        found += norm * (model.norm.placement != "post")  # after the last layer
        biased = [own for layer in layers if (own := layer.self_attention) and own.relative_bias == "shared"]
        found += biased[0].bias_tensors() if biased else []
    if shared := model.shared_kv:
        found += shared.shared_tensors(d_model) + model.norm.tensors(d_model) * (model.norm.placement != "post")
    return found


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


def forward_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs of one forward pass over one example."""
    d_model, source, target = model.d_model, shape.source, shape.target
    width = model.width("encoder")
    flops = shape.outputs * _output_flops(model)
    for layer in model.encoder:
        flops += 2.0 * source * (_attention_products(layer.self_attention, width) + _feed_forward(layer, width))
    if shared := model.shared_kv:
        flops += 2.0 * target * shared.shared_parameters(d_model)
    for layer in model.decoder:
        own, tokens = layer.self_attention, _queries(layer, shape)
        flops += 2.0 * tokens * (_attention_products(own, d_model) + _feed_forward(layer, d_model))
        if layer.retention:
            # Chunks are counted in whole tokens, and a sum over an average cut may be off by a rounding.
            flops += layer.retention.flops(round(target, 6), d_model, keep_state=shape.to_go_on)
        if own and layer.merged:
            flops += 2.0 * source * own.memory_parameters(d_model)
        if cross := layer.cross_attention:
            flops += 2.0 * (target * cross.query_parameters(d_model) + source * cross.memory_parameters(width))
        if partial := layer.partial_attention:
            memory = shape.partial * partial.memory_parameters(d_model)
            flops += 2.0 * (target * partial.query_parameters(d_model) + memory)
    return flops + sum(flops for *_, flops in score_flops(model, shape))


def score_flops(model: ResolvedModel, shape: Shape) -> Iterator[tuple[float, int, float]]:
    """(keys, head_dim, forward FLOPs of QKᵀ and the sum over values) of every attention, for one example."""
    source, target = shape.source, shape.target
    for layer in model.encoder:
        if own := layer.self_attention:
            yield source, own.head_dim, own.score_flops(full_pairs(source, own.reach))
    for layer in model.decoder:
        if own := layer.self_attention:
            last_alone = shape.to_go_on and own.shared_kv
            pairs = target if last_alone else causal_pairs(target, shape.prefix, own.reach)
            yield target, own.head_dim, own.score_flops(pairs)
            if layer.merged:
                yield source, own.head_dim, own.score_flops(target * source)
        if cross := layer.cross_attention:
            yield source, cross.head_dim, cross.score_flops(target * source)
        if partial := layer.partial_attention:
            yield shape.partial, partial.head_dim, partial.score_flops(target * shape.partial)


def _output_flops(model: ResolvedModel) -> float:
    """FLOPs of one position's distribution over the vocabulary."""
    return 2.0 * (model.vocabulary * model.d_model + model.output.products(model.d_model))


def _queries(layer: Layer, shape: Shape) -> float:
    """How many tokens go through a layer of the decoder."""
    sharing = layer.self_attention is not None and layer.self_attention.shared_kv
    return 1 if shape.to_go_on and sharing else shape.target


def _attention_products(attention: ResolvedAttention | None, d_model: int) -> int:
    """Of an attention's four matrices, for one token; of none, 0."""
    if attention is None:
        return 0
    return attention.query_parameters(d_model) + attention.memory_parameters(d_model)


def _feed_forward(layer: Layer, d_model: int) -> int:
    return layer.feed_forward.parameters(d_model)


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
    flops = forward_flops(model, Shape(source, target, outputs=target, partial=half))
    # Look-ups as products.
    flops += 2.0 * (source * model.width("encoder") + target * d_model) * model.vocabulary
    for layer in model.decoder:
        if own := layer.self_attention:
            flops += own.score_flops(target * target - causal_pairs(target, reach=own.reach))
    for layer in model.encoder:
        if own := layer.self_attention:
            flops += own.score_flops(source * source - full_pairs(source, own.reach))
    return flops


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
    d_model, flops = model.d_model, _output_flops(model)
    before = 1 if model.encoder else prompt  # <s>, or the prompt
    if shared := model.shared_kv:
        flops += 2.0 * shared.shared_parameters(d_model)
    for layer in model.decoder:
        flops += 2.0 * (_attention_products(layer.self_attention, d_model) + _feed_forward(layer, d_model))
        if own := layer.self_attention:
            # The token generated as number g (from 0) sees what was there before, those generated so far, and itself.
            behind = (own.reach or (math.inf,))[0]
            visible = (_sum_up_to(before + generate, behind) - _sum_up_to(before, behind)) / generate
            flops += own.score_flops(visible + (prompt if layer.merged else 0))
        if layer.retention:
            flops += layer.retention.step_flops(d_model)
        if cross := layer.cross_attention:
            flops += 2.0 * cross.query_parameters(d_model) + cross.score_flops(prompt)
        if partial := layer.partial_attention:
            flops += 2.0 * partial.query_parameters(d_model) + partial.score_flops(prompt)
    return flops


def attended_keys(model: ResolvedModel, prompt: int, number: int) -> float:
    """Keys that the token generated as this number (from 0) reads in a layer of the decoder, its own among them: mean
    over the layers, each with all of its attentions, retention with none; 0 for an encoder-only model."""
    if not model.decoder:
        return 0.0
    before, total = 1 if model.encoder else prompt, 0.0
    for layer in model.decoder:
        if own := layer.self_attention:
            total += min(before + number + 1, (own.reach or (math.inf,))[0])
        total += prompt * sum((layer.merged, layer.cross_attention is not None, layer.partial_attention is not None))
    return total / len(model.decoder)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the key-value cache of one sequence."""

    per_source_token: int
    """For each token of the prompt; in layers with a window, which keep no more than that, it is in `windows`."""
    per_generated_token: int
    start: int = 0
    """For <s>, where it is kept as part of the source: in partial attention."""
    windows: tuple[tuple[int, int], ...] = ()
    """(tokens that are kept at most, bytes of each) of every layer with a window."""
    prompt_in_windows: bool = True
    """Whether the prompt's tokens are among theirs: not in an encoder-decoder's decoder."""
    states: int = 0
    """Of retention's states, whose size depends on no number of tokens."""

    def total(self, prompt: int, generate: int) -> int:
        kept = generate + (prompt if self.prompt_in_windows else 0)
        windows = sum(each * min(kept, most) for most, each in self.windows)
        return self.start + self.states + prompt * self.per_source_token + generate * self.per_generated_token + windows


def cache_bytes(model: ResolvedModel, bytes_per_entry: int) -> CacheBytes:
    """An encoder-decoder keeps keys and values of the source, and self keys and values of what it generates.

    A decoder-only model keeps self keys and values of both, and with partial attention the source's once more. Layers
    with a window keep its tokens alone, those that share keys and values keep them once, and retention keeps a state in
    float32.
    """
    own = [each for layer in model.decoder if (each := layer.self_attention) and not each.shared_kv]
    own += [model.shared_kv] if model.shared_kv else []
    generated = sum(2 * each.kv_width for each in own if each.window is None)
    windows = tuple((each.window, 2 * each.kv_width * bytes_per_entry) for each in own if each.window is not None)
    read = [layer.self_attention if layer.merged else layer.cross_attention for layer in model.decoder]
    source = sum(2 * each.kv_width for each in read if each is not None)
    partial = sum(2 * layer.partial_attention.kv_width for layer in model.decoder if layer.partial_attention)
    if not model.encoder:
        source = generated + partial
    return CacheBytes(
        source * bytes_per_entry,
        generated * bytes_per_entry,
        partial * bytes_per_entry,
        windows,
        prompt_in_windows=not model.encoder,
        states=sum(layer.retention.state_bytes for layer in model.decoder if layer.retention),
    )
