"""One layer of a resolved model."""

from __future__ import annotations

from typing import Any

from pydantic import InstanceOf, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.part import Part
from lit_llm.config.section import Items, Section


class Layer(Section):
    """One layer with all settings resolved: its parts by name, in the order in which they act."""

    parts: Items[tuple[str, SerializeAsAny[InstanceOf[Part]]]]

    def part(self, name: str) -> Part | None:
        """The part of that name; None where the layer has none."""
        return next((part for key, part in self.parts if key == name), None)

    @property
    def self_attention(self) -> ResolvedAttention | None:
        """The layer's self-attention; None where another sequence mixer replaces it."""
        part = self.part("self_attention")
        return part if isinstance(part, ResolvedAttention) else None

    @property
    def cross_attention(self) -> ResolvedAttention | None:
        """The layer's cross-attention; None where the layer reads no source, or reads it in its self-attention."""
        part = self.part("cross_attention")
        return part if isinstance(part, ResolvedAttention) else None

    @property
    def feed_forward(self) -> FeedForwardConfig | None:
        """The layer's feed-forward network; None where another component replaces it."""
        part = self.part("feed_forward")
        return part if isinstance(part, FeedForwardConfig) else None

    @property
    def for_last_token(self) -> bool:
        """True where the layer processes only the last token of a prompt."""
        return any(part.for_last_token for _, part in self.parts)

    @model_serializer(mode="wrap")
    def _by_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return dict(handler(self)["parts"])
