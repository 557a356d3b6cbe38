"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout of Llama and Gemma."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.components import liger
from lit_llm.components.few_rows import MOST_ENTRIES, functions_for

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, each broadcastable to B x T x H x K/2."""


def rotation_at(positions: Tensor, theta: float, head_dim: int, factor: float, dtype: torch.dtype) -> Rotation:
    """Rotation of queries or keys at these positions (T, or B x T), divided by `factor`."""
    # Angles in float32: in bfloat16 positions beyond 256 would not be distinct.
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * (theta**-exponent / factor)
    angles = angles.unsqueeze(-2)  # T x 1 x K/2, or B x T x 1 x K/2: all heads alike
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + K/2) of every head by its position's angle."""
    if liger.uses_liger():
        return liger.rotate(x_BTHK, rotation)
    cos, sin = rotation
    functions = functions_for(x_BTHK, cos, sin)
    if functions is not None and _has_its_angles(x_BTHK, cos, sin) and 0 < x_BTHK.numel() <= MOST_ENTRIES:
        x_BTHK, half = x_BTHK.contiguous(), cos.shape[-1]
        out = torch.empty_like(x_BTHK)
        rows = x_BTHK.numel() // (2 * half)
        pointers = x_BTHK.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()
        functions.rotate(*pointers, rows, half, rows * half // cos.numel())
        return out
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _has_its_angles(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """True for one angle for all tokens, or one for each token in the order of memory."""
    rows, tokens, _, size = x_BTHK.shape
    return cos.shape == sin.shape and cos.shape[-2:] == (1, size // 2) and cos[..., 0].numel() in (1, rows * tokens)
