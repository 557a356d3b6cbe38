"""Initial values of single parameters, for the `initial` of a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def constant(value: float) -> Callable[[Tensor, torch.Generator], None]:
    """Fill a parameter with one value."""
    return partial(_fill, value)


def _fill(value: float, parameter: Tensor, _: torch.Generator) -> None:
    parameter.fill_(value)
