"""Cache of a recurrent mixer: a state of fixed size, in place of an attention's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_llm.components.convolution.cache import ConvolutionStates
from lit_llm.components.kv_cache import CacheLengths


class RecurrentState:
    """State of one recurrent mixer: ... x K x V for each row after its last token."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.state_BHKV: Tensor | None = None
        """None until the prompt has been read. Mixers with groups of heads have one more dimension."""
        self.convolution = ConvolutionStates(rows)
        """Inputs of the short convolution; empty without one."""

    def cached(self) -> Tensor:
        """The state; the prompt must have been read."""
        assert self.state_BHKV is not None
        return self.state_BHKV

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.state_BHKV = self.cached()[rows]
        self.convolution.keep(rows)

    def replace(self, rows: Sequence[int], other: RecurrentState) -> None:
        """Put all rows of another batch's state in the place of these."""
        self.cached()[rows] = other.cached()
        self.convolution.replace(rows, other.convolution)

    def bytes(self) -> list[int]:
        """Bytes of each row's state, measured on the tensors."""
        return [row.nbytes + inputs for row, inputs in zip(self.cached(), self.convolution.bytes(), strict=True)]
