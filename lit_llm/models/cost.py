"""What a model costs, by arithmetic alone: parameters, FLOPs, key-value cache, memory. Loads no torch.

FLOPs count matrix products, a multiply-add as 2, and attention only over the pairs that its mask leaves visible; a
backward pass counts twice its forward. A window counts as one document: where several are kept separate, and only the
text knows where, fewer pairs are visible and the figure is an upper bound. Beside them stands the convention of the
RedLLM paper (arXiv 2510.26622, figures 2 and 8): forward only, attention unmasked, and every embedding look-up as a
product with a one-hot matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.models.config import Layer, ResolvedModel


def causal_pairs(tokens: float, prefix: float = 0) -> float:
    """Visible (query, key) pairs among `tokens`, of which the first `prefix` also see each other.

    A polynomial in both, so that it can be averaged over cuts; hence no integer division.
    """
    return (tokens * (tokens + 1) + prefix * (prefix - 1)) / 2


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
    matrices = {"all": 1, "inputs": 2, "none": 3 if model.encoder else 2}[model.tie_embeddings]
    return [(model.vocabulary, model.d_model)] * matrices


def layer_tensors(model: ResolvedModel) -> list[tuple[int, int]]:
    """(rows, columns) of all other parameters; a learned scale is one row."""
    d_model, norm = model.d_model, model.norm.tensors(model.d_model)
    found = norm * (1 + bool(model.encoder))  # after the last layer of each stack
    for layer in model.layers:
        found += layer.self_attention.tensors(d_model) + layer.feed_forward.tensors(d_model) + norm * 2
        if cross := layer.cross_attention:
            found += cross.tensors(d_model) + norm
        if partial := layer.partial_attention:
            found += partial.tensors(d_model) + norm
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

    @property
    def tokens(self) -> float:
        return self.source + self.target


def forward_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs of one forward pass over one example."""
    d_model, source, target = model.d_model, shape.source, shape.target
    flops = 2.0 * shape.outputs * model.vocabulary * d_model
    for layer in model.encoder:
        flops += 2.0 * source * (_attention_products(layer.self_attention, d_model) + _feed_forward(layer, d_model))
        flops += layer.self_attention.score_flops(source * source)
    for layer in model.decoder:
        flops += 2.0 * target * (_attention_products(layer.self_attention, d_model) + _feed_forward(layer, d_model))
        flops += layer.self_attention.score_flops(causal_pairs(target, shape.prefix))
        if cross := layer.cross_attention:
            flops += 2.0 * (target * cross.query_parameters(d_model) + source * cross.memory_parameters(d_model))
            flops += cross.score_flops(target * source)
        if partial := layer.partial_attention:
            memory = shape.partial * partial.memory_parameters(d_model)
            flops += 2.0 * (target * partial.query_parameters(d_model) + memory)
            flops += partial.score_flops(target * shape.partial)
    return flops


def _attention_products(attention: ResolvedAttention, d_model: int) -> int:
    return attention.query_parameters(d_model) + attention.memory_parameters(d_model)


def _feed_forward(layer: Layer, d_model: int) -> int:
    return layer.feed_forward.parameters(d_model)


def train_flops(model: ResolvedModel, shape: Shape) -> float:
    """FLOPs of one forward and backward pass over one example."""
    return 3.0 * forward_flops(model, shape)


def paper_flops(model: ResolvedModel, sequence_length: int) -> float:
    """The paper's "Flops per Seq": an encoder-decoder reads one half of the sequence and is trained on the other.

    Partial attention, which the paper does not have, reads one half, too.
    """
    d_model, split, half = model.d_model, bool(model.encoder), sequence_length // 2
    source = half if split else 0
    target = sequence_length - source
    flops = forward_flops(model, Shape(source, target, outputs=target, partial=half))
    flops += 2.0 * (source + target) * model.vocabulary * d_model  # look-ups as products
    masked = target * target - causal_pairs(target)
    return flops + sum(layer.self_attention.score_flops(masked) for layer in model.decoder)


def prefill_flops(model: ResolvedModel, prompt: int, open_prefix: bool = False) -> float:
    """FLOPs from a prompt to the first generated token's distribution, per prompt token.

    An encoder-decoder reads the prompt with its encoder and projects the cross-attention's keys and values; its decoder
    then starts from <s> alone. open_prefix: a decoder-only model's prompt is bidirectional.
    """
    source, target = (prompt, 1) if model.encoder else (0, prompt)
    prefix = prompt if open_prefix and not model.encoder else 0
    return forward_flops(model, Shape(source, target, outputs=1, prefix=prefix, partial=prompt)) / prompt


def decode_flops(model: ResolvedModel, prompt: int, generate: int) -> float:
    """FLOPs per generated token after the prefill, averaged over `generate` tokens that use the cache."""
    d_model, flops = model.d_model, 2.0 * model.vocabulary * model.d_model
    before = 1 if model.encoder else prompt  # <s>, or the prompt
    # The token generated as number g (from 0) sees what was there before, those generated so far, and itself.
    visible = before + (generate + 1) / 2
    for layer in model.decoder:
        flops += 2.0 * (_attention_products(layer.self_attention, d_model) + _feed_forward(layer, d_model))
        flops += layer.self_attention.score_flops(visible)
        if cross := layer.cross_attention:
            flops += 2.0 * cross.query_parameters(d_model) + cross.score_flops(prompt)
        if partial := layer.partial_attention:
            flops += 2.0 * partial.query_parameters(d_model) + partial.score_flops(prompt)
    return flops


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the key-value cache of one sequence."""

    per_source_token: int
    """For each token of the prompt."""
    per_generated_token: int
    start: int = 0
    """For <s>, where it is kept as part of the source: in partial attention."""

    def total(self, prompt: int, generate: int) -> int:
        return self.start + prompt * self.per_source_token + generate * self.per_generated_token


def cache_bytes(model: ResolvedModel, bytes_per_entry: int) -> CacheBytes:
    """An encoder-decoder keeps cross keys and values of the source, and self keys and values of what it generates.

    A decoder-only model keeps self keys and values of both, and with partial attention the source's once more.
    """
    generated = sum(2 * layer.self_attention.kv_width for layer in model.decoder)
    source = sum(2 * layer.cross_attention.kv_width for layer in model.decoder if layer.cross_attention)
    partial = sum(2 * layer.partial_attention.kv_width for layer in model.decoder if layer.partial_attention)
    if not model.encoder:
        source = generated + partial
    return CacheBytes(source * bytes_per_entry, generated * bytes_per_entry, partial * bytes_per_entry)
