"""Masks of self- and cross-attention: which keys each query may attend to.

causal       ▣ · · ·     prefix of 2   ▣ ▣ · ·     full   ▣ ▣ ▣ ▣   rows: queries, columns: keys
             ▣ ▣ · ·                   ▣ ▣ · ·            ▣ ▣ ▣ ▣
             ▣ ▣ ▣ ·                   ▣ ▣ ▣ ·            ▣ ▣ ▣ ▣
             ▣ ▣ ▣ ▣                   ▣ ▣ ▣ ▣            ▣ ▣ ▣ ▣

Each mask may be restricted to documents (numbers: the document of a token):

causal     0 0 1 1       prefix    0 0 1 1        full   0 0 1 1        cross    0 1 1   source
         0 ▣ · · ·       of 3    0 ▣ ▣ · ·             0 ▣ ▣ · ·               1 · ▣ ▣
         0 ▣ ▣ · ·               0 ▣ ▣ · ·             0 ▣ ▣ · ·               1 · ▣ ▣
         1 · · ▣ ·               1 · · ▣ ·             1 · · ▣ ▣               2 · · ·   sees nothing: the output
         1 · · ▣ ▣               1 · · ▣ ▣             1 · · ▣ ▣          target         is zero

A window restricts each mask to near keys; `merged` attention sees the source's keys, then the target's:

causal       ▣ · · ·     prefix of 4   ▣ ▣ · ·     full   ▣ ▣ · ·     merged  ▣ ▣ | ▣ · · ·   all of the source, and
of 2         ▣ ▣ · ·     window of 2   ▣ ▣ ▣ ·            ▣ ▣ ▣ ·     of 2    ▣ ▣ | ▣ ▣ · ·   the target's window
             · ▣ ▣ ·                   · ▣ ▣ ▣            · ▣ ▣ ▣             ▣ ▣ | · ▣ ▣ ·
             · · ▣ ▣                   · · ▣ ▣            · · ▣ ▣             ▣ ▣ | · · ▣ ▣

Blocks of a double decoder (`models/double_decoder.py`), here of 2 tokens: the decoder sees its own block causally, and
the encoder's states of earlier blocks. The encoder is causal over the whole row:

own block  ▣ · · · ·     earlier   · · · ·   sees nothing: the output of a separate cross-attention is zero
           ▣ ▣ · · ·     blocks    · · · ·
           · · ▣ · ·               ▣ ▣ · ·
           · · ▣ ▣ ·               ▣ ▣ · ·
           · · · · ▣               ▣ ▣ ▣ ▣

From a study's key to the kernel: `masks` (`objectives/config.py`) -> `prefix_length`, `documents_BT` and `open_BT`
(`objectives/collate.py`) -> `AttentionMask` (`models/families.py`; while decoding `generation/decoding.py`,
`kv_cache.py`; also `models/decoder_decoder.py`, `double_decoder.py`) -> with the attention's window a
`KernelMask`, or in training by FlexAttention a `FlexMask` (`attention/module.py`).

A target token whose document has no source gets exactly zero from cross-attention, with or without a norm on its
output, and no gradient flows through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_llm.components.windows import BAND, Window, band_size


class Mask(Protocol):
    """Protocol of a mask: the keys that each query may attend to."""

    @property
    def may_see_nothing(self) -> bool:
        """True where a query may see no key."""

    @property
    def plain(self) -> bool:
        """True for a triangle or no mask at all, which fused kernels compute without a tensor."""

    def rows(self, first: int, last: int, keys: int, device: torch.device) -> Tensor | None:
        """Visible keys of the queries `first` to `last` (exclusive).

        Returns:
            Boolean, C x S, or B x 1 x C x S where rows differ; None when all keys are visible.
        """

    def kernel(self, bias: bool, queries: int, keys: int) -> Kernel:
        """Kernel for the attention of `queries` queries to `keys` keys."""


Kernel = Literal["causal", "band", "masked"]
"""causal: a triangle with at most one dense block; band: blocks of queries with the keys near them; masked: T x S.

A `KernelMask` may also have `scores`: the scores are computed as a tensor, for a soft cap.
"""


@dataclass(frozen=True)
class AttentionMask:
    """The keys that each query may attend to, among the tokens of a row or of its source."""

    causal: bool = False
    """Query t sees keys 0..t."""
    prefix: int | Tensor | None = None
    """With `causal`: the first `prefix` tokens (one number, or one for each of the B rows) also see each other; or
    boolean, B x S: these keys are seen by all queries of their document."""
    key_lengths: Tensor | None = None
    """B: keys at and beyond a row's length are padding. At least 1, since a query must see a key."""
    before: int = 0
    """With `causal`: keys of the row that come before the first query's own."""
    documents: tuple[Tensor, Tensor] | None = None
    """Document numbers, B x T of the queries and B x S of the keys: a query sees only keys of the same document, which
    may be none."""
    blocks: tuple[Tensor, Tensor] | None = None
    """Block numbers, B x T of the queries and B x S of the keys (1 x T and 1 x S where rows are alike): a query sees
    only keys of earlier blocks, which may be none."""
    window: Window | None = None
    """Visible keys are fewer than (n, m) tokens (before, after) the query; None: all."""

    @property
    def may_see_nothing(self) -> bool:
        """True where a query may see no key."""
        return self.documents is not None or self.blocks is not None

    @property
    def by_length(self) -> bool:
        """True where every query sees the first keys of its row, as many as `key_lengths`, and nothing else decides."""
        return not self.causal and self.prefix is None and not self.may_see_nothing and self.window is None

    @property
    def plain(self) -> bool:
        """True for a triangle or no mask at all, as `Mask.plain`."""
        if self.key_lengths is not None or self.may_see_nothing or self.window is not None or self.before:
            return False
        # A prefix of one token changes nothing.
        return not self.causal or (not isinstance(self.prefix, Tensor) and (self.prefix or 0) <= 1)

    def rows(self, first: int, last: int, keys: int, device: torch.device) -> Tensor | None:
        """Keys that the queries see, as `Mask.rows` returns them."""
        key = torch.arange(keys, device=device)
        visible: Tensor | None = None
        if self.causal:
            visible = key[None, :] <= torch.arange(self.before + first, self.before + last, device=device)[:, None]
            if isinstance(self.prefix, Tensor):
                prefix = self.prefix.to(device)
                opened = prefix[:, None, None] if prefix.dtype == torch.bool else key < prefix.view(-1, 1, 1, 1)
                visible = visible | opened
            elif self.prefix:
                visible = visible | (key < self.prefix)[None, :]
        if self.window is not None:
            ago = torch.arange(first, last, device=device)[:, None] - key
            near = (ago < self.window[0]) & (-ago < self.window[1])
            visible = near if visible is None else visible & near
        if self.key_lengths is not None:
            real = key < self.key_lengths.to(device).view(-1, 1, 1, 1)
            visible = real if visible is None else visible & real
        if self.documents is not None:
            of_query, of_key = (documents.to(device) for documents in self.documents)
            same = (of_query[:, first:last, None] == of_key[:, None, :]).unsqueeze(1)
            visible = same if visible is None else visible & same
        if self.blocks is not None:
            of_query, of_key = (numbers.to(device) for numbers in self.blocks)
            earlier = (of_key[:, None, :] < of_query[:, first:last, None]).unsqueeze(1)
            visible = earlier if visible is None else visible & earlier
        if self.window is not None and self.key_lengths is not None and visible is not None:
            # Padding far from every real key sees all keys, since without keys its states would be NaN.
            visible = visible | ~visible.any(dim=-1, keepdim=True)
        return visible

    def kernel(self, bias: bool, queries: int, keys: int) -> Kernel:
        """The kernel for this mask, as `Mask.kernel` returns it."""
        if bias or self.may_see_nothing or self.key_lengths is not None or self.before:
            return "masked"
        if self.window is None:
            return "causal" if self.causal and not isinstance(self.prefix, Tensor) else "masked"
        narrow = queries == keys and self.prefix is None and queries >= BAND * band_size(self.window, self.causal)
        return "band" if narrow else "masked"

    def band(self, tokens: int, device: torch.device) -> Tensor:
        """Visible keys of each block of queries among the blocks around it, for a causal or full mask with a window.

        Returns:
            Boolean, N x 1 x Q x S: keys of the block before, the same block, and without a causal mask the next one.
        """
        assert self.window is not None
        size, sides = band_size(self.window, self.causal), 2 if self.causal else 3
        blocks = -(-tokens // size)
        query_N1 = torch.arange(blocks * size, device=device).view(blocks, size, 1)
        key_N1 = torch.arange(-size, (sides - 1) * size, device=device) + query_N1[:, :1]
        ago = query_N1 - key_N1
        ahead = 1 if self.causal else self.window[1]
        visible = (ago < self.window[0]) & (-ago < ahead) & (key_N1 >= 0) & (key_N1 < tokens)
        # Padding of the last block sees all keys, since without keys it would be NaN.
        return (visible | (query_N1 >= tokens)).unsqueeze(1)


@dataclass(frozen=True)
class MergedMask:
    """Mask of merged attention: keys of the source, then, in the same softmax, keys of the query's row."""

    row: AttentionMask
    source: AttentionMask
    source_keys: int
    """Number of the source's keys; they are the first ones."""
    may_see_nothing: bool = False
    plain: bool = False

    def rows(self, first: int, last: int, keys: int, device: torch.device) -> Tensor | None:
        """Keys that the queries see, as `Mask.rows` returns them."""
        row_keys = keys - self.source_keys
        parts = self.source.rows(first, last, self.source_keys, device), self.row.rows(first, last, row_keys, device)
        if parts[0] is None and parts[1] is None:
            return None
        widths, every = (self.source_keys, row_keys), torch.ones((), dtype=torch.bool, device=device)
        rows = max((part.shape[0] for part in parts if part is not None and part.dim() == 4), default=0)
        shape = (rows, 1, last - first) if rows else (last - first,)
        return torch.cat(
            [
                (every if part is None else part).expand(*shape, width)
                for part, width in zip(parts, widths, strict=True)
            ],
            dim=-1,
        )

    def kernel(self, bias: bool, queries: int, keys: int) -> Kernel:
        """The kernel for this mask, as `Mask.kernel` returns it."""
        return "masked"


class KernelMask:
    """A mask's tensors for one kernel, made once before the layers that share them.

    Not a dataclass, so that tools that traverse a layer's arguments do not traverse it.
    """

    def __init__(
        self,
        mask: Mask,
        size: tuple[int, int],
        like: tuple[torch.dtype, torch.device],
        *,
        scores: bool,
        bias: Tensor | bool,
    ) -> None:
        """Compute the tensors of a mask.

        Args:
            mask: Which keys a query may attend to.
            size: Numbers of queries and of keys.
            like: Dtype of the scores, and their device.
            scores: Whether the scores are computed as a tensor.
            bias: The bias on the scores that all layers share, H x T x S or B x H x T x S; True where each layer adds
                its own; False where there is none.
        """
        (queries, keys), (dtype, device) = size, like
        self.mask = mask
        self.bias = bias if isinstance(bias, Tensor) else None
        """Bias that all layers share; part of `added`, unless the scores are computed as a tensor."""
        biased = self.bias is not None or bias is True
        self.kernel: Kernel | Literal["scores"] = "scores" if scores else mask.kernel(biased, queries, keys)
        self.prefix, self.window, self.causal = 0, None, False
        self.visible: Tensor | None = None
        """Boolean mask for the kernel; with kernel `causal` it covers only the queries after the prefix. None where all
        keys are visible, or where `added` is used."""
        self.added: Tensor | None = None
        """Additive mask in the scores' dtype: 0 or -inf, made once since kernels copy a boolean mask, plus the shared
        bias. Only with documents, blocks or such a bias."""
        self.fully_masked: Tensor | None = None
        """B x 1 x T x 1, with documents or blocks: queries that see no key. For the kernel they see all keys, since it
        may return zeros or NaN for fully masked rows; their output is then set to zero."""
        if isinstance(mask, AttentionMask):
            self.window, self.causal = mask.window, mask.causal
        if self.kernel == "causal":
            assert isinstance(mask, AttentionMask)
            assert not isinstance(mask.prefix, Tensor)
            self.prefix = mask.prefix or 0
            if 1 < self.prefix < queries:
                self.visible = mask.rows(self.prefix, queries, keys, device)
        elif self.kernel == "band":
            assert isinstance(mask, AttentionMask)
            self.visible = mask.band(queries, device)
        else:
            self.visible = mask.rows(0, queries, keys, device)
            if mask.may_see_nothing:
                assert self.visible is not None
                self.fully_masked = ~self.visible.any(dim=-1, keepdim=True)
                seen = self.visible | self.fully_masked
                if scores:
                    self.visible = seen
                else:
                    self.added = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
                    self.visible = None
            if self.bias is not None and not scores:
                self.added, self.visible = self.with_bias(self.bias.to(dtype)), None

    def with_bias(self, bias: Tensor) -> Tensor:
        """Additive mask with this bias: H x T x S, or B x H x T x S."""
        if self.added is not None:
            return bias + self.added
        return bias if self.visible is None else bias.masked_fill(~self.visible, -torch.inf)
