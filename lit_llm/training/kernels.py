"""Obstacles to the kernels that a configuration names, on this machine. Loads no torch, but to ask which GPU it has."""

from __future__ import annotations

import importlib.util
import os

from packaging.version import Version

OTHERWISE = "or set kernels to auto in all arms"


def kernel_obstacle(kernels: str, on_gpu: bool) -> str:
    """Reason why these kernels cannot be computed here, with the next step; '' where they can.

    Args:
        kernels: A value of `training.execution.kernels`.
        on_gpu: Whether the training has a CUDA device.
    """
    obstacles = {"liger": liger_obstacle, "flex": flex_obstacle, "fla": fla_obstacle}
    return obstacles[kernels](on_gpu) if kernels in obstacles else ""


def liger_obstacle(on_gpu: bool) -> str:
    """Obstacle to Liger's kernels."""
    return _triton_obstacle("liger_kernel", "liger-kernel", "Liger's kernels", on_gpu)


def fla_obstacle(on_gpu: bool) -> str:
    """Obstacle to the kernels of flash-linear-attention, which raise in the backward pass by some tritons on Hopper."""
    if obstacle := _triton_obstacle("fla", "flash-linear-attention", "flash-linear-attention's kernels", on_gpu):
        return obstacle
    if on_gpu:
        from lit_llm.training.devices import is_hopper

        # `fla.ops.common.chunk_o.chunk_bwd_dqkwg`; tilelang, which it takes instead, computes no retention or Mamba-2.
        if is_hopper() and Version("3.4.0") <= (installed := _triton_version()) < Version("3.7.1"):
            return (
                f"flash-linear-attention refuses triton {installed} on a Hopper GPU, whose gradients are wrong; "
                f"install triton 3.7.1 or later, {OTHERWISE}"
            )
    return ""


def _triton_version() -> Version:
    import triton

    return Version(triton.__version__)


def _triton_obstacle(package: str, project: str, kernels: str, on_gpu: bool) -> str:
    """Obstacle to Triton kernels of a package of the extra `gpu`. Triton's interpreter needs no CUDA device."""
    if any(importlib.util.find_spec(name) is None for name in (package, "triton")):
        return f"{project} is not installed; `pip install -e '.[gpu]'` in the checkout, {OTHERWISE}"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return f"{kernels} need a CUDA device, and the training has none; run it on a GPU, {OTHERWISE}"
    return ""


def flex_obstacle(on_gpu: bool) -> str:
    """Obstacle to FlexAttention, which has no backward pass on a CPU."""
    if not on_gpu:
        return f"FlexAttention trains on a CUDA device, and the training has none; run it on a GPU, {OTHERWISE}"
    if importlib.util.find_spec("triton") is None:
        return f"triton is absent, by which FlexAttention is compiled; `pip install triton`, {OTHERWISE}"
    return ""
