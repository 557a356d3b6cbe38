"""The families' sections, as a user writes them; `resolve.py` makes one explicit config per layer of one.

`model.attention` and `model.feed_forward` are the defaults; `model.decoder.self_attention` and its like override single
keys for one place, `model.decoder.layer_ranges` for some layers of it. The most specific address wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lit_llm.components.attention.config import AttentionConfig, AttentionOverride
from lit_llm.components.embedding.config import EmbeddingConfig, OutputConfig
from lit_llm.components.feed_forward.config import FeedForwardConfig, FeedForwardOverride
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.partial_attention.config import PartialAttentionOverride
from lit_llm.components.retention.config import RetentionOverride
from lit_llm.config.section import OneOf, Section, config_error

MOST_LAYERS = 1_024
"""Of a stack; the deepest Transformer that was published has 500 (DeepNet, arXiv 2203.00555)."""
MOST_RANGES = 500


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


class SelfDecoderLayerOverride(_AnyDecoderLayerOverride):
    """What is different in some layers of a self-decoder."""

    retention: Annotated[RetentionOverride, OneOf(default=RetentionOverride)] | None = None
    """Gated retention (YOCO, arXiv 2405.05254) in place of self-attention, in the layers for which this is written;
    with as many heads as `model.attention` unless it says so. It is causal: no prefix can be opened to it."""


class DecoderLayerOverride(SelfDecoderLayerOverride):
    """What is different in some layers of a decoder-only model."""

    partial_attention: Annotated[PartialAttentionOverride, OneOf(default=PartialAttentionOverride)] | None = None
    """Attention to the source after self-attention (PALM, arXiv 2304.04052), in the layers for which this is written.
    Needs an objective with a source, such as `prefix_lm`."""


class CrossDecoderLayerOverride(_AnyDecoderLayerOverride):
    """What is different in some layers of an encoder-decoder's decoder."""

    cross_attention_mode: Literal["separate", "merged", "none"] | None = None
    """How these layers read the source: by a cross-attention of their own (the default), in one softmax with
    self-attention and by its matrices (merged, T5Gemma 2, arXiv 2512.14856), or not at all."""
    cross_attention: AttentionOverride | None = None
    """Attention from the target to the encoder's output, where it is separate."""

    @model_validator(mode="before")
    @classmethod
    def _reads_its_source_already(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("partial_attention") is not None:
            message = "is for decoder-only models: an encoder-decoder's cross-attention reads the source already"
            raise config_error(("partial_attention", message))
        return values


class SharingLayerOverride(Section):
    """What is different in some layers of a cross-decoder."""

    cross_attention: AttentionOverride | None = None
    """Causal attention over the row itself, by the keys and values that all of these layers share; open inside a
    bidirectional prefix. A layer has its own queries and output; what makes keys and values is the same in all."""
    feed_forward: FeedForwardOverride | None = None
    """Feed-forward network."""


class EncoderConfig(EncoderLayerOverride):
    """A stack of bidirectional layers over the source."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, EncoderLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0: `"0-2": {attention: {qkv_norm: []}}`; `"0-21/3"` is every third."""


class SourceEncoderConfig(EncoderConfig):
    """The source's stack of an encoder-decoder."""

    d_model: int | None = Field(None, gt=0)
    """Width of the encoder's residual stream; the model's when absent."""


class DecoderConfig(DecoderLayerOverride):
    """The only stack of a decoder-only model."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, DecoderLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0: `"0-2": {self_attention: {qkv_norm: []}}`; `"0-21/3"`: every third."""


class CrossDecoderConfig(CrossDecoderLayerOverride):
    """The target's stack of an encoder-decoder."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, CrossDecoderLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0: `"0-2": {cross_attention: {rope: none}}`; `"0-21/3"`: every third."""


class SelfDecoderConfig(SelfDecoderLayerOverride):
    """The first stack of a decoder-decoder, whose output makes the shared keys and values."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, SelfDecoderLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0: `"0-2": {self_attention: {window: 64}}`; `"0-21/3"`: every third."""


class SharingDecoderConfig(SharingLayerOverride):
    """The second stack of a decoder-decoder, all of whose layers read the shared keys and values."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, SharingLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0, the stack's first: `"0-2": {cross_attention: {heads: 2}}`."""


class _Shared(Section):
    """What all families have."""

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    vocabulary: int = Field(gt=1)
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    attention: AttentionConfig
    """Default of every attention."""
    feed_forward: FeedForwardConfig
    """Default of every feed-forward network."""
    norm: NormConfig = NormConfig()
    """Norms of the residual stream."""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """What is done to embeddings before the first layer."""
    output: OutputConfig = OutputConfig()
    """What is done to the last layer's states to make logits of them."""


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
    encoder: SourceEncoderConfig
    """The source's stack."""
    decoder: CrossDecoderConfig
    """The target's stack."""
    tie_embeddings: Literal["all", "inputs", "decoder", "none"] = "all"
    """all: encoder input, decoder input and output are one matrix; inputs: only the two inputs are; decoder: only the
    decoder's input and the output are (T5Gemma)."""


class EncoderOnlyModel(_Shared):
    """Encoder-only (ModernBERT, arXiv 2412.13663): one bidirectional stack that fills in masked tokens."""

    family: Literal["encoder_only"] = "encoder_only"
    """Encoder-only."""
    encoder: EncoderConfig
    """The stack."""
    tie_embeddings: Literal["all", "none"] = "all"
    """all: input and output embedding are one matrix."""


class DecoderDecoderModel(_Shared):
    """Decoder-decoder (YOCO, arXiv 2405.05254): decoder-only, with keys and values made once for half of its layers.

    The self-decoder's layers look at what is near (a window) or keep a state of fixed size (retention), and those of
    the cross-decoder at everything, by one pair of keys and values. So a prompt is read by the self-decoder alone, and
    one layer's keys and values are kept of it.
    """

    family: Literal["decoder_decoder"] = "decoder_decoder"
    """Decoder-decoder."""
    self_decoder: SelfDecoderConfig
    """The layers that come first. A layer without `window` or `retention` sees everything, by keys of its own."""
    cross_decoder: SharingDecoderConfig
    """The layers that come after them and share one pair of keys and values."""
    tie_embeddings: Literal["all", "none"] = "all"
    """all: input and output embedding are one matrix."""


AnyModel = DecoderModel | EncoderDecoderModel | EncoderOnlyModel | DecoderDecoderModel
