"""Attention for the CPU: scores of a block of queries at a time, with only the keys that the block may see.

Torch's fused kernel for the CPU is slow in the backward pass of short rows in bfloat16, and in float32 computes much of
what a causal mask hides. Here each block is a few matrix products, for which a CPU may have units of its own:

queries 0..C   ▣ · · ·
        C..2C  ▣ ▣ · ·    · is not computed; the triangle inside of a block on the diagonal is masked
       2C..3C  ▣ ▣ ▣ ·
       3C..4C  ▣ ▣ ▣ ▣

The backward pass computes the weights again, so that nothing of the size T x S is kept. `torch`'s kernel is the
reference that the tests compare it with.

Both passes are operators of torch, so that a graph of a compiled block calls them and does not hold their products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llm.components.forward_context import compute_dtype
from lit_llm.components.masks import KernelMask
from lit_llm.config.machine import cpu_flags

QUERIES = {torch.bfloat16: 256, torch.float32: 64}
"""Queries of a block, by dtype."""
LONGEST = 512
"""Queries or keys of a row in bfloat16 beyond which torch's kernel is as fast."""
CAUSAL_ROWS = range(384, 641)
"""Lengths of causal rows in float32 for which blocks are faster."""
FEWEST_HEADS = 8
"""Heads of all rows of a batch, in float32, below which torch's kernel is faster."""
NARROWEST = 32
"""Width of a head, in float32, below which torch's kernel is faster."""
BFLOAT16_UNITS = frozenset({"amx_bf16", "avx512_bf16"})
"""Instruction sets that multiply in bfloat16."""
BLOCK_SCORES = 1 << 20
"""Scores of a block, at most, so that they stay in the cache; one row of the batch has more where it must."""


@torch.compiler.assume_constant_result  # a compiled block cannot trace how they are read
def multiplies_bfloat16() -> bool:
    """True on a CPU that multiplies in bfloat16 (AMX, AVX-512 BF16); without that torch's kernel is faster."""
    return bool(cpu_flags() & BFLOAT16_UNITS)


@torch.compiler.assume_constant_result
def has_avx512() -> bool:
    """True on a CPU with AVX-512; float32 was not measured without."""
    return "avx512f" in cpu_flags()


def suits_blocks(q_BHTK: Tensor, k_BHSK: Tensor, mask: KernelMask) -> bool:
    """True where blocks are faster than torch's kernel, on a CPU in training.

    In bfloat16 these are short rows, in float32 causal ones of middle length with at most a short prefix.
    """
    if not q_BHTK.requires_grad or q_BHTK.device.type != "cpu" or mask.kernel not in ("causal", "masked"):
        return False
    rows, heads, queries, width = q_BHTK.shape
    dtype = compute_dtype(q_BHTK)
    if dtype == torch.bfloat16:
        return queries <= LONGEST and k_BHSK.shape[2] <= LONGEST and multiplies_bfloat16()
    if dtype != torch.float32 or mask.kernel != "causal" or rows * heads < FEWEST_HEADS or width < NARROWEST:
        return False
    middle = CAUSAL_ROWS.start <= queries < CAUSAL_ROWS.stop  # `in` would not be traced for any length
    return middle and 4 * mask.prefix <= queries and has_avx512()


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
    scaled = q_BHTK.to(dtype) * (q_BHTK.shape[-1] ** -0.5 if scale is None else scale)
    causal = mask.kernel == "causal"
    tensor = None if causal else mask.visible if mask.added is None else mask.added
    out: Tensor = _forward(scaled, k_BHSK.to(dtype), v_BHSK.to(dtype), mask.prefix if causal else None, tensor)
    return out


@torch.library.custom_op("lit_llm::block_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, prefix: int | None, mask: Tensor | None) -> Tensor:
    """softmax(QKᵀ)V of scaled queries.

    prefix: with a causal mask, the number of keys that all queries see; None without. mask: boolean, or added to the
    scores; None where all keys are visible, or with a causal mask.
    """
    out = _token_major(q)
    for block in _blocks((q, k, v), prefix, mask):
        out[block.where] = block.split_heads(block.weights() @ block.values)
    return out


@torch.library.custom_op("lit_llm::block_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, qkv: Sequence[Tensor], prefix: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    exact = torch.promote_types(q.dtype, torch.float32)
    d_q = _token_major(q)
    d_k, d_v = (torch.zeros(x.shape, dtype=exact) for x in (k, v))
    for block in _blocks((q, k, v), prefix, mask):
        weights, d_block = block.weights(), block.join_heads(d_out[block.where])
        d_weights = d_block @ block.values.transpose(-1, -2)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_q[block.where] = block.split_heads(d_scores @ block.keys)
        block.of_keys(d_k).add_(d_scores.transpose(-1, -2) @ block.queries)
        block.of_keys(d_v).add_(weights.transpose(-1, -2) @ d_block)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _token_major(q)


@_backward.register_fake
def _(_: Tensor, qkv: Sequence[Tensor], *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    return _token_major(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.prefix, mask = inputs
    ctx.save_for_backward(q, k, v, mask)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    *qkv, mask = ctx.saved_tensors
    return *_backward(d_out, qkv, ctx.prefix, mask), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _token_major(like: Tensor) -> Tensor:
    """An empty B x H x T x K that is contiguous as B x T x H x K, which the projections read and write."""
    rows, heads, tokens, width = like.shape
    return like.new_empty(rows, tokens, heads, width).transpose(1, 2)


def _blocks(qkv: tuple[Tensor, Tensor, Tensor], prefix: int | None, mask: Tensor | None) -> Iterator[_Block]:
    # Contiguous, since the products of each block would copy them otherwise.
    q, k, v = (x.contiguous() for x in qkv)
    count, heads, tokens, _ = q.shape
    size = min(QUERIES.get(q.dtype, 64), tokens)
    rows = min(count, max(1, BLOCK_SCORES // (heads * size * k.shape[2])))
    for row in range(0, count, rows):
        for first in range(0, tokens, size):
            where = slice(row, row + rows), slice(first, min(first + size, tokens))
            yield _Block((q, k, v), prefix, mask, where)


class _Block:
    """A block of queries with the keys that it may see; heads that share their keys are one long head.

    G = H/J heads of C queries that share a key head: B x H x C x K -> B x J x GC x K, beside keys B x J x S x K.
    """

    def __init__(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        prefix: int | None,
        mask: Tensor | None,
        where: tuple[slice, slice],
    ) -> None:
        q, k, v = qkv
        self.rows, self.part = where
        self.prefix, self.mask = prefix, mask
        self.where = (self.rows, slice(None), self.part)
        """Index of the block's queries in B x H x T x K."""
        self.groups, self.size = q.shape[1] // k.shape[1], self.part.stop - self.part.start
        self.seen = k.shape[2] if prefix is None else max(self.part.stop, prefix)
        """Number of keys, from the first, that a query of the block may see."""
        self.queries, self.keys, self.values = self.join_heads(q[self.where]), self.of_keys(k), self.of_keys(v)

    def of_keys(self, x_BHSK: Tensor) -> Tensor:
        return x_BHSK[self.rows, :, : self.seen]

    def join_heads(self, x_BHCK: Tensor) -> Tensor:
        return x_BHCK.unflatten(1, (-1, self.groups)).flatten(2, 3)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.groups, self.size)).flatten(1, 2)

    def weights(self) -> Tensor:
        """Attention weights, in the queries' dtype; the kernel sums in float32 at least."""
        scores = self.queries @ self.keys.transpose(-1, -2)
        self._hide(scores.unflatten(2, (self.groups, self.size)))
        return scores.softmax(dim=-1)

    def _hide(self, scores_BJGCS: Tensor) -> None:
        first, last = self.part.start, self.part.stop
        if self.prefix is not None:
            start = max(first, self.prefix)  # keys before it are seen by all queries of the block
            if start < last:
                # Added rather than filled in by a boolean mask, which takes twice the time.
                later = scores_BJGCS.new_full((last - first, last - start), -torch.inf).triu_(first - start + 1)
                scores_BJGCS[..., start:last] += later
        elif self.mask is not None and self.mask.dtype == torch.bool:
            scores_BJGCS.masked_fill_(~self._of_block(self.mask), -torch.inf)
        elif self.mask is not None:
            scores_BJGCS += self._of_block(self.mask)

    def _of_block(self, mask: Tensor) -> Tensor:
        """The block's part of a mask T x S, or B x 1 x T x S: broadcastable to B x J x G x C x S."""
        if mask.dim() == 2:
            return mask[self.part] if mask.shape[0] > 1 else mask
        of_rows = mask[self.rows] if mask.shape[0] > 1 else mask
        return (of_rows[:, :, self.part] if mask.shape[2] > 1 else of_rows).unsqueeze(2)
