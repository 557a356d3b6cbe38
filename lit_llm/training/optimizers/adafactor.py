"""Adafactor, its second moments in full or factored, without a wait for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_llm.training.optimizers.batches import batches
from lit_llm.training.optimizers.by_group import ByGroup
from lit_llm.training.optimizers.shards import local_rows, sharded_as, summed_over_shards

_TINY = 1e-30
"""Added to squared gradients (the paper's epsilon 1)."""


class Adafactor(ByGroup):
    """Adafactor over float32 parameters; formulas in `config.py`.

    torch's reads two norms of each parameter, and each read waits for the device. Here norms stay on the device.
    Devices that share a parameter's rows add up their sums of squares.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        decay: float = 0.8,
        clip_threshold: float = 1.0,
        parameter_scale: bool = True,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        factored: bool = False,
    ) -> None:
        """factored: keep second moments of rows and columns for matrices; bound the learning rate by 1 / sqrt(step)."""
        defaults = {
            "lr": lr,
            "decay": decay,
            "clip_threshold": clip_threshold,
            "parameter_scale": parameter_scale,
            "eps": eps,
            "weight_decay": weight_decay,
            "factored": factored,
        }
        super().__init__(params, defaults)

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for factored in (True, False):
            for some in batches([p for p in parameters if factored == (group["factored"] and p.dim() > 1)]):
                self._update(some, group, factored)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], factored: bool) -> None:
        states = [self._state(parameter, factored) for parameter in parameters]
        gradients = [local_rows(parameter.grad) for parameter in parameters if parameter.grad is not None]
        values = [local_rows(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        # b = 1 - step^-decay is what a moment keeps.
        added = [state["step"] ** -group["decay"] for state in states]
        normalise = _by_factored_moments if factored else _by_full_moments
        updates = normalise(gradients, states, added, parameters)

        lr = group["lr"]
        rates = _rms(updates, parameters)
        torch._foreach_div_(rates, group["clip_threshold"])
        torch._foreach_clamp_min_(rates, 1.0)
        torch._foreach_reciprocal_(rates)
        if group["parameter_scale"]:
            scales = _rms(values, parameters)
            torch._foreach_clamp_min_(scales, group["eps"])
            torch._foreach_mul_(rates, scales)
        torch._foreach_mul_(rates, [-min(lr, state["step"] ** -0.5) if group["factored"] else -lr for state in states])
        torch._foreach_mul_(updates, rates)
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(values, updates)

    def _state(self, parameter: Tensor, factored: bool) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0  # a number, which is read without a wait
            if factored:
                rows = local_rows(parameter)
                state["row_moment"] = sharded_as(parameter, torch.zeros_like(rows[..., :1]))
                state["column_moment"] = rows.new_zeros((*rows.shape[:-2], 1, rows.shape[-1]))
            else:
                state["second_moment"] = torch.zeros_like(parameter)
        return state


def _by_full_moments(
    gradients: list[Tensor], states: list[dict[str, Any]], added: list[float], _parameters: list[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients over the roots of their second moments."""
    squares = torch._foreach_mul(gradients, gradients)
    torch._foreach_add_(squares, _TINY)
    moments = [local_rows(state["second_moment"]) for state in states]
    torch._foreach_lerp_(moments, squares, added)
    updates = torch._foreach_rsqrt(moments)
    torch._foreach_mul_(updates, gradients)
    return updates


def _by_factored_moments(
    gradients: list[Tensor], states: list[dict[str, Any]], added: list[float], parameters: list[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients over the roots of their second moments, here row x column / mean of the rows."""
    rows, columns = ([local_rows(state[name]) for state in states] for name in ("row_moment", "column_moment"))
    for moments, dim in ((rows, -1), (columns, -2)):
        # By norms, which need no tensor of all squares.
        means = [torch.linalg.vector_norm(gradient, dim=dim, keepdim=True) for gradient in gradients]
        torch._foreach_mul_(means, means)
        if dim == -2:
            means = [summed_over_shards(mean, parameter) for mean, parameter in zip(means, parameters, strict=True)]
        torch._foreach_div_(means, [float(parameter.shape[dim]) for parameter in parameters])
        torch._foreach_add_(means, _TINY)
        torch._foreach_lerp_(moments, means, added)
    # One factor after the other: the product of a row and a column underflows where gradients are small.
    factors = torch._foreach_div(rows, [_mean_of_rows(*pair) for pair in zip(rows, parameters, strict=True)])
    torch._foreach_rsqrt_(factors)
    updates = torch._foreach_mul(gradients, factors)
    torch._foreach_mul_(updates, torch._foreach_rsqrt(columns))
    return updates


def _mean_of_rows(moments: Tensor, parameter: Tensor) -> Tensor:
    """The mean of a matrix's row moments, over the rows of all devices."""
    return summed_over_shards(moments.sum(dim=-2, keepdim=True), parameter) / parameter.shape[-2]


def _rms(tensors: list[Tensor] | tuple[Tensor, ...], parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Roots of the mean squares, on the tensors' device. parameters: those whose rows the tensors belong to."""
    norms = torch._foreach_norm(tensors)
    if any(local_rows(parameter) is not parameter for parameter in parameters):
        squares = torch.stack(norms).square()
        norms = summed_over_shards(squares, parameters[0]).sqrt().unbind()
    torch._foreach_div_(norms, [math.sqrt(parameter.numel()) for parameter in parameters])
    return norms
