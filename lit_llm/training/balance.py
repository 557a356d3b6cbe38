"""Balance of the experts of a model in training: its loss, the steps of its biases, and what is logged of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_llm.components.experts.module import Experts
from lit_llm.objectives.collate import Batch


class ExpertLoad(NamedTuple):
    """Shares of the experts in one batch, in the layer where they are least equal."""

    busiest: float
    """Share of the choices that fall on the most chosen expert; 1 / n for equal shares of n experts."""
    entropy: float
    """Entropy of the shares over its largest value: 1 for equal shares, 0 where one expert is chosen always."""


class ExpertBalance:
    """Keeps the shares of all mixtures of experts of a model. Without any it costs nothing."""

    def __init__(self, model: nn.Module) -> None:
        modules = [(name.partition(".")[0], each) for name, each in model.named_modules() if isinstance(each, Experts)]
        self.layers: list[tuple[str, Experts]] = modules
        """(encoder or decoder, mixture of experts) of each layer that has one."""
        self._chosen: list[Tensor] = []

    def begin(self) -> None:
        """Await the choices of a forward pass, whose `loss` follows."""
        for _, experts in self.layers:
            experts.awaits_routing = True

    def loss(self, piece: Batch) -> Tensor | float:
        """Loss of the balance for the targets of a micro-batch whose forward pass has just ended: a sum, as others are.

        Padding and tokens after a row's last target do not count.
        """
        total: Tensor | float = 0.0
        counted, chosen = {side: piece.read_tokens(side).flatten() for side, _ in self.layers}, []
        for side, experts in self.layers:
            assert experts.routing is not None
            probabilities_Nn, chosen_Nk, _ = experts.routing
            experts.routing, experts.awaits_routing = None, False
            config, read_N = experts.config, counted[side].to(probabilities_Nn.dtype)
            counts_n = torch.zeros_like(probabilities_Nn[0]).detach()
            counts_n.scatter_add_(0, chosen_Nk.flatten(), read_N.repeat_interleave(config.top_k))
            chosen.append(counts_n)
            if config.balance == "loss":
                tokens = read_N.sum().clamp_min(1)
                shares_n = counts_n / (tokens * config.top_k)
                means_n = read_N @ probabilities_Nn / tokens
                total = total + config.balance_weight * config.count * (shares_n @ means_n)
        if chosen:
            self._chosen.append(torch.cat(chosen))
        return total * sum(piece.counts)

    def take_choices(self, device: torch.device) -> Tensor:
        """Number of times that each expert of each layer was chosen since the last call, as one row."""
        chosen, self._chosen = self._chosen, []
        return torch.stack(chosen).sum(0).float() if chosen else torch.zeros(0, device=device)

    def load(self, choices: Sequence[float]) -> ExpertLoad | None:
        """Shares of the experts. choices: those of `take_choices`, of all devices."""
        shares = [[each / max(sum(row), 1.0) for each in row] for _, row in self._by_layer(choices)]
        if not shares:
            return None
        entropies = [-sum(p * math.log(p) for p in row if p > 0) / math.log(len(row)) for row in shares]
        return ExpertLoad(max(map(max, shares)), min(entropies))

    def step_biases(self, choices: Sequence[float]) -> None:
        """Raise the bias of each expert that was chosen less often than the mean, and lower the others'."""
        for experts, row in self._by_layer(choices):
            if (steps := experts.router.bias_steps) is not None:
                mean = sum(row) / len(row)
                signs = [(each < mean) - (each > mean) for each in row]
                steps += torch.tensor(signs, dtype=steps.dtype).to(steps.device)

    def _by_layer(self, choices: Sequence[float]) -> list[tuple[Experts, Sequence[float]]]:
        rows, first = [], 0
        for _, experts in self.layers:
            rows.append((experts, choices[first : first + experts.config.count]))
            first += experts.config.count
        return rows
