"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout of Llama and Gemma."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, each broadcastable to B x T x H x K/2."""


class Rotations:
    """The rotations of a forward pass: computed once for each (positions, theta, head_dim, factor), for all layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._made: dict[tuple[str, float, int, float], Rotation] = {}
        self._positions: dict[str, Tensor] = {}

    def place(self, name: str, positions: Tensor) -> None:
        """Give a set of positions a name; positions: T, or B x T."""
        self._positions[name] = positions

    def positions(self, name: str) -> Tensor:
        """The positions called `name`."""
        return self._positions[name]

    def of(self, name: str, theta: float, head_dim: int, factor: float = 1.0) -> Rotation:
        """The rotation of the positions called `name`, divided by `factor`."""
        key = (name, theta, head_dim, factor)
        if key not in self._made:
            positions = self._positions[name]
            # Angles in float32: in bfloat16 positions beyond 256 would not even be distinct.
            exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
            angles = positions.float()[..., None] * (theta**-exponent / factor)
            angles = angles.unsqueeze(-2)  # T x 1 x K/2, or B x T x 1 x K/2: all heads alike
            self._made[key] = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return self._made[key]


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + K/2) of every head by its position's angle."""
    cos, sin = rotation
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
