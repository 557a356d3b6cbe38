"""Triton's interpreter made to run the kernels of Liger and flash-linear-attention, which it does not by itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def _obstacle() -> str:
    """Reason why the interpreter cannot run the kernels, or ''."""
    packages = ("triton", "liger_kernel", "fla", "einops")
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        return f"{' and '.join(absent)} not importable: make test-gpu-kernels"
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton's interpreter is off: make test-gpu-kernels"


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """The interpreter takes Python's floats for arguments, and numpy's functions for CUDA's.

    It counts loops by numbers that convert to a dtype, as compiled ones do, and takes the first configuration of a
    kernel, since it has no device to compare them on.
    """
    if obstacle := _obstacle():
        pytest.skip(obstacle)
    import fla.ops  # noqa: F401  # all modules with kernels
    import triton.language as tl
    from liger_kernel.ops import cross_entropy, geglu, rms_norm
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    def elementwise(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: tl.tensor(interpreter.TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    class Count(int):
        """A number of a loop."""

        def to(self, dtype: Any) -> Any:
            return converted(int(self)).to(dtype)

    def counted(*bounds: Any) -> Iterator[Count]:
        return map(Count, range(*map(int, bounds)))

    prune = Autotuner.prune_configs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", converted)
        patch.setattr(Autotuner, "prune_configs", lambda *arguments: prune(*arguments)[:1])
        for name, module in list(sys.modules.items()):
            if name.startswith("fla.ops."):
                patch.setattr(module, "range", counted, raising=False)
        patch.setattr(rms_norm, "rsqrt", elementwise(lambda x: 1 / np.sqrt(x)))
        for module in (cross_entropy, geglu):
            patch.setattr(module, "tanh", elementwise(np.tanh))
        yield
