"""A float32 average of the trained parameters, kept beside the optimiser's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.training.averaging import ExponentialAverage, LastWeights
from lit_llm.training.optimizers.shards import divided_as, local_rows


class AveragedWeights(torch.optim.Optimizer):
    """An optimiser that wraps another one and averages the parameters after its steps.

    gradients ─ step of the optimiser ─▶ parameters ─ × share ───────(+)─▶ average
                                         average ──── × (1 - share) ──┘

    The average is in the state, so that a resume continues from it. Of shared parameters a device averages its rows.

    The rules are those of `torch.optim.swa_utils`. Its AveragedModel reads a counter from the device at each step, and
    Lightning's callback around it does not support sharded models.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        stepper: torch.optim.Optimizer,
        averaging: ExponentialAverage | LastWeights,
        max_steps: int,
    ) -> None:
        """stepper: an optimiser over `parameters`, in any order."""
        self.parameters, self.stepper = list(parameters), stepper
        self.averaging, self.max_steps = averaging, max_steps
        self.steps = 0
        """Steps so far."""
        self.begun = False
        """True once there is an average; before, its numbers have no meaning."""
        super().__init__(self.parameters, {})
        self.param_groups = stepper.param_groups
        self.averages = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.stepper.step(closure) if closure is not None else self.stepper.step()
        self.steps += 1
        share = self.averaging.share(self.steps, self.max_steps)
        if share:
            self._update(share)
        return loss

    @torch.no_grad()
    def _update(self, share: float) -> None:
        averages, weights = self._rows()
        if self.begun:
            torch._foreach_lerp_(averages, weights, share)
        else:
            torch._foreach_copy_(averages, weights)
        self.begun = True

    def _rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """This device's rows of (the average, the parameters)."""
        averages = [local_rows(average) for average in self.averages]
        return averages, [local_rows(parameter) for parameter in self.parameters]

    @contextmanager
    def in_parameters(self) -> Iterator[None]:
        """Context in which the parameters hold their average, once there is one."""
        if not self.begun:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weights in zip(*self._rows(), strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def take(self) -> None:
        """Set the parameters to their average, once there is one. Training cannot go on after this."""
        if self.begun:
            averages, weights = self._rows()
            torch._foreach_copy_(weights, averages)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "begun": self.begun,
            "averages": self.averages,
            "stepper": self.stepper.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.begun = state_dict["steps"], state_dict["begun"]
        for average, saved in zip(self.averages, state_dict["averages"], strict=True):
            average.copy_(divided_as(average, saved))
        self.stepper.load_state_dict(state_dict["stepper"])
        self.param_groups = self.stepper.param_groups
