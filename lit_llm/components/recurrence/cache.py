"""Cache of a recurrent mixer: a state of fixed size, in place of an attention's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_llm.components.kv_cache import CacheLengths


class RecurrentState:
    """State of one recurrent mixer: ... x K x V for each row after its last token."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.state_BHKV: Tensor | None = None
        """None until the prompt has been read. Mixers with groups of heads have one more dimension."""
        self.inputs_BWC: Tensor | None = None
        """The last inputs of the short convolution, one fewer than it is wide; None without a convolution."""

    def cached(self) -> Tensor:
        """The state; the prompt must have been read."""
        assert self.state_BHKV is not None
        return self.state_BHKV

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.state_BHKV = self.cached()[rows]
        if self.inputs_BWC is not None:
            self.inputs_BWC = self.inputs_BWC[rows]

    def replace(self, rows: Sequence[int], other: RecurrentState) -> None:
        """Put all rows of another batch's state in the place of these."""
        self.cached()[rows] = other.cached()
        if self.inputs_BWC is not None:
            assert other.inputs_BWC is not None
            self.inputs_BWC[rows] = other.inputs_BWC

    def bytes(self) -> list[int]:
        """Bytes of each row's state, measured on the tensors."""
        inputs = 0 if self.inputs_BWC is None else self.inputs_BWC[0].nbytes
        return [row.nbytes + inputs for row in self.cached()]
