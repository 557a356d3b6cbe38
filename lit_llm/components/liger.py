"""RMSNorm, RoPE, gates and the loss by Liger's Triton kernels (arXiv 2410.10989), in training on a GPU.

`tests/gpu_kernels` compares them with ours by Triton's interpreter, in float32 on a CPU. The package is imported where
a kernel is called, since that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GATES = ("swiglu", "geglu_tanh")
"""Activations of gated networks that have a kernel."""
NO_IGNORED_TARGET = -100
"""Liger's mark of a target that does not count. Ours are ids, since rows that do not count are dropped before."""
TINY_WEIGHT = 2.0**-60
"""Weight of the squared log-normalisers where the objective has none. It changes no bit of loss or gradient."""

_used = False


@contextmanager
def liger_kernels(used: bool) -> Iterator[None]:
    """Within it, Liger's kernels take the place of ours, where `used`.

    It holds for every thread, since backward passes on a GPU, which compute checkpointed layers again, have their own.
    """
    global _used
    before, _used = _used, used
    try:
        yield
    finally:
        _used = before


def uses_liger() -> bool:
    """True while Liger's kernels are to be called."""
    return _used


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps), times a scale, over the last dimension; computed in float32."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Gemma's mode computes all of it in float32. In place it would overwrite a gradient that a residual branch shares.
    offset, mode, in_place = 0.0, "gemma", False
    normed: Tensor = LigerRMSNormFunction.apply(x, scale, eps, offset, mode, in_place)
    return normed


def rotate(x_BTHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + K/2) of every head by its position's angle."""
    cos, sin = (each.squeeze(-2) for each in rotation)
    rotated: Tensor = _Rotated.apply(x_BTHK, cos, sin)
    return rotated


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up, for an activation of `GATES`. Its backward pass overwrites both factors."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    functions = dict(zip(GATES, (LigerSiLUMulFunction, LigerGELUMulFunction), strict=True))
    product: Tensor = functions[activation].apply(gate, up)
    return product


def target_loss(
    hidden_ND: Tensor, output: tuple[Tensor, Tensor | None, float | None], targets_N: Tensor, squares: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats + squares * squared log-normalisers, nats, squared log-normalisers), sums over one target or more.

    Only the first has a gradient, and the states must need one. With states in bfloat16 the squared log-normalisers are
    rounded to it. output: (matrix V x D, bias V, soft cap).
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    (matrix_VD, bias_V, softcap), weight, label_smoothing = output, squares or TINY_WEIGHT, 0.0
    objective, weighted, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        *(hidden_ND, matrix_VD, targets_N, bias_V, None, NO_IGNORED_TARGET),
        *(weight, label_smoothing, "sum", softcap),
        True,  # return the squares
        torch.float32,  # in bfloat16 the sum of many chunks' gradients would stand still
    )
    weighted = weighted.detach().float()
    return objective, objective.detach() - weighted, weighted / weight


class _Rotated(torch.autograd.Function):
    """Liger's rotation of one tensor. Its own Function writes into its input and into the gradient that it gets."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from liger_kernel.ops.rope import rope_forward

        ctx.save_for_backward(cos, sin)
        return _of_copy(rope_forward, x_BTHK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from liger_kernel.ops.rope import rope_backward

        return _of_copy(rope_backward, gradients[0], *ctx.saved_tensors), None, None


def _of_copy(function: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The result of Liger's `rope_forward` or `rope_backward` for a copy of x, as B x T x H x K."""
    copy_BHTK = x_BTHK.clone(memory_format=torch.contiguous_format).transpose(1, 2)
    other_B1TK = torch.empty_like(copy_BHTK[:, :1])  # the kernel rotates queries and keys in one launch
    rotated_BHTK: Tensor = function(copy_BHTK, other_B1TK, cos, sin, rotary_dim=x_BTHK.shape[-1])[0]
    return rotated_BHTK.transpose(1, 2)
