"""Calls of one attention without a model around it."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.components.attention.dot_product import DotProduct, largest_logit
from lit_llm.components.attention.module import Attention, AttentionInputs
from lit_llm.components.forward_context import ForwardContext, SourceInput
from lit_llm.components.masks import AttentionMask, KernelMask, Mask


def dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """softmax(scores)v under a mask, by the kernel that the mask asks for."""
    kernel = KernelMask(
        mask, (q.shape[2], k.shape[2]), (q.dtype, q.device), scores=cap is not None, bias=bias is not None
    )
    return DotProduct(scale, cap)(q, k, v, kernel, bias)


def largest(attention: DotProduct, q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None = None) -> Tensor:
    """The largest |score| over the visible pairs."""
    kernel = KernelMask(mask, (q.shape[2], k.shape[2]), (q.dtype, q.device), scores=True, bias=bias is not None)
    return largest_logit(attention, q, k, kernel, bias)


def inputs_of(
    module: Attention,
    x_BTD: Tensor,
    mask: AttentionMask,
    positions: dict[str, Tensor] | None = None,
    source_BSD: Tensor | None = None,
    source_mask: AttentionMask | None = None,
) -> AttentionInputs:
    """What a forward pass gives to an attention over x_BTD, and over source_BSD where it reads one."""
    source = None
    if source_BSD is not None:
        source = SourceInput(source_mask or AttentionMask(), source_BSD.shape[1], source_BSD)
    rows = torch.arange(x_BTD.shape[1])
    given = {"self": rows, "restart": rows, "continuous": rows, "source": torch.arange(99), **(positions or {})}
    return module.prepare(ForwardContext(x_BTD, mask, given, source), None)
