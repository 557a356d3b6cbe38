"""What a layer keeps between passes, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lit_llm.components.attention.kv_cache import KeyValues
from lit_llm.components.retention.cache import RetentionState


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps."""

    self_attention: KeyValues | None = None
    """None where a retention stands in its place, or keys and values are kept once for several layers."""
    cross_attention: KeyValues | None = None
    partial_attention: KeyValues | None = None
    retention: RetentionState | None = None

    @property
    def parts(self) -> list[KeyValues | RetentionState]:
        """All of it that there is."""
        found = (self.self_attention, self.cross_attention, self.partial_attention, self.retention)
        return [part for part in found if part is not None]
