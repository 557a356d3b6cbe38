"""Model sections of the families in a file; `resolve.py` resolves a section into one explicit config per layer.

`model.attention` and `model.feed_forward` are the defaults; `model.decoder.self_attention` and the like override single
keys in one stack, `model.decoder.layer_ranges` in some of its layers. The most specific address wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model

from lit_llm.components.attention.config import AttentionConfig, AttentionOverride
from lit_llm.components.embedding.config import EmbeddingConfig, OutputConfig
from lit_llm.components.feed_forward.config import FeedForwardConfig, FeedForwardOverride
from lit_llm.components.initialisation.config import FanIn, Initialisation
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.parametrization.config import Parametrization
from lit_llm.components.registry import COMPONENTS, components_of
from lit_llm.components.residual.config import AnyResidual, Residual
from lit_llm.config.section import OneOf, Section

S = TypeVar("S", bound=Section)

MOST_LAYERS = 1_024
"""Most layers of a stack; the deepest published Transformer has 500 per stack (DeepNet, arXiv 2203.00555)."""
MOST_RANGES = 500


class _LayerOverride(Section):
    """Overrides for some layers of any stack."""

    @classmethod
    def unknown_key(cls, key: str, value: Any) -> str:
        return COMPONENTS[key].elsewhere if key in COMPONENTS else ""


def with_components(stack: str) -> Callable[[type[S]], type[S]]:
    """A decorator that gives a section a key for each component that the layers of a stack may have."""

    def extended(section: type[S]) -> type[S]:
        fields: dict[str, Any] = {
            component.key: (
                Annotated[component.override, OneOf(default=component.override)] | None,
                Field(None, description=component.help),
            )
            for component in components_of(stack)
        }
        made = create_model(section.__name__, __base__=section, __module__=section.__module__, **fields)
        made.__doc__ = section.__doc__
        return made

    return extended


@with_components("encoder")
class EncoderLayerOverride(_LayerOverride):
    """Overrides for some layers of an encoder."""

    attention: AttentionOverride | None = None
    """Self-attention, which sees the whole source."""
    feed_forward: FeedForwardOverride | None = None
    """Feed-forward network."""


class _AnyDecoderLayerOverride(_LayerOverride):
    """Overrides that every decoder's layers have."""

    self_attention: AttentionOverride | None = None
    """Causal self-attention, open inside a bidirectional prefix."""
    feed_forward: FeedForwardOverride | None = None
    """Feed-forward network."""


@with_components("self_decoder")
class SelfDecoderLayerOverride(_AnyDecoderLayerOverride):
    """Overrides for some layers of a self-decoder."""


@with_components("decoder")
class DecoderLayerOverride(_AnyDecoderLayerOverride):
    """Overrides for some layers of a decoder-only model."""


class _ReadingLayerOverride(_AnyDecoderLayerOverride):
    """Overrides that the layers of a decoder beside an encoder have."""

    cross_attention_mode: Literal["separate", "merged", "none"] | None = None
    """How these layers read the source: by a separate cross-attention (the default), in one softmax with self-attention
    and with the same matrices (merged, T5Gemma 2, arXiv 2512.14856), or not at all."""
    cross_attention: AttentionOverride | None = None
    """Attention from the target to the encoder's output, where it is separate."""


@with_components("target_decoder")
class CrossDecoderLayerOverride(_ReadingLayerOverride):
    """Overrides for some layers of an encoder-decoder's decoder."""


class _BlockwiseLayerOverride(Section):
    """What the layers of both stacks of a double decoder refuse."""

    @classmethod
    def unknown_key(cls, key: str, value: Any) -> str:
        message = "a double decoder's layers have attention and a feed-forward network, and no component in their place"
        return message if key in COMPONENTS else ""


class ContextLayerOverride(_BlockwiseLayerOverride):
    """Overrides for some layers of a double decoder's first stack."""

    attention: AttentionOverride | None = None
    """Causal self-attention over the whole row."""
    feed_forward: FeedForwardOverride | None = None
    """Feed-forward network."""


class BlockLayerOverride(_BlockwiseLayerOverride, _ReadingLayerOverride):
    """Overrides for some layers of a double decoder's second stack, whose source is the blocks before a token's own."""


class SharingLayerOverride(_LayerOverride):
    """Overrides for some layers of a cross-decoder."""

    cross_attention: AttentionOverride | None = None
    """Causal attention within the row, by the keys and values that all of these layers share; open inside a
    bidirectional prefix. Each layer has separate queries and output; the settings of keys and values are the same."""
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


class ContextStackConfig(ContextLayerOverride):
    """The first stack of a double decoder: causal, and read by the second stack where a block is complete."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, ContextLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0: `"0-2": {attention: {qkv_norm: []}}`; `"0-21/3"` is every third."""
    d_model: int | None = Field(None, gt=0)
    """Width of this stack's residual stream; the model's when absent."""


class BlockStackConfig(BlockLayerOverride):
    """The second stack of a double decoder, which predicts every token."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    """Number of layers."""
    layer_ranges: dict[str, BlockLayerOverride] = Field({}, max_length=MOST_RANGES)
    """Overrides for some layers, counted from 0: `"0-2": {cross_attention: {rope: none}}`; `"0-21/3"`: every third."""


class _Shared(Section):
    """Settings of all families."""

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    vocabulary: int = Field(gt=1)
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    attention: AttentionConfig
    """Defaults of every attention."""
    feed_forward: FeedForwardConfig
    """Defaults of every feed-forward network."""
    norm: NormConfig = NormConfig()
    """Norms of the residual stream."""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """Embedding: its scale and its norm before the first layer."""
    output: OutputConfig = OutputConfig()
    """Head from the last layer's states to logits."""
    residual: AnyResidual = Residual()
    """Scaling of the residual connections."""
    initialisation: Initialisation = FanIn()
    """Initial values."""
    parametrization: Annotated[Parametrization, OneOf(default=Parametrization)] = Parametrization()
    """How initial values, learning rates and multipliers follow width and depth."""


class DecoderModel(_Shared):
    """Decoder-only (DecLLM): one causal stack, whose prefix may be bidirectional (BiAttn)."""

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
    tie_layers: bool = False
    """Make the encoder of the decoder's layers: self-attention, feed-forward network and the norms around them are the
    same in both stacks, layer by layer, and counted once. Cross-attention and the norm after each stack stay their own.
    After Tied Transformers (Xia et al., AAAI 2019, doi 10.1609/aaai.v33i01.33015466)."""


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

    The self-decoder's layers have a window or a recurrent state; those of the cross-decoder attend to all tokens by one
    pair of keys and values. So only the self-decoder reads a prompt, and one pair of keys and values of it is cached.
    """

    family: Literal["decoder_decoder"] = "decoder_decoder"
    """Decoder-decoder."""
    self_decoder: SelfDecoderConfig
    """The first layers. A layer with neither a `window` nor a mixer with a recurrent state attends to all tokens."""
    cross_decoder: SharingDecoderConfig
    """The last layers, which share one pair of keys and values."""
    tie_embeddings: Literal["all", "none"] = "all"
    """all: input and output embedding are one matrix."""


class DoubleDecoderModel(_Shared):
    """Double decoder (arXiv 2605.18807): two causal stacks, and a loss on every token of a row that is cut into blocks.

    The decoder sees its own block, and the encoder's states of earlier blocks. So the encoder alone reads a prompt's
    complete blocks, and the decoder reads a block until it is complete.
    """

    family: Literal["double_decoder"] = "double_decoder"
    """Double decoder."""
    block: int = Field(gt=0)
    """Tokens of a block. A study refuses one as long as a row, in which no block reads the encoder."""
    encoder: ContextStackConfig
    """The stack that reads the blocks before a token's own."""
    decoder: BlockStackConfig
    """The stack that predicts the tokens of a block."""
    tie_embeddings: Literal["all", "inputs", "decoder", "none"] = "all"
    """all: encoder input, decoder input and output are one matrix; inputs: only the two inputs are; decoder: only the
    decoder's input and the output are."""


AnyModel = DecoderModel | EncoderDecoderModel | EncoderOnlyModel | DecoderDecoderModel | DoubleDecoderModel
