"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout of Llama and Gemma.

Frequencies for texts longer than those of the training: all divided (linear, arXiv 2306.15595), or those that turn
often kept and those that turn rarely divided (Llama 3.1, arXiv 2407.21783; YaRN, arXiv 2309.00071).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.components import liger
from lit_llm.components.few_rows import MOST_ENTRIES, functions_for

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, each broadcastable to B x T x H x K/2."""


LLAMA3_TURNS = 1, 4
"""Turns within the original length up to which Llama 3.1 divides a frequency, and from which it keeps it."""
YARN_TURNS = 1, 32
"""The same of YaRN."""


class Frequencies(NamedTuple):
    """Rotary frequencies: one for each pair of entries."""

    theta: float
    """Base: the slowest pair turns by about 1 / theta per token."""
    entries: int
    """Entries of a head that are rotated, its first."""
    factor: float = 1.0
    """Divisor of the frequencies."""
    scaling: str = "linear"
    """Frequencies that are divided: all (linear), or those with few turns in `original_length` (llama3, yarn)."""
    original_length: int = 0
    """Tokens of the texts of the training."""

    def radians(self, device: torch.device) -> Tensor:
        """Angle per token of each pair: K/2, in float32."""
        exponent = torch.arange(0, self.entries, 2, device=device, dtype=torch.float32) / self.entries
        plain = self.theta**-exponent
        if self.scaling == "linear":
            return plain / self.factor
        kept = self._kept_by_llama3(plain) if self.scaling == "llama3" else self._kept_by_yarn(plain)
        return plain * kept + plain / self.factor * (1 - kept)

    def _kept_by_llama3(self, plain: Tensor) -> Tensor:
        """Share of each frequency that is not divided, linear in its turns within the original length."""
        few, many = LLAMA3_TURNS
        return ((self.original_length * plain / (2 * math.pi) - few) / (many - few)).clamp(0, 1)

    def _kept_by_yarn(self, plain: Tensor) -> Tensor:
        """Share of each frequency that is not divided, linear in the pair's number."""
        slow, fast = (self._pair_of(turns) for turns in YARN_TURNS)
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), self.entries - 1)
        pairs = torch.arange(len(plain), device=plain.device, dtype=torch.float32)
        return 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)

    def _pair_of(self, turns: float) -> float:
        """Number of the pair that turns so often within the original length."""
        return self.entries * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and of rotated keys (YaRN, equation 22)."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" and self.factor > 1 else 1.0


def rotation_at(positions: Tensor, frequencies: Frequencies, dtype: torch.dtype) -> Rotation:
    """Rotation of queries or keys at these positions: T, or B x T."""
    # Angles in float32: in bfloat16 positions beyond 256 would not be distinct.
    angles = positions.float()[..., None] * frequencies.radians(positions.device)
    angles = angles.unsqueeze(-2)  # T x 1 x K/2, or B x T x 1 x K/2: all heads alike
    cos, sin = angles.cos(), angles.sin()
    if (magnitude := frequencies.magnitude) != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + K/2) of every head by its position's angle.

    A rotation of fewer pairs than a head has rotates its first entries.
    """
    if (entries := 2 * rotation[0].shape[-1]) < x_BTHK.shape[-1]:
        return torch.cat([rotate(x_BTHK[..., :entries], rotation), x_BTHK[..., entries:]], dim=-1)
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
