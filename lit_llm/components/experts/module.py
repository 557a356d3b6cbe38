"""Module of `ResolvedExperts`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_llm.components.experts.resolved import ResolvedExperts
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.few_rows import Linear
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.part import Widths


class Routing(NamedTuple):
    """Choices of a router for N tokens among n experts."""

    probabilities_Nn: Tensor
    """In float32 at least."""
    chosen_Nk: Tensor
    """Numbers of each token's experts."""
    weights_Nk: Tensor


class Router(Linear):
    """Gives each token its experts: x ─ weight ─ softmax ─┬─[+ bias]─ top k ─▶ which; └─[normalised]─▶ weights."""

    bias_steps: Tensor | None
    """n integers: how often a step has raised each expert's bias, less how often one has lowered it. Integers are exact
    in every precision of the parameters. None without such a bias."""

    def __init__(self, config: ResolvedExperts, width: int) -> None:
        super().__init__(width, config.count)
        self.config = config
        steps = torch.zeros(config.count, dtype=torch.int64) if config.balance == "bias" else None
        self.register_buffer("bias_steps", steps)

    def forward(self, x_ND: Tensor) -> Routing:  # type: ignore[override]
        """N x D -> the experts of each token."""
        logits_Nn = super().forward(x_ND)
        probabilities_Nn = logits_Nn.to(torch.promote_types(logits_Nn.dtype, torch.float32)).softmax(-1)
        ranked_Nn = probabilities_Nn.detach()
        if self.bias_steps is not None:
            ranked_Nn = ranked_Nn + self.config.bias_rate * self.bias_steps
        chosen_Nk = ranked_Nn.topk(self.config.top_k, dim=-1).indices
        weights_Nk = probabilities_Nn.gather(-1, chosen_Nk)
        if self.config.normalised:
            weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        return Routing(probabilities_Nn, chosen_Nk, weights_Nk)


class Experts(LayerPart):
    """A mixture of experts in place of a layer's feed-forward network:

    x ─┬─ router ─▶ which experts, with which weights
       ├─ each expert, for its tokens alone ─(× weight)─(+)─▶
       └─[shared]────────────────────────────────────────┘
    """

    def __init__(self, config: ResolvedExperts, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config
        self.router = Router(config, widths.row)
        self.expert = nn.ModuleList(FeedForward(config.network, widths, causal) for _ in range(config.count))
        shared = config.shared_network
        self.shared = None if shared is None else FeedForward(shared, widths, causal)
        self.routing: Routing | None = None
        """Choices of the last pass, where the balance of the experts awaits them."""
        self.awaits_routing = False
        """True from the begin of a forward pass in training to its loss: a pass that activation checkpointing computes
        again would keep its activations."""

    def forward(self, x_BTD: Tensor, inputs: None = None) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        routing = self.router(x_ND)
        learns = torch.is_grad_enabled()
        if self.awaits_routing:
            self.routing = routing
        out_ND = torch.zeros_like(x_ND) if self.shared is None else self.shared(x_ND)
        # All N x k choices, ordered by expert.
        order_M = routing.chosen_Nk.flatten().argsort(stable=True)
        sizes = torch.bincount(routing.chosen_Nk.flatten(), minlength=self.config.count).tolist()
        tokens = (order_M // self.config.top_k).split(sizes)
        weights = routing.weights_Nk.flatten()[order_M, None].to(x_ND.dtype).split(sizes)
        for expert, tokens_m, weights_m1 in zip(self.expert, tokens, weights, strict=True):
            # An expert without tokens has a gradient of zero: devices that share the model wait for all gradients.
            if len(tokens_m) or learns:
                out_ND.index_add_(0, tokens_m, expert(x_ND[tokens_m]) * weights_m1)
        return out_ND.view_as(x_BTD)
