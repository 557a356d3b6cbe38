"""Cache of short convolutions: the last few inputs of each, of every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.kv_cache import Cache, CacheLengths


class ConvolutionStates:
    """States of the convolutions of one part of a layer, by name: B x (width - 1) x entries each."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.states: dict[str, Tensor] = {}
        """Empty until the prompt has been read."""

    def extended(self, name: str, x_BTD: Tensor, width: int) -> Tensor:
        """The inputs of a pass behind those that a convolution reads before them: B x (width - 1 + T) x entries."""
        before = width - 1
        if name in self.states:
            whole = torch.cat([self.states[name].to(x_BTD.dtype), x_BTD], dim=1)
        else:
            whole = F.pad(x_BTD, (0, 0, before, 0))
        # Rows of an encoder-decoder begin evenly, with <s>.
        if name in self.states or self.rows.even:
            self.states[name] = whole[:, whole.shape[1] - before :].clone()  # a view would keep all that was read
        else:
            # Prompts are padded at the end. A row's token t is at place t + before.
            places_BK = self.rows.lengths_B[:, None] + torch.arange(before, device=x_BTD.device)
            self.states[name] = whole.gather(1, places_BK[..., None].expand(-1, -1, x_BTD.shape[-1]))
        return whole

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.states = {name: state[rows] for name, state in self.states.items()}

    def replace(self, rows: Sequence[int], other: ConvolutionStates) -> None:
        """Put all rows of another batch's states in the place of these."""
        for name, state in self.states.items():
            state[rows] = other.states[name]

    def bytes(self) -> list[int]:
        """Bytes of each row's states, measured on the tensors."""
        return [sum(state[0].nbytes for state in self.states.values())] * len(self.rows.lengths)


class CacheWithStates:
    """The cache of a part of a layer, and the states of the convolutions inside of it."""

    def __init__(self, cache: Cache, states: ConvolutionStates) -> None:
        self.cache, self.states = cache, states

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.cache.keep(rows)
        self.states.keep(rows)

    def replace(self, rows: Sequence[int], other: CacheWithStates) -> None:
        """Put all rows of another batch's caches in the place of these."""
        self.cache.replace(rows, other.cache)
        self.states.replace(rows, other.states)

    def bytes(self) -> list[int]:
        """Bytes of each row, measured on the tensors."""
        return [sum(both) for both in zip(self.cache.bytes(), self.states.bytes(), strict=True)]
