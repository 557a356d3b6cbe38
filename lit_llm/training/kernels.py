"""Obstacles to the kernels that a configuration names, on this machine. Loads no torch."""

from __future__ import annotations

import importlib.util
import os


def liger_obstacle(on_gpu: bool) -> str:
    """Reason why `kernels: liger` cannot be computed here, with the next step; '' where it can.

    on_gpu: whether the training has a CUDA device. Triton's interpreter needs none.
    """
    otherwise = "or set kernels to auto in all arms"
    if any(importlib.util.find_spec(package) is None for package in ("liger_kernel", "triton")):
        return f"liger-kernel is not installed; `pip install -e '.[gpu]'` in the checkout, {otherwise}"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Liger's kernels need a CUDA device, and the training has none; run it on a GPU, {otherwise}"
    return ""
