"""What a forward pass knows beside its activations: positions, masks, the source, and what is kept between passes.

Training, evaluation and cached decoding each make one and give it to the same stack. Before the layers run, the stack
asks every part for its inputs (`LayerPart.prepare`). Rotations, masks and buckets of distances are made there, once for
all layers that share them, so that a layer itself computes from tensors alone: it compiles to one graph, and devices
can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from lit_llm.components.kv_cache import CacheLengths, KeyValues, StackCache
from lit_llm.components.masks import AttentionMask
from lit_llm.components.rope import Rotation, rotation_at

T = TypeVar("T")


class SourceInput(NamedTuple):
    """What the tokens of a row may read beside the row."""

    mask: AttentionMask
    """Which of its tokens each query sees."""
    tokens: int
    """How many there are in the longest row."""
    states_BSD: Tensor | None = None
    """The encoder's output. None where it is in the cache, or where the source is the beginning of the row itself."""
    in_row: bool = False
    """Whether the row's first `tokens` are the source, and are part of this pass."""


class CacheRows(NamedTuple):
    """How many tokens the caches of all layers hold, of each row and of its source."""

    own: CacheLengths
    source: CacheLengths | None = None


class ForwardContext:
    """Positions, masks, source and caches of one forward pass."""

    def __init__(
        self,
        x_BTD: Tensor,
        mask: AttentionMask,
        positions: Mapping[str, Tensor],
        source: SourceInput | None = None,
        cache: StackCache | None = None,
    ) -> None:
        """Make the context of one pass.

        Args:
            x_BTD: What the first layer reads.
            mask: Which tokens of the row each of its tokens sees.
            positions: T, or B x T, by their names: `self` for a row's own distances; for attention to a source `source`
                and, for its queries, `restart` or `continuous`.
            source: What may be read beside the row.
            cache: What earlier passes have kept, and this one keeps.
        """
        self.mask, self.positions, self.source = mask, positions, source
        self.cache = cache
        self.queries, self.device = x_BTD.shape[1], x_BTD.device
        self.dtype = compute_dtype(x_BTD)
        self.shared_kv: tuple[Tensor, Tensor] | None = None
        """Keys and values for the layers that have none of their own."""
        self.stack_modules: Mapping[str, nn.Module] = {}
        """What a stack has once for all its layers."""
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once in this pass for all that ask by the same key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def rotation(self, positions: str, theta: float, head_dim: int, factor: float = 1.0) -> Rotation:
        """The rotation of the positions of that name, divided by `factor`."""
        return self.once(
            ("rotation", positions, theta, head_dim, factor),
            lambda: rotation_at(self.positions[positions], theta, head_dim, factor, self.dtype),
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that queries and keys will have: under autocast not the embedding's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else x.dtype


def is_filled(cache: KeyValues | None) -> bool:
    """Whether keys and values of an earlier pass are kept."""
    return cache is not None and cache.filled
