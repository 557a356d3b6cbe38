"""FlexAttention on a CPU, where torch refuses gradients but has their formulas: the graph runs operation by operation.

The formulas read the function of a mask, not its blocks, which only the kernels for a GPU read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torchs


@contextmanager
def gradients_allowed() -> Iterator[CompileCounterWithBackend]:
    """Context in which FlexAttention takes CPU tensors that need a gradient, with a backend that counts graphs."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchs, "_validate_device", lambda *_: None)
        yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()
