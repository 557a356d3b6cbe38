"""Attention in training by torch's FlexAttention (arXiv 2412.05496), which skips what a mask hides.

Queries and keys are cut into blocks. The kernel computes blocks of which all pairs are visible without a mask, reads
the mask in blocks of which some are, and skips the others:

window of 2 blocks  ◪ · · ·     two documents  ◪ · · ·     ▣ all pairs are visible
                    ▣ ◪ · ·                    ◪ ◪ · ·     ◪ some are: the mask is read
                    ◪ ▣ ◪ ·                    · ◪ ◪ ·     · none is: skipped
                    · ◪ ▣ ◪                    · ◪ ▣ ◪

Every mask is read from the same boolean tensor that the other kernels read, so one graph serves all kinds of masks.
Graphs have one size each: graphs of any size were reported to return NaN for masks that differ between rows (pytorch
issue 186775, not established here). Rows are filled up to whole blocks, and to few sizes where lengths vary; blocks of
the filling are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.masks import Mask
from lit_llm.components.windows import BLOCK


class FlexAttention:
    """torch's function, compiled, and the sizes of its graphs."""

    def __init__(self, attend: Callable[..., Tensor], lengths_vary: bool) -> None:
        """attend: `torch.nn.attention.flex_attention.flex_attention`, compiled for inputs of one size each.

        lengths_vary: whether batches differ in their numbers of rows and tokens.
        """
        self.attend, self.lengths_vary = attend, lengths_vary

    def size(self, count: int, unit: int = 1) -> int:
        """Number of rows or tokens to which `count` are filled up: a multiple of `unit`, or a power of two times it."""
        units = -(-count // unit)
        return unit * (1 << (units - 1).bit_length() if self.lengths_vary else units)


class ScoreChange(NamedTuple):
    """Changes of the scores before the mask: first the cap, then the bias."""

    softcap: float | None = None
    alibi: tuple[Tensor, Tensor] | None = None
    """(H slopes, positions T or B x T of queries and keys)."""


class FlexMask:
    """A mask's blocks for FlexAttention, made once before the layers that share them.

    Not a dataclass, so that tools that traverse a layer's arguments do not traverse it.
    """

    def __init__(
        self,
        mask: Mask,
        size: tuple[int, int],
        like: tuple[torch.dtype, torch.device],
        flex: FlexAttention,
        change: ScoreChange,
    ) -> None:
        """Find the blocks of a mask.

        Args:
            mask: Which keys a query may attend to.
            size: Numbers of queries and of keys.
            like: Dtype of the products, and their device.
            flex: The function that computes the attention.
            change: Changes of the scores.
        """
        from torch.nn.attention.flex_attention import create_block_mask  # imported here, since it takes seconds

        (queries, keys), (self.dtype, device) = size, like
        self.mask, self.flex = mask, flex
        self.size = flex.size(queries, BLOCK), flex.size(keys, BLOCK)
        visible = mask.rows(0, queries, keys, device)
        if visible is None:
            visible = torch.ones((), dtype=torch.bool, device=device).expand(queries, keys)
        of_rows = visible.dim() == 4
        rows = flex.size(visible.shape[0]) if of_rows else None
        seen = visible.expand(-1, -1, queries, -1)[:, 0] if of_rows else visible
        seen = _filled(seen, self.size if rows is None else (rows, *self.size))

        def sees_in_row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen[b, q, k]

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen[q, k]

        self.blocks = create_block_mask(sees_in_row if of_rows else sees, rows, None, *self.size, device=device)
        self.change = _score_function(change, flex, max(self.size))

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None, shares_heads: bool) -> Tensor:
        """softmax(scores)V over the visible keys, B x H x T x K; zero for a query that sees none.

        shares_heads: whether several heads of queries share a head of keys.
        """
        rows, _, queries, _ = qkv[0].shape
        (q_size, k_size), batch = self.size, self.flex.size(rows)
        q, k, v = (
            _filled(x.to(self.dtype), (batch, x.shape[1], tokens, x.shape[3]))
            for x, tokens in zip(qkv, (q_size, k_size, k_size), strict=True)
        )
        out = self.flex.attend(
            q, k, v, score_mod=self.change, block_mask=self.blocks, scale=scale, enable_gqa=shares_heads
        )
        return out[:rows, :, :queries]


def _score_function(change: ScoreChange, flex: FlexAttention, tokens: int) -> Callable[..., Tensor] | None:
    """The function of a score, its row, head, query and key; None where scores do not change."""
    softcap, alibi = change
    if softcap is None and alibi is None:
        return None

    def capped(score: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    if alibi is None:
        return lambda score, b, h, q, k: capped(score)
    slopes_H, positions = alibi
    if positions.dim() == 1:
        at = _filled(positions, (tokens,))
        return lambda score, b, h, q, k: capped(score) - (at[k] - at[q]).abs() * slopes_H[h]
    of_row = _filled(positions, (flex.size(positions.shape[0]), tokens))
    return lambda score, b, h, q, k: capped(score) - (of_row[b, k] - of_row[b, q]).abs() * slopes_H[h]


def _filled(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor with zeros, or False, behind its content up to this shape; itself where nothing is missing."""
    if x.shape == shape:
        return x
    missing: list[Any] = []
    for held, wanted in zip(reversed(x.shape), reversed(shape), strict=True):
        missing += [0, wanted - held]
    return F.pad(x, missing)
