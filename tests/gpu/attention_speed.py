"""Attention alone, forward and backward, by FlexAttention and by torch's other kernels, for each kind of mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.bench.machine import synchronize
from lit_llm.bench.results import Measured
from lit_llm.bench.turns import measured, take_turns
from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.attention.relative import alibi_slopes, linear_bias
from lit_llm.components.flex import FlexAttention, FlexMask, ScoreChange
from lit_llm.components.masks import AttentionMask, KernelMask
from lit_llm.training.compiled_blocks import compiled_flex


class Sizes(NamedTuple):
    """Shape of the measured attention."""

    rows: int = 4
    heads: int = 16
    tokens: int = 4096
    head_dim: int = 64


class Case(NamedTuple):
    """One kind of attention."""

    mask: AttentionMask
    softcap: float | None = None
    alibi: bool = False


def cases(sizes: Sizes, device: str) -> dict[str, Case]:
    """Kinds of attention, the plain triangle first, which `kernels: flex` leaves to torch's other kernels."""
    rows, tokens = sizes.rows, sizes.tokens
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(rows, tokens, generator=generator) < 8 / tokens
    documents = ends.cumsum(1).to(device)
    prefixes = torch.randint(1, tokens, (rows,), generator=generator).to(device)
    causal = AttentionMask(causal=True)
    return {
        "triangle": Case(causal),
        "window of 1/16": Case(AttentionMask(causal=True, window=(tokens // 16, tokens // 16))),
        "window of 1/4": Case(AttentionMask(causal=True, window=(tokens // 4, tokens // 4))),
        "about 9 documents": Case(AttentionMask(causal=True, documents=(documents, documents))),
        "prefix of half": Case(AttentionMask(causal=True, prefix=tokens // 2)),
        "prefix of each row": Case(AttentionMask(causal=True, prefix=prefixes)),
        "soft cap": Case(causal, softcap=30.0),
        "ALiBi": Case(causal, alibi=True),
    }


def compare_attention(
    sizes: Sizes, device: str, turns: int, flex: FlexAttention | None = None
) -> Iterator[tuple[str, list[Measured]]]:
    """Yield (kind, measurements in turns): `mask`, made once for all layers, and `attention`, forward and backward."""
    flex = flex or compiled_flex(lengths_vary=False)
    like = torch.float32 if device == "cpu" else torch.bfloat16, torch.device(device)
    for kind, case in cases(sizes, device).items():
        contestants = {name: _turn(make, case, sizes, like) for name, make in makers(case, sizes, like, flex).items()}
        yield kind, measured(take_turns(contestants, turns, lambda done: None))


Make = Callable[[], KernelMask | FlexMask]


def makers(case: Case, sizes: Sizes, like: tuple[torch.dtype, torch.device], flex: FlexAttention) -> Mapping[str, Make]:
    """{contestant: function that makes its mask}, for `DotProduct`. like: dtype and device."""
    size, positions = (sizes.tokens, sizes.tokens), torch.arange(sizes.tokens, device=like[1])

    def by_torch() -> KernelMask:
        bias = linear_bias(positions, positions, sizes.heads) if case.alibi else False
        return KernelMask(case.mask, size, like, scores=case.softcap is not None, bias=bias)

    def by_flex() -> FlexMask:
        alibi = (torch.tensor(alibi_slopes(sizes.heads), device=like[1]), positions) if case.alibi else None
        return FlexMask(case.mask, size, like, flex, ScoreChange(case.softcap, alibi))

    return {"torch": by_torch, "flex": by_flex}


def _turn(
    make: Make, case: Case, sizes: Sizes, like: tuple[torch.dtype, torch.device]
) -> Callable[[], dict[str, float]]:
    """A function that makes the mask and computes the attention once, and returns the seconds of each."""
    dtype, device = like
    shape = sizes.rows, sizes.heads, sizes.tokens, sizes.head_dim
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, generator=generator).requires_grad_() for _ in range(3))
    attention = DotProduct(softcap=case.softcap)

    def timed() -> dict[str, float]:
        synchronize(device.type)
        began = time.perf_counter()
        mask = make()
        synchronize(device.type)
        made = time.perf_counter()
        out: Tensor = attention(q, k, v, mask)
        torch.autograd.grad(out.sum(), (q, k, v))
        synchronize(device.type)
        return {"mask": made - began, "attention": time.perf_counter() - made}

    return timed
