"""Cache of short convolutions: the last few inputs of each, of every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.convolution.resolved import KERNEL
from lit_llm.components.kv_cache import Cache, CacheLengths


class ConvolutionStates:
    """States of the convolutions of one part of a layer: B x (KERNEL - 1) x width each, by name."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.states: dict[str, Tensor] = {}
        """Empty until the prompt has been read."""

    def extended(self, name: str, x_BTD: Tensor) -> Tensor:
        """The inputs of a pass behind those that a convolution reads before them: B x (KERNEL - 1 + T) x width."""
        if name in self.states:
            whole = torch.cat([self.states[name], x_BTD], dim=1)
            self.states[name] = whole[:, 1:]
            return whole
        whole = F.pad(x_BTD, (0, 0, KERNEL - 1, 0))
        # Prompts are padded at the end. A row of an encoder-decoder begins with <s>, before it counts as read.
        ends_B1 = self.rows.lengths_B.clamp_min(1)[:, None]
        places_BK = ends_B1 + torch.arange(KERNEL - 1, device=x_BTD.device)
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
        rows = zip(*self.states.values(), strict=True)
        return [sum(state.nbytes for state in row) for row in rows]


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
