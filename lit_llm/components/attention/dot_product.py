"""softmax(QKᵀ/√K)V over the visible keys, by fused kernels where they support the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_llm.components.attention.query_blocks import block_attention, suits_blocks
from lit_llm.components.attention.resolved import SCORES
from lit_llm.components.few_rows import functions_for
from lit_llm.components.flex import FlexMask
from lit_llm.components.masks import AttentionMask, KernelMask
from lit_llm.components.windows import band_size


class DotProduct(nn.Module):
    """softmax(scores)V over the visible keys. A separate module, so that a probe can hook its inputs.

    scale: factor of QKᵀ, 1/√K when absent. softcap: bound of the scores, before a bias is added.
    """

    def __init__(self, scale: float | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.scale, self.softcap = scale, softcap
        self.reference = False
        """Whether torch's kernels compute all of it; otherwise `query_blocks` does where it is faster."""
        self.dropout = 0.0
        """Share of the weights that are set to zero in training, where torch's kernels then compute all of it."""

    def forward(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: KernelMask | FlexMask, bias: Tensor | None = None
    ) -> Tensor:
        """B x H x T x K. bias: H x T x S or B x H x T x S, added to the scores; the mask has one that layers share."""
        if k_BHSK.shape[2] == 0:  # a double decoder's first block, before any source
            return torch.zeros_like(q_BHTK)
        if isinstance(mask, FlexMask):
            return mask.attend((q_BHTK, k_BHSK, v_BHSK), self.scale, shares_heads(q_BHTK, k_BHSK))
        of_layer, bias = bias, mask.bias if bias is None else bias
        by_torch = self.reference or bias is not None or self._share_dropped > 0
        if not by_torch and (out := self._one_query(q_BHTK, k_BHSK, v_BHSK, mask)) is not None:
            return out
        if not by_torch and suits_blocks(q_BHTK, k_BHSK, mask):
            out = block_attention(q_BHTK, k_BHSK, v_BHSK, mask, self.scale)
        elif mask.kernel == "causal":
            out = self._causal(q_BHTK, k_BHSK, v_BHSK, mask)
        elif mask.kernel == "band":
            out = self._band(q_BHTK, k_BHSK, v_BHSK, mask)
        elif mask.kernel == "scores":
            out = self._explicit(q_BHTK, k_BHSK, v_BHSK, mask, bias)
        else:
            added = mask.visible if mask.added is None else mask.added
            if of_layer is not None:
                added = mask.with_bias(of_layer.to(q_BHTK.dtype))
            if bias is not None:
                assert added is not None
                added = added.expand(q_BHTK.shape[0], -1, -1, -1)
            out = self._fused(q_BHTK, k_BHSK, v_BHSK, added)
        return out if mask.fully_masked is None else out.masked_fill(mask.fully_masked, 0.0)

    @property
    def _share_dropped(self) -> float:
        return self.dropout if self.training else 0.0

    def _one_query(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: KernelMask) -> Tensor | None:
        """Attention of one query of each row by the compiled function; None where it does not suit."""
        rows, heads, queries, size = q_BHTK.shape
        seen = mask.mask
        by_length = isinstance(seen, AttentionMask) and seen.by_length
        if queries > 1 or not (by_length or (mask.kernel == "masked" and mask.visible is None and mask.added is None)):
            return None
        lengths_B = seen.key_lengths if isinstance(seen, AttentionMask) else None
        strides = k_BHSK.stride()
        if self.softcap is not None or strides != v_BHSK.stride() or strides[2:] != (size, 1):
            return None
        if k_BHSK.shape != v_BHSK.shape or k_BHSK.shape[0] != rows or k_BHSK.shape[3] != size:
            return None
        if not q_BHTK.dtype == k_BHSK.dtype == v_BHSK.dtype or (functions := functions_for(q_BHTK)) is None:
            return None
        if lengths_B is not None:
            lengths_B = lengths_B.to(torch.int64).contiguous()
        q_BHTK = q_BHTK.contiguous()
        out = torch.empty_like(q_BHTK)
        functions.attention(
            *(q_BHTK.data_ptr(), k_BHSK.data_ptr(), v_BHSK.data_ptr(), out.data_ptr()),
            None if lengths_B is None else lengths_B.data_ptr(),
            *(k_BHSK.shape[2], rows, heads, k_BHSK.shape[1], size, *strides[:2]),
            *(size**-0.5 if self.scale is None else self.scale, torch.get_num_threads()),
        )
        return out

    def _causal(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: KernelMask) -> Tensor:
        """Causal attention, with or without a prefix of one length for all rows, without a mask of T x T."""
        gqa, prefix, dropped = shares_heads(q_BHTK, k_BHSK), mask.prefix, self._share_dropped

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropped, is_causal=causal, scale=self.scale, enable_gqa=gqa
            )

        # A prefix of one token changes nothing.
        if prefix <= 1:
            return attend(q_BHTK, k_BHSK, v_BHSK, causal=True)
        # The prefix is one dense block without a mask, which is cheaper than masking T x T.
        out = attend(q_BHTK[:, :, :prefix], k_BHSK[:, :, :prefix], v_BHSK[:, :, :prefix])
        if mask.visible is None:
            return out
        return torch.cat([out, self._fused(q_BHTK[:, :, prefix:], k_BHSK, v_BHSK, mask.visible)], dim=2)

    def _band(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: KernelMask) -> Tensor:
        """Attention within a window: blocks of queries with the blocks of keys that they can see, instead of T x T.

        queries  [ 0 ][ 1 ][ 2 ]      keys of 1, causal  [ 0 ][ 1 ]      without a mask  [ 0 ][ 1 ][ 2 ]
        """
        assert mask.window is not None
        assert mask.visible is not None
        rows, _, tokens, _ = q_BHTK.shape
        size, sides = band_size(mask.window, mask.causal), 2 if mask.causal else 3
        blocks = -(-tokens // size)
        rest = blocks * size - tokens

        def cut(x_BHTK: Tensor, around: int) -> Tensor:
            """B N x H x (around x size) x K: the tokens of each block, with the neighbouring blocks if around > 1."""
            x_BHTK = F.pad(x_BHTK, (0, 0, size if around > 1 else 0, rest + (size if around > 2 else 0)))
            windows = x_BHTK.unfold(2, around * size, size)  # B x H x N x K x around size
            return windows.permute(0, 2, 1, 4, 3).flatten(0, 1)

        visible = mask.visible.expand(rows, *mask.visible.shape).flatten(0, 1)
        out = self._fused(cut(q_BHTK, 1), cut(k_BHTK, sides), cut(v_BHTK, sides), visible)
        return out.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]

    def _explicit(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: KernelMask, bias: Tensor | None
    ) -> Tensor:
        """Attention that materialises the scores."""
        scores = self.scores(q_BHTK, k_BHSK)
        if bias is not None:
            scores = scores + bias
        if mask.visible is not None:
            scores = scores.masked_fill(~mask.visible, -torch.inf)
        weights = scores.softmax(dim=-1).to(v_BHSK.dtype)
        if self._share_dropped:
            weights = F.dropout(weights, self._share_dropped)
        return weights @ for_queries(v_BHSK, q_BHTK)

    def scores(self, q_BHTK: Tensor, k_BHSK: Tensor) -> Tensor:
        """Scores before masks and biases: B x H x T x S, in float32 at least."""
        dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
        device = q_BHTK.device.type
        # Under autocast the product would be in its low precision.
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            scores = q_BHTK.to(dtype) @ for_queries(k_BHSK, q_BHTK).to(dtype).transpose(-1, -2)
            scores = scores * (q_BHTK.shape[-1] ** -0.5 if self.scale is None else self.scale)
            return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def _fused(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None) -> Tensor:
        """Attention by torch's fused kernels. mask: None where all keys are visible."""
        gqa, attend = shares_heads(q_BHTK, k_BHSK), F.scaled_dot_product_attention
        settings: dict[str, Any] = {"attn_mask": mask, "dropout_p": self._share_dropped, "scale": self.scale}
        if mask is None or q_BHTK.device.type != "cuda":
            return attend(q_BHTK, k_BHSK, v_BHSK, enable_gqa=gqa, **settings)
        # Not cuDNN, which torch prefers on Hopper: its backward pass with a mask is suspected of wrong gradients
        # (reported in pytorch issue 196678, not established here). The other kernel does not support grouped heads.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return attend(q_BHTK, for_queries(k_BHSK, q_BHTK), for_queries(v_BHSK, q_BHTK), **settings)


def shares_heads(q_BHTK: Tensor, k_BHSK: Tensor) -> bool:
    """True where several query heads share a head of keys."""
    # A branch decides it: in a compiled block the comparison may be symbolic, which torch's kernels do not take.
    if q_BHTK.shape[1] == k_BHSK.shape[1]:  # noqa: SIM103
        return False
    return True


def for_queries(k_BHSK: Tensor, q_BHTK: Tensor) -> Tensor:
    """Keys or values with their heads repeated to the number of query heads."""
    groups = q_BHTK.shape[1] // k_BHSK.shape[1]
    return k_BHSK if groups == 1 else k_BHSK.repeat_interleave(groups, dim=1)


def largest_logit(
    attention: DotProduct, q_BHTK: Tensor, k_BHSK: Tensor, mask: KernelMask, bias: Tensor | None = None
) -> Tensor:
    """The largest |score| over the visible pairs.

    Fused kernels do not return it, so the scores are computed again, for some queries at a time.
    """
    largest = q_BHTK.new_zeros((), dtype=torch.promote_types(q_BHTK.dtype, torch.float32))
    for _, scores_BHCS, visible in score_rows(attention, ScoreInputs(q_BHTK, k_BHSK, mask, bias)):
        largest = torch.maximum(largest, scores_BHCS.abs_().masked_fill_(~visible, 0.0).max())
    return largest


class ScoreInputs(NamedTuple):
    """Queries, keys, mask and bias of which the scores of an attention are computed."""

    q_BHTK: Tensor
    k_BHSK: Tensor
    mask: KernelMask
    bias: Tensor | None = None
    """The layer's own bias; the mask has one that layers share."""


def score_rows(attention: DotProduct, inputs: ScoreInputs, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Scores of the queries from `start` on, in chunks of about SCORES scores.

    Yields (c, scores of queries c to c + C with their bias: B x H x C x S, visible keys: 1 or B x 1 x C x S).
    """
    q_BHTK, k_BHSK, mask, bias = inputs
    bias = mask.bias if bias is None else bias
    rows, heads, queries, _ = q_BHTK.shape
    keys, device = k_BHSK.shape[2], q_BHTK.device
    # Repeated and cast once for all chunks, which `scores` then does not do again.
    k_BHSK = for_queries(k_BHSK, q_BHTK).to(torch.promote_types(q_BHTK.dtype, torch.float32))
    size = max(1, SCORES // (rows * heads * keys))
    for first in range(start, queries, size):
        last = min(first + size, queries)
        visible = mask.mask.rows(first, last, keys, device)
        if visible is None:
            visible = torch.ones((), dtype=torch.bool, device=device)
        scores_BHCS = attention.scores(q_BHTK[:, :, first:last], k_BHSK)
        if bias is not None:
            scores_BHCS = scores_BHCS + bias[..., first:last, :]
        yield (
            first,
            scores_BHCS,
            visible.expand(*visible.shape[:-2] if visible.dim() == 4 else (1, 1), last - first, keys),
        )
