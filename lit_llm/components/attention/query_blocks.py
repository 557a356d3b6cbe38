"""Attention for the CPU: scores of a block of queries at a time, with only the keys that the block may see.

Torch's fused kernel for the CPU is slow in the backward pass of short rows in bfloat16. Here each block is a few matrix
products, for which a CPU may have units of its own:

queries 0..C   ▣ · · ·
        C..2C  ▣ ▣ · ·    · is not computed; the triangle inside of a block on the diagonal is masked
       2C..3C  ▣ ▣ ▣ ·
       3C..4C  ▣ ▣ ▣ ▣

The backward pass computes the weights again, so that nothing of the size T x S is kept. `torch`'s kernel is the
reference that the tests compare it with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.components.forward_context import compute_dtype
from lit_llm.components.masks import KernelMask
from lit_llm.config.machine import cpu_flags

QUERIES = 256
"""Queries of a block."""
LONGEST = 512
"""Queries or keys of a row beyond which torch's kernel is as fast."""
BFLOAT16_UNITS = frozenset({"amx_bf16", "avx512_bf16"})
"""Instruction sets that multiply in bfloat16."""
BLOCK_SCORES = 1 << 20
"""Scores of a block, at most, so that they stay in the cache; one row of the batch has more where it must."""


def multiplies_bfloat16() -> bool:
    """True on a CPU that multiplies in bfloat16 (AMX, AVX-512 BF16); without that torch's kernel is faster."""
    return bool(cpu_flags() & BFLOAT16_UNITS)


def suits_blocks(q_BHTK: Tensor, k_BHSK: Tensor, mask: KernelMask) -> bool:
    """True where blocks are faster than torch's: in training, in bfloat16, for short rows, on a CPU that multiplies it.

    False in a compiled block, whose graph would hold the products of every block of queries.
    """
    if torch.compiler.is_compiling():  # first: the capabilities of a CPU cannot be traced
        return False
    if not q_BHTK.requires_grad or q_BHTK.device.type != "cpu" or mask.kernel not in ("causal", "masked"):
        return False
    short = max(q_BHTK.shape[2], k_BHSK.shape[2]) <= LONGEST and compute_dtype(q_BHTK) == torch.bfloat16
    return short and multiplies_bfloat16()


def block_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: KernelMask, scale: float | None) -> Tensor:
    """softmax(scale QKᵀ)V over the keys that `mask` shows, B x H x T x K.

    Args:
        q_BHTK: Queries, B x H x T x K.
        k_BHSK: Keys, B x J x S x K, where J divides H.
        v_BHSK: Values, B x J x S x K.
        mask: One of kernel `causal` or `masked`.
        scale: Factor of the scores; 1/√K when absent.
    """
    dtype = compute_dtype(q_BHTK)
    factor = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _BlockAttention.apply(q_BHTK.to(dtype), k_BHSK.to(dtype), v_BHSK.to(dtype), mask, factor)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: KernelMask, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.scale = mask, scale
        q, k, v = _for_products(q, k, v, scale)
        out = _token_major(q)
        for block in _blocks(q, k, mask):
            out[block.where] = block.split_heads(block.weights() @ block.of_keys(v))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (d_out,) = gradients
        q, k, v = ctx.saved_tensors
        q, k, v = _for_products(q, k, v, ctx.scale)
        exact = torch.promote_types(q.dtype, torch.float32)
        d_q, d_k, d_v = _token_major(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        for block in _blocks(q, k, ctx.mask):
            weights, d_block = block.weights(), block.join_heads(d_out[block.where])
            d_weights = d_block @ block.of_keys(v).transpose(-1, -2)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[block.where] = block.split_heads(d_scores @ block.of_keys(k))
            block.of_keys(d_k).add_(d_scores.transpose(-1, -2) @ block.queries)
            block.of_keys(d_v).add_(weights.transpose(-1, -2) @ d_block)
        return d_q.mul_(ctx.scale), d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _for_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values, all contiguous: otherwise the products of each block would copy them."""
    return (q * scale).contiguous(), k.contiguous(), v.contiguous()


def _token_major(like: Tensor) -> Tensor:
    """An empty B x H x T x K that is contiguous as B x T x H x K, which the projections read and write."""
    rows, heads, tokens, width = like.shape
    return like.new_empty(rows, tokens, heads, width).transpose(1, 2)


def _blocks(q: Tensor, k: Tensor, mask: KernelMask) -> Iterator[_Block]:
    count, heads, tokens, _ = q.shape
    size = min(QUERIES, tokens)
    rows = min(count, max(1, BLOCK_SCORES // (heads * size * k.shape[2])))
    for row in range(0, count, rows):
        for first in range(0, tokens, size):
            yield _Block(q, k, mask, (slice(row, row + rows), slice(first, min(first + size, tokens))))


class _Block:
    """A block of queries with the keys that it may see; heads that share their keys are one long head.

    G = H/J heads of C queries that share a key head: B x H x C x K -> B x J x GC x K, beside keys B x J x S x K.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: KernelMask, part: tuple[slice, slice]) -> None:
        self.rows, self.part, self.mask = *part, mask
        self.where = (self.rows, slice(None), self.part)
        """Index of the block's queries in B x H x T x K."""
        self.groups, self.size = q.shape[1] // k.shape[1], self.part.stop - self.part.start
        self.keys = max(self.part.stop, mask.prefix) if mask.kernel == "causal" else k.shape[2]
        """Number of keys, from the first, that a query of the block may see."""
        self.queries, self.seen = self.join_heads(q[self.where]), self.of_keys(k)

    def of_keys(self, x_BHSK: Tensor) -> Tensor:
        return x_BHSK[self.rows, :, : self.keys]

    def join_heads(self, x_BHCK: Tensor) -> Tensor:
        return x_BHCK.unflatten(1, (-1, self.groups)).flatten(2, 3)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.groups, self.size)).flatten(1, 2)

    def weights(self) -> Tensor:
        """Attention weights, in the queries' dtype; the kernel sums in float32 at least."""
        scores = self.queries @ self.seen.transpose(-1, -2)
        self._hide(scores.unflatten(2, (self.groups, self.size)))
        return scores.softmax(dim=-1)

    def _hide(self, scores_BJGCS: Tensor) -> None:
        mask, first, last = self.mask, self.part.start, self.part.stop
        if mask.kernel == "causal":
            start = max(first, mask.prefix)  # keys before it are seen by all queries of the block
            if start < last:
                # Added rather than filled in by a boolean mask, which takes twice the time.
                later = scores_BJGCS.new_full((last - first, last - start), -torch.inf).triu_(first - start + 1)
                scores_BJGCS[..., start:last] += later
        elif mask.added is not None:
            scores_BJGCS += self._of_block(mask.added)
        elif mask.visible is not None:
            scores_BJGCS.masked_fill_(~self._of_block(mask.visible), -torch.inf)

    def _of_block(self, mask: Tensor) -> Tensor:
        """The block's part of a mask T x S, or B x 1 x T x S: broadcastable to B x J x G x C x S."""
        if mask.dim() == 2:
            return mask[self.part] if mask.shape[0] > 1 else mask
        of_rows = mask[self.rows] if mask.shape[0] > 1 else mask
        return (of_rows[:, :, self.part] if mask.shape[2] > 1 else of_rows).unsqueeze(2)
