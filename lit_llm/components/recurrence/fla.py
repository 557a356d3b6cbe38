"""Linear recurrences by the Triton kernels of flash-linear-attention, in training on a GPU.

    chunk_simple_gla          one gate for each head                    retention, Mamba-2
    chunk_gla                 a gate for each entry of a head's keys    gated linear attention
    chunk_gated_delta_rule    the delta rule, one gate for each head    gated DeltaNet

The formulas are those of `chunks.py`. The kernels have chunks of their own, of at most 64 tokens. Documents become rows
of different lengths, laid end to end. `tests/gpu_kernels` compares kernels and chunks by Triton's interpreter, in
float32 on a CPU. The package is imported where a kernel is called, since that takes seconds.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.forward_context import compute_dtype
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.config import TRITON_F32, TRITON_F32_IN_FP32


class DocumentBorders(NamedTuple):
    """Where documents begin in rows that are laid end to end, and the end of the last; None for whole rows."""

    forwards: Tensor | None
    backwards: Tensor | None
    """The same for rows that are turned around; None also where rows are read forwards alone."""

    def turned(self) -> DocumentBorders:
        return DocumentBorders(self.backwards, self.forwards)


def borders_of(runs_BT: Tensor | None, both_ways: bool) -> DocumentBorders:
    """The borders of documents. It waits for the device, so it is called once for all layers.

    runs_BT: document numbers, equal ones adjacent; None for whole rows. both_ways: whether rows are read backwards too.
    """
    if runs_BT is None:
        return DocumentBorders(None, None)
    return DocumentBorders(_borders(runs_BT), _borders(runs_BT.flip(1)) if both_ways else None)


def _borders(runs_BT: Tensor) -> Tensor:
    begins_BT = F.pad(runs_BT[:, 1:] != runs_BT[:, :-1], (1, 0), value=True)
    return F.pad(begins_BT.flatten().nonzero()[:, 0], (0, 1), value=begins_BT.numel())


def fused_chunkwise(streams: Streams, borders: Tensor | None) -> Tensor:
    """The output of each token and head, ... x T x V, as `chunkwise` computes it.

    borders: N + 1 for N documents, which start from an empty state; see `DocumentBorders`.
    """
    v, log_gates, betas = streams.v_BHTV, streams.log_gates_BHTG, streams.betas_BHT1
    rows, *heads, _, _ = v.shape
    dtype = compute_dtype(v)
    if dtype == torch.float32:
        # By default Triton would round the factors of products in float32 to TF32. It reads this when it compiles. The
        # backward pass compiles later, so the variable stays set.
        os.environ.setdefault(TRITON_F32, TRITON_F32_IN_FP32)
    qkv = [_by_token(x.to(dtype), heads, borders) for x in (streams.q_BHTK, streams.k_BHTK, v)]
    gates_BTHG = _by_token(log_gates, heads, borders)
    options = {"scale": 1.0, "cu_seqlens": borders}  # the mixers have scaled queries or keys
    if betas is not None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        betas_BTH = _by_token(betas, heads, borders).squeeze(-1)
        out_BTHV, _ = chunk_gated_delta_rule(*qkv, gates_BTHG.squeeze(-1), betas_BTH, **options)
    elif log_gates.shape[-1] == 1:
        from fla.ops.simple_gla import chunk_simple_gla

        out_BTHV, _ = chunk_simple_gla(*qkv, gates_BTHG.squeeze(-1), **options)
    else:
        from fla.ops.gla import chunk_gla

        out_BTHV, _ = chunk_gla(*qkv, gates_BTHG, **options)
    out: Tensor = out_BTHV
    if borders is not None:
        out = out[0].unflatten(0, (rows, -1))
    return out.unflatten(2, heads).movedim(1, -2)


def _by_token(x_BHTC: Tensor, heads: list[int], borders: Tensor | None) -> Tensor:
    """B x ... x T x C as B x T x H x C, or with borders as 1 x BT x H x C.

    heads: sizes of the dimensions between rows and tokens, to which x is expanded.
    """
    x_BTHC = x_BHTC.movedim(-2, 1)
    x_BTHC = x_BTHC.expand(*x_BTHC.shape[:2], *heads, -1).flatten(2, -2)
    return x_BTHC if borders is None else x_BTHC.flatten(0, 1)[None]
