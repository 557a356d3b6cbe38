"""Triton's interpreter made to run Liger's kernels, which it does not by itself."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def _obstacle() -> str:
    """Reason why the interpreter cannot run Liger's kernels, or ''."""
    absent = [package for package in ("triton", "liger_kernel") if importlib.util.find_spec(package) is None]
    if absent:
        return f"{' and '.join(absent)} not importable: make test-gpu-kernels"
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton's interpreter is off: make test-gpu-kernels"


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """The interpreter takes Python's floats for arguments, and numpy's functions for CUDA's."""
    if obstacle := _obstacle():
        pytest.skip(obstacle)
    import triton.language as tl
    from liger_kernel.ops import cross_entropy, geglu, rms_norm
    from triton.runtime import interpreter

    def elementwise(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: tl.tensor(interpreter.TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", converted)
        patch.setattr(rms_norm, "rsqrt", elementwise(lambda x: 1 / np.sqrt(x)))
        for module in (cross_entropy, geglu):
            patch.setattr(module, "tanh", elementwise(np.tanh))
        yield
