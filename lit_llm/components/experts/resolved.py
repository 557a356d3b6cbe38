"""One mixture of experts with all settings resolved: its parameters, FLOPs and memory. Loads no torch."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from lit_llm.components.experts.config import ExpertsConfig, ExpertsOverride
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.part import (
    FLOAT32,
    Defaults,
    Example,
    LayerComponent,
    MatrixKind,
    Part,
    Precision,
    TensorShape,
    Widths,
)
from lit_llm.config.tree import KIND

INDEX = 8
"""Bytes of an index."""


class ResolvedExperts(Part):
    """A mixture of experts with all settings resolved, in canonical form: equal functions compare equal."""

    module: ClassVar[str] = "lit_llm.components.experts.module:Experts"
    drops: ClassVar[tuple[str, ...]] = ("feed_forward_dropout",)
    not_compiled: ClassVar[str] = "how many tokens an expert has depends on the tokens, and so do the sizes of products"
    training_only: ClassVar[tuple[str, ...]] = ("balance", "balance_weight", "bias_rate")

    count: int
    top_k: int
    d_ff: int
    shared_d_ff: int
    normalised: bool
    balance: str
    balance_weight: float
    bias_rate: float
    activation: str
    bias: bool

    @property
    def differs_by_stack(self) -> str:
        return "the shares of its experts are balanced within one stack"

    @property
    def depends_on_cut(self) -> bool:
        return self.balance == "loss"  # the shares are those of one micro-batch

    def matrix_kind(self, name: str) -> MatrixKind:
        return "readout" if name == "router.weight" else self.network.matrix_kind(".".join(name.split(".")[-2:]))

    @property
    def network(self) -> FeedForwardConfig:
        """The feed-forward network of one expert."""
        return self._network(self.d_ff)

    @property
    def shared_network(self) -> FeedForwardConfig | None:
        """The feed-forward network that every token uses; None without one."""
        return self._network(self.shared_d_ff) if self.shared_d_ff else None

    def _network(self, d_ff: int) -> FeedForwardConfig:
        return FeedForwardConfig.model_validate({"activation": self.activation, "d_ff": d_ff, "bias": self.bias})

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        shapes: dict[str, TensorShape] = {"router.weight": (self.count, widths.row)}
        expert = self.network.shapes(widths)
        for number in range(self.count):
            shapes |= {f"expert.{number}.{name}": shape for name, shape in expert.items()}
        if self.shared_network is not None:
            shapes |= {f"shared.{name}": shape for name, shape in self.shared_network.shapes(widths).items()}
        return shapes

    def unused_parameters(self, widths: Widths) -> int:
        return (self.count - self.top_k) * sum(map(math.prod, self.network.shapes(widths).values()))

    def products(self, widths: Widths) -> int:
        """Multiply-adds with the matrices of the router, of a token's experts and of the shared network."""
        shared = self.shared_network.products(widths) if self.shared_network else 0
        return self.count * widths.row + self.top_k * self.network.products(widths) + shared

    def unused_products(self, widths: Widths) -> int:
        return (self.count - self.top_k) * self.network.products(widths)

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        chosen, shared = self.top_k * example.row, self.shared_network
        kept = example.row * self.count * FLOAT32  # probabilities
        # The tokens of each expert, and what it makes of them before and after the weights.
        kept += chosen * 3 * widths.row * precision.compute
        # The choices, their order and the tokens of that order; weights before and after they are normalised.
        kept += chosen * (3 * INDEX + FLOAT32 + precision.compute) + example.row * FLOAT32
        kept += self.network.activation_bytes(example, widths, precision) * self.top_k
        return kept + (shared.activation_bytes(example, widths, precision) if shared else 0.0)


def resolve_experts(values: dict[str, Any], defaults: Defaults) -> ResolvedExperts:
    """Fill in defaults. Raises ValueError with a reason for settings that do not fit together.

    values: the fields of ExpertsConfig that are set.
    """
    config = ExpertsConfig.model_validate({key: value for key, value in values.items() if key != KIND})
    if config.top_k >= config.count:
        raise ValueError(
            f"top_k {config.top_k} of {config.count} experts: each token would use all of them, and the router would "
            "choose nothing; make count larger"
        )
    if config.top_k == 1 and config.normalised:
        raise ValueError(
            "top_k 1 with normalised weights: the weight is 1 whatever the router says, so it would learn nothing from "
            "the text; write normalised: false"
        )
    network = defaults.feed_forward
    if network["convolution"]:
        raise ValueError(
            "the tokens of an expert are no neighbours, which feed_forward.convolution mixes; write "
            "model.feed_forward.convolution: [], and attention.convolution where tokens are to be mixed"
        )
    return ResolvedExperts(
        count=config.count,
        top_k=config.top_k,
        d_ff=config.d_ff or network["d_ff"],
        shared_d_ff=config.shared_d_ff,
        normalised=config.normalised,
        balance=config.balance,
        balance_weight=config.balance_weight if config.balance == "loss" else 0.0,
        bias_rate=config.bias_rate if config.balance == "bias" else 0.0,
        activation=network["activation"],
        bias=network["bias"],
    )


EXPERTS = LayerComponent(
    key="experts",
    override=ExpertsOverride,
    resolve=resolve_experts,
    stacks=("encoder", "decoder", "target_decoder", "self_decoder"),
    role="feed_forward",
    help="Mixture of experts in place of the feed-forward network, in the layers for which this is written. Each token "
    "uses `top_k` of `count` networks.",
    elsewhere="a cross-decoder runs for a prompt's last token alone; write experts in the self-decoder",
)
