"""The state that a retention keeps between passes: what keys and values are to an attention, but of one size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_llm.components.kv_cache import CacheLengths


class RetentionState:
    """The state of one retention: B x H x K x V, of each row after its own last token."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.state_BHKV: Tensor | None = None
        """None until the prompt has been read."""

    def cached(self) -> Tensor:
        """The state of a prompt that has been read."""
        assert self.state_BHKV is not None
        return self.state_BHKV

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.state_BHKV = self.cached()[rows]

    def bytes(self) -> list[int]:
        """What the state of each row takes, measured on the tensor."""
        return [row.nbytes for row in self.cached()]
