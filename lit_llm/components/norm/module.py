"""Module of `NormConfig`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, ones

from lit_llm.components import liger
from lit_llm.components.few_rows import MOST_ENTRIES, functions_for
from lit_llm.components.norm.config import NormConfig


class Norm(nn.Module):
    """RMSNorm or LayerNorm (without bias) over the last `width` entries."""

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        self.function, self.eps = config.function, config.eps
        self.scale = nn.Parameter(ones(width)) if config.scale else None

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.function](x, self.scale, self.eps)


def layer_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps), times a scale, over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), scale, None, eps)


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps), times a scale, over the last dimension."""
    if liger.uses_liger():
        return liger.rms_norm(x, scale, eps)
    functions = functions_for(x, scale) if scale is None or scale.shape == x.shape[-1:] else None
    if functions is not None and x.numel() <= MOST_ENTRIES:
        x = x.contiguous()
        out = torch.empty_like(x)
        pointers = x.data_ptr(), None if scale is None else scale.data_ptr(), out.data_ptr()
        functions.rms_norm(*pointers, x.numel() // x.shape[-1], x.shape[-1], eps)
        return out
    if torch.compiler.is_compiling():
        # Compiled to one kernel, with the scale in float32 as in `_RMSNorm`.
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        exact = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (exact if scale is None else exact * scale).to(x.dtype)
    if x.device.type == "cpu":
        normed: Tensor = _RMSNorm.apply(x, scale, eps)
        return normed
    # The scale in x's dtype, which the fused kernel requires.
    return F.rms_norm(x, (x.shape[-1],), None if scale is None else scale.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm on a CPU, for which torch has no fused kernel: half the time of its operations one by one.

    Computed in float32 at least; only the input is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        factor = _reciprocal(exact, eps)
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        normed = exact * factor
        return (normed if scale is None else normed.mul_(scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        factor, d_normed, d_scale = _reciprocal(exact, ctx.eps), gradients[0].to(exact.dtype), None
        if scale is not None:
            d_scale = (d_normed * exact).mul_(factor).flatten(0, -2).sum(0).to(scale.dtype)
            d_normed = d_normed * scale
        # r g - x r³ mean(x g), with r the reciprocal of the root mean square.
        along = (d_normed * exact).mean(-1, keepdim=True).mul_(factor.square()).neg_()
        return torch.addcmul(d_normed, exact, along).mul_(factor).to(x.dtype), d_scale, None


def _reciprocal(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last dimension, kept as one of size 1."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(eps).rsqrt_()


FUNCTIONS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
"""{`norm.function`: function of the entries, the scale and eps}."""
