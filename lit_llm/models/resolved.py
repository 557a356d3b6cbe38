"""A model with all settings resolved: one explicit config per layer. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.embedding.config import EmbeddingConfig, OutputConfig
from lit_llm.components.initialisation.config import FanIn, Initialisation
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.parametrization.config import Parametrization
from lit_llm.components.part import Part, Widths
from lit_llm.components.registry import COMPONENTS
from lit_llm.components.residual.config import AnyResidual, Residual
from lit_llm.config.section import Items, Section
from lit_llm.models.layer import Layer


class ResolvedModel(Section):
    """A model as an explicit list of layers, which is built, costed, hashed and compared."""

    family: Literal["decoder", "encoder_decoder", "encoder_only", "decoder_decoder", "double_decoder"]
    d_model: int
    vocabulary: int
    tie_embeddings: Literal["all", "inputs", "decoder", "none"]
    norm: NormConfig
    embedding: EmbeddingConfig = Field(EmbeddingConfig(), exclude_if=lambda value: value == EmbeddingConfig())
    output: OutputConfig = Field(OutputConfig(), exclude_if=lambda value: value == OutputConfig())
    residual: AnyResidual = Field(Residual(), exclude_if=lambda value: value == Residual())
    initialisation: Initialisation = Field(FanIn(), exclude_if=lambda value: value == FanIn())
    parametrization: Parametrization = Field(Parametrization(), exclude_if=lambda value: value == Parametrization())
    encoder_d_model: int | None = Field(None, exclude_if=lambda value: value is None)
    """The encoder's width, where it differs from `d_model`."""
    tie_layers: bool = Field(False, exclude_if=lambda value: not value)
    """Whether the encoder's layers are parts of the decoder's, which then has their parameters."""
    block: int | None = Field(None, exclude_if=lambda value: value is None)
    """Tokens of a block of a double decoder; None in other families."""
    encoder: Items[Layer]
    decoder: Items[Layer]
    """Layers of the decoder; in a decoder-decoder the self-decoder's, then the cross-decoder's, which share keys."""

    def width(self, side: str) -> int:
        """Width of the residual stream of the `encoder` or the `decoder`."""
        return self.encoder_d_model if side == "encoder" and self.encoder_d_model else self.d_model

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.encoder + self.decoder

    def widths(self, side: str) -> Widths:
        """Input widths of the layers of the `encoder` or the `decoder`."""
        return Widths(self.width(side), self.width("encoder"))

    @property
    def stacks(self) -> tuple[tuple[str, tuple[Layer, ...]], ...]:
        """Pairs (side, its layers)."""
        return ("encoder", self.encoder), ("decoder", self.decoder)

    @property
    def parts(self) -> Iterator[Part]:
        """The parts of all layers; identical layers count once."""
        for layer in {id(layer): layer for layer in self.layers}.values():
            yield from (part for _, part in layer.parts)

    @property
    def reads_marked(self) -> str:
        """Name of a part of a decoder-only model that needs to know where the source ends, or ''."""
        return next((part.reads_marked for part in self.parts if part.reads_marked), "")

    @property
    def causal_only(self) -> str:
        """Reason why this model cannot have a bidirectional prefix, or ''."""
        if self.block:
            return "a double decoder is causal in both stacks"
        return next((part.causal_only for part in self.parts if part.causal_only), "")

    @property
    def source_apart(self) -> bool:
        """True where a source is apart from the decoder's row."""
        return self.family == "encoder_decoder"

    def in_earlier_blocks(self, tokens: float) -> float:
        """Number of tokens of a row that stand before the block of its last token."""
        assert self.block is not None
        return (tokens - 1) // self.block * self.block if tokens >= 1 else 0

    def read_by_encoder(self, tokens: float) -> float:
        """Tokens of a row that a double decoder's encoder reads in a pass over the whole row; nothing reads the others.

        At least one, so that a row within one block uses all parameters, though with a gradient of zero.
        """
        return max(1, self.in_earlier_blocks(tokens))

    @property
    def self_layers(self) -> int:
        """Number of decoder layers before the shared keys and values; all where none are shared."""
        return sum(not layer.for_last_token for layer in self.decoder)

    @property
    def shared_kv(self) -> ResolvedAttention | None:
        """One attention of the cross-decoder, which defines the shared keys and values; None in other families."""
        return self.decoder[-1].self_attention if self.self_layers < len(self.decoder) else None


def not_analysed(model: ResolvedModel) -> str:
    """Reason why the analysis of attention cannot be applied to this model, or ''."""
    shows = "it looks at self-attention, and at cross-attention in every layer of a decoder, with norms before them"
    if model.family == "encoder_only":
        return f"an encoder-only model has no targets; {shows}"
    if model.block:
        return f"a double decoder's source grows with every block; {shows}, of one source apart from its targets"
    if model.tie_layers:
        return f"the attentions of the encoder are those of the decoder; {shows} of each stack"
    if model.shared_kv is not None:
        return f"the cross-decoder's layers have no keys and values of their own; {shows}"
    if not model.norm.before or model.norm.skip_first:
        return f"norm.placement {model.norm.placement} (skip_first: {model.norm.skip_first}); {shows}"
    if model.residual != Residual() or model.parametrization.kind == "completep":
        return f"the analysis does not see what a branch is multiplied by before it is added; {shows}"
    for name, component in COMPONENTS.items():
        if component.role != "feed_forward" and any(layer.part(name) for layer in model.layers):
            return f"the analysis does not see {name}; {shows}"
    for layer in model.decoder:
        if model.encoder and layer.cross_attention is None:
            return f"a layer has no cross-attention of its own; {shows}"
    if any(layer.self_attention and layer.self_attention.relative_bias != "none" for layer in model.layers):
        return "would not see what a relative bias adds to the scores"
    return ""
