"""Context of a forward pass beside its activations: positions, masks, source and caches.

Training, evaluation and cached decoding each make a context and give it to the same stack. Before the layers run, the
stack asks every part for its inputs (`LayerPart.prepare`), which makes rotations, masks and buckets of distances once
for all layers that share them. A layer then computes from tensors alone: it compiles to one graph and can be sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.flex import FlexAttention
from lit_llm.components.kv_cache import CacheLengths, KeyValues, StackCache
from lit_llm.components.masks import AttentionMask
from lit_llm.components.rope import Frequencies, Rotation, rotation_at

T = TypeVar("T")


class SourceInput(NamedTuple):
    """The source that the tokens of a row may attend to."""

    mask: AttentionMask
    """Visible source tokens of each query."""
    tokens: int
    """Number of source tokens in the longest row."""
    states_BSD: Tensor | None = None
    """The encoder's output. None where it is in the cache, or where the source is the beginning of the row."""
    in_row: bool = False
    """Whether the row's first `tokens` are the source, and are part of this pass."""


class CacheRows(NamedTuple):
    """Numbers of tokens in the caches of all layers: of each row (`self_lengths`) and of its source."""

    self_lengths: CacheLengths
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
            x_BTD: Input of the first layer.
            mask: Mask of self-attention within the row.
            positions: T, or B x T, by name: `self` for self-attention; for attention to a source `source` and, for its
                queries, `restart` or `continuous`.
            source: The source beside the row.
            cache: Caches that this pass reads and extends.
        """
        self.mask, self.positions, self.source = mask, positions, source
        self.cache = cache
        self.queries, self.device = x_BTD.shape[1], x_BTD.device
        self.dtype = compute_dtype(x_BTD)
        self.shared_kv: tuple[Tensor, Tensor] | None = None
        """Keys and values for the layers that share them."""
        self.flex: FlexAttention | None = None
        """FlexAttention, where attention in this pass is computed by it."""
        self.fla = False
        """True where flash-linear-attention computes the recurrences of this pass."""
        self.stack_modules: Mapping[str, nn.Module] = {}
        """Modules that a stack has once for all its layers."""
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, computed once in this pass for each key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def rotation(self, positions: str, frequencies: Frequencies) -> Rotation:
        """RoPE rotation of the named positions."""
        return self.once(
            ("rotation", positions, frequencies),
            lambda: rotation_at(self.positions[positions], frequencies, self.dtype),
        )

    def document_runs(self, padding: bool) -> Tensor | None:
        """Number of changes of document up to each token, B x T; None for one document.

        padding: whether padding counts as a document, too.
        """
        return self.once(("document runs", padding), lambda: self._document_runs(padding))

    def _document_runs(self, padding: bool) -> Tensor | None:
        documents, lengths_B = self.mask.documents, self.mask.key_lengths if padding else None
        runs_BT = None
        if documents is not None:
            documents_BT = documents[0].to(self.device)
            changes_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
            runs_BT = F.pad(changes_BT.cumsum(1), (1, 0))
        if lengths_B is not None:
            padding_BT = torch.arange(self.queries, device=self.device) >= lengths_B.to(self.device)[:, None]
            runs_BT = padding_BT.long() if runs_BT is None else runs_BT + padding_BT * self.queries
        return runs_BT


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of queries and keys, which under autocast differs from the embedding's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """An input of several matrices in the dtype in which all of them compute."""
    return x.to(compute_dtype(x))


def is_filled(cache: KeyValues | None) -> bool:
    """True where a cache holds keys and values of an earlier pass."""
    return cache is not None and cache.filled
