"""Muon, with one Newton-Schulz iteration for several matrices of equal shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llm.training.optimizers.batches import batches
from lit_llm.training.optimizers.by_group import ByGroup
from lit_llm.training.optimizers.config import shape_factor
from lit_llm.training.optimizers.shards import divided_as, local_rows, sharded_as, whole

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the iteration x <- A x + (B x xᵀ + C (x xᵀ)²) x."""
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


class Muon(ByGroup):
    """torch's Muon over float32 matrices, with fewer calls: its iterations on small matrices are mostly overhead."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        scaling: str = "match_rms_adamw",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "scaling": scaling,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        of_shape = defaultdict[torch.Size, list[Tensor]](list)
        for parameter in parameters:
            of_shape[parameter.shape].append(parameter)
        for shape, alike in of_shape.items():
            for batch in batches(alike):
                self._update(batch, group, shape_factor(group["scaling"], *shape))

    def _update(self, parameters: list[Tensor], group: dict[str, Any], scale: float) -> None:
        gradients = [local_rows(parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta, kept = [local_rows(self.state[parameter]["momentum"]) for parameter in parameters], group["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1 - kept)
        updates = torch._foreach_lerp(gradients, momenta, kept) if group["nesterov"] else momenta
        values = [local_rows(parameter) for parameter in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        # The iteration is of a whole matrix, so devices that share one gather its update and all compute it.
        gathered = [whole(sharded_as(*pair)) for pair in zip(parameters, updates, strict=True)]
        steps = [divided_as(*pair) for pair in zip(parameters, orthogonalised(gathered), strict=True)]
        torch._foreach_add_(values, [local_rows(step) for step in steps], alpha=-group["lr"] * scale)


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices of one shape with singular values near 1 instead of their own, by iterations in bfloat16."""
    rows, columns = matrices[0].shape
    x = torch.stack([matrix.bfloat16() for matrix in matrices])
    x = x.mT if rows > columns else x  # products of the short side
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    add_product: Callable[..., Tensor] = torch.baddbmm
    if len(matrices) == 1:
        x, add_product = x[0], torch.addmm  # a product of large matrices is faster on its own
    for _ in range(_ITERATIONS):
        squares = x @ x.mT
        factor = add_product(squares, squares, squares, beta=_B, alpha=_C)
        x = add_product(x, factor, x, beta=_A)
    x = x.mT if rows > columns else x
    return [x] if len(matrices) == 1 else list(x.unbind())
