"""The model section of an experiment, and its resolution into one explicit config per layer.

`model.attention` and `model.feed_forward` are the defaults; `model.decoder.self_attention` and its like override single
keys for one place, `model.decoder.layer_ranges` for some layers of it. The most specific address wins.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lit_llm.components.attention.config import AttentionConfig, AttentionOverride, ResolvedAttention, resolve_attention
from lit_llm.components.feed_forward.config import FeedForwardConfig, FeedForwardOverride
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.partial_attention.config import (
    PartialAttentionOverride,
    ResolvedPartialAttention,
    resolve_partial_attention,
)
from lit_llm.config.section import Items, OneOf, Section, impossible, set_fields
from lit_llm.config.tree import KIND

# --- what a user writes --------------------------------------------------------------------------------------------


class EncoderLayerOverride(Section):
    """What is different in some layers of an encoder."""

    attention: AttentionOverride | None = None
    """Self-attention, which sees the whole source."""
    feed_forward: FeedForwardOverride | None = None
    """Feed-forward network."""


class _AnyDecoderLayerOverride(Section):
    """What every decoder's layers have."""

    self_attention: AttentionOverride | None = None
    """Causal self-attention, open inside a bidirectional prefix."""
    feed_forward: FeedForwardOverride | None = None
    """Feed-forward network."""


class DecoderLayerOverride(_AnyDecoderLayerOverride):
    """What is different in some layers of a decoder-only model."""

    partial_attention: Annotated[PartialAttentionOverride, OneOf(default=PartialAttentionOverride)] | None = None
    """Attention to the source after self-attention (PALM, arXiv 2304.04052), in the layers for which this is written.
    Needs an objective with a source, such as `prefix_lm`."""


class CrossDecoderLayerOverride(_AnyDecoderLayerOverride):
    """What is different in some layers of an encoder-decoder's decoder."""

    cross_attention: AttentionOverride | None = None
    """Attention from the target to the encoder's output."""

    @model_validator(mode="before")
    @classmethod
    def _reads_its_source_already(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("partial_attention") is not None:
            message = "is for decoder-only models: an encoder-decoder's cross-attention reads the source already"
            raise impossible(("partial_attention", message))
        return values


class EncoderConfig(EncoderLayerOverride):
    """A stack of bidirectional layers over the source."""

    layers: int = Field(gt=0)
    """Number of layers."""
    layer_ranges: dict[str, EncoderLayerOverride] = {}
    """Overrides for some layers, counted from 0: `"0-2": {attention: {qkv_norm: []}}`."""


class DecoderConfig(DecoderLayerOverride):
    """The only stack of a decoder-only model."""

    layers: int = Field(gt=0)
    """Number of layers."""
    layer_ranges: dict[str, DecoderLayerOverride] = {}
    """Overrides for some layers, counted from 0: `"0-2": {self_attention: {qkv_norm: []}}`."""


class CrossDecoderConfig(CrossDecoderLayerOverride):
    """The target's stack of an encoder-decoder."""

    layers: int = Field(gt=0)
    """Number of layers."""
    layer_ranges: dict[str, CrossDecoderLayerOverride] = {}
    """Overrides for some layers, counted from 0: `"0-2": {cross_attention: {rope: none}}`."""


class _Shared(Section):
    """What both families have."""

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    vocabulary: int = Field(gt=1)
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    attention: AttentionConfig
    """Default of every attention."""
    feed_forward: FeedForwardConfig
    """Default of every feed-forward network."""
    norm: NormConfig = NormConfig()
    """Norm before each block and after the last layer."""

    @model_validator(mode="after")
    def _can_be_built(self) -> _Shared:
        findings = [*resolution_problems(self)]
        if findings:
            raise impossible(*dict.fromkeys(findings))
        return self


class DecoderModel(_Shared):
    """Decoder-only (DecLLM): one causal stack; at a caller's wish its prefix is bidirectional (BiAttn)."""

    family: Literal["decoder"] = "decoder"
    """Decoder-only."""
    decoder: DecoderConfig
    """The stack."""
    tie_embeddings: Literal["all", "none"] = "all"
    """all: input and output embedding are one matrix."""


class EncoderDecoderModel(_Shared):
    """Encoder-decoder (RedLLM): a bidirectional encoder, a causal decoder with cross-attention."""

    family: Literal["encoder_decoder"] = "encoder_decoder"
    """Encoder-decoder."""
    encoder: EncoderConfig
    """The source's stack."""
    decoder: CrossDecoderConfig
    """The target's stack."""
    tie_embeddings: Literal["all", "inputs", "none"] = "all"
    """all: encoder input, decoder input and output are one matrix; inputs: only the two inputs are."""


ModelConfig = Annotated[DecoderModel | EncoderDecoderModel, OneOf(default=DecoderModel, by="family")]

# --- what is computed ----------------------------------------------------------------------------------------------


class Layer(Section):
    """One layer with nothing left open."""

    self_attention: ResolvedAttention
    cross_attention: ResolvedAttention | None
    # Not in the dump where there is none: stages from before it was there keep their fingerprints.
    partial_attention: ResolvedPartialAttention | None = Field(None, exclude_if=lambda value: value is None)
    feed_forward: FeedForwardConfig


class ResolvedModel(Section):
    """A model as an explicit list of layers: what is built, costed, hashed and compared."""

    family: Literal["decoder", "encoder_decoder"]
    d_model: int
    vocabulary: int
    tie_embeddings: Literal["all", "inputs", "none"]
    norm: NormConfig
    encoder: Items[Layer]
    decoder: Items[Layer]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.encoder + self.decoder

    @property
    def has_partial_attention(self) -> bool:
        """Whether a decoder-only model needs to be told where the source ends."""
        return any(layer.partial_attention for layer in self.decoder)


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Apply all overrides. Two configs that are the same function in canonical form resolve to equal models."""
    encoder = config.encoder if isinstance(config, EncoderDecoderModel) else None
    return ResolvedModel(
        family=config.family,
        d_model=config.d_model,
        vocabulary=config.vocabulary,
        tie_embeddings=config.tie_embeddings,
        norm=config.norm,
        encoder=tuple(_layer(config, "encoder", index) for index in range(encoder.layers if encoder else 0)),
        decoder=tuple(_layer(config, "decoder", index) for index in range(config.decoder.layers)),
    )


def _layer(config: Any, side: str, index: int) -> Layer:
    stack = getattr(config, side)
    cross = "cross_attention" in type(stack).model_fields
    return Layer(
        self_attention=_attention(config, side, index, "attention" if side == "encoder" else "self_attention"),
        cross_attention=_attention(config, side, index, "cross_attention") if cross else None,
        partial_attention=_partial_attention(config, side, index),
        feed_forward=FeedForwardConfig.model_validate(
            _merged(config.feed_forward, [part for _, part in _levels(stack, side, index)], "feed_forward")
        ),
    )


def _attention(config: Any, side: str, index: int, name: str) -> ResolvedAttention:
    levels = [part for _, part in _levels(getattr(config, side), side, index)]
    values = _merged(config.attention, levels, name)
    return resolve_attention(values, config.d_model, cross=name == "cross_attention")


def _partial_attention(config: Any, side: str, index: int) -> ResolvedPartialAttention | None:
    levels = [part for _, part in _levels(getattr(config, side), side, index)]
    if all(getattr(level, "partial_attention", None) is None for level in levels):
        return None
    return resolve_partial_attention(_merged(config.attention, levels, "partial_attention"), config.d_model)


def _levels(stack: Any, side: str, index: int) -> list[tuple[str, Any]]:
    """(address, section) of what may override a layer's defaults, the most specific last."""
    ranges = [(name, part) for name, part in stack.layer_ranges.items() if index in layer_range(name)]
    return [(side, stack), *((f"{side}.layer_ranges.{name}", part) for name, part in ranges)]


def _merged(default: Section, levels: list[Any], name: str) -> dict[str, object]:
    values: dict[str, object] = {key: getattr(default, key) for key in type(default).model_fields}
    for level in levels:
        values |= _overrides(getattr(level, name))
    return values


def _overrides(section: Section | None) -> dict[str, Any]:
    """The keys that a section sets; its kind says what it is, and overrides nothing."""
    return {key: value for key, value in set_fields(section).items() if key != KIND}


def layer_range(name: str) -> range:
    """`"2-5"` as range(2, 6), `"3"` as range(3, 4). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", name)
    if match is None:
        raise ValueError(f"{name!r} is not a range of layers such as '3' or '0-2'")
    first = int(match[1])
    return range(first, int(match[2] or first) + 1)


def resolution_problems(config: Any) -> Iterator[tuple[str, str]]:
    """(key, message) for everything that keeps this model from being built."""
    for side in ("encoder", "decoder"):
        stack = getattr(config, side, None)
        if stack is None:
            continue
        ranges_fine = True
        for name in stack.layer_ranges:
            problem = _range_problem(name, stack.layers)
            if problem:
                ranges_fine = False
                yield f"{side}.layer_ranges.{name}", problem
        if not ranges_fine:
            continue
        clash = _clash(stack.layer_ranges)
        if clash:
            yield f"{side}.layer_ranges", clash
        names = [name for name in _ATTENTIONS if name in type(stack).model_fields]
        for index, name in itertools.product(range(stack.layers), names):
            try:
                if name == "partial_attention":
                    _partial_attention(config, side, index)
                else:
                    _attention(config, side, index, name)
            except ValueError as error:
                yield _blamed(stack, side, index, name), str(error)


_ATTENTIONS = ("attention", "self_attention", "cross_attention", "partial_attention")
_SHAPE = {"heads", "kv_heads", "head_dim", "rope"}
"""Keys of an attention that can make it impossible."""


def _blamed(stack: Any, side: str, index: int, name: str) -> str:
    """The most specific address that has a say in an attention's shape."""
    blamed = "attention"
    for address, part in _levels(stack, side, index):
        if _SHAPE & set_fields(getattr(part, name)).keys():
            blamed = f"{address}.{name}"
    return blamed


def _range_problem(name: str, layers: int) -> str:
    try:
        wanted = layer_range(name)
    except ValueError as error:
        return str(error)
    if not wanted:
        return f"{name!r} runs backwards"
    return "" if wanted[-1] < layers else f"the stack has the layers 0-{layers - 1} only"


def _clash(ranges: Mapping[str, Section]) -> str:
    """Two ranges may overlap, but not set the same key in the same layer: neither is the more specific."""
    seen: dict[tuple[int, str, str], str] = {}
    for name, part in ranges.items():
        for component in type(part).model_fields:
            for key in _overrides(getattr(part, component)):
                for index in layer_range(name):
                    other = seen.setdefault((index, component, key), name)
                    if other != name:
                        return f"{other!r} and {name!r} both set {component}.{key} of layer {index}"
    return ""
