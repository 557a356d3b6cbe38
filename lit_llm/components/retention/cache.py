"""Cache of a retention: a state of fixed size, in place of an attention's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_llm.components.kv_cache import CacheLengths


class RetentionState:
    """State of one retention: B x H x K x V, of each row after its last token."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.state_BHKV: Tensor | None = None
        """None until the prompt has been read."""

    def cached(self) -> Tensor:
        """The state; the prompt must have been read."""
        assert self.state_BHKV is not None
        return self.state_BHKV

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.state_BHKV = self.cached()[rows]

    def replace(self, rows: Sequence[int], other: RetentionState) -> None:
        """Put all rows of another batch's state in the place of these."""
        self.cached()[rows] = other.cached()

    def bytes(self) -> list[int]:
        """Bytes of each row's state, measured on the tensor."""
        return [row.nbytes for row in self.cached()]
