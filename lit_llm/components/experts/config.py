"""Mixture of experts: several feed-forward networks, of which each token uses a few (Shazeer et al., arXiv 1701.06538).

A router gives each token a probability for each expert, p = softmax(W x). The token goes through the `top_k` most
probable ones, and none is dropped; their outputs are added with the weights p, or p divided by the sum of those chosen
(`normalised`, as in Mixtral, arXiv 2401.04088). A shared network reads every token besides (DeepSeekMoE, arXiv
2401.06066).

Two ways keep experts from being idle, with f_i the share of expert i in the choices of a micro-batch's tokens, and P_i
its mean probability among n experts:

loss    weight · n Σ f_i P_i is added to the objective for each layer (Switch Transformer, arXiv 2101.03961, eq. 4). It
        is 1 for equal shares. Here f sums to 1 for any `top_k`; where it sums to `top_k`, as in transformers, a weight
        is so many times larger.
bias    a number b_i is added to p_i for the choice alone. After each step it rises by `bias_rate` for experts with less
        than the mean share in the whole batch, and falls for those with more (arXiv 2408.15664, algorithm 1).

Padding, and what follows a row's last target, does not count in f and P.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lit_llm.config.section import Section, partial


class ExpertsConfig(Section):
    """One mixture of experts. Activation and biases are those of `model.feed_forward`."""

    count: int = Field(8, gt=1, le=1024)
    """Number of experts among which the router chooses."""
    top_k: int = Field(2, gt=0)
    """Number of experts that each token uses; fewer than `count`."""
    d_ff: int | None = Field(None, gt=0)
    """Hidden width of each expert; that of `model.feed_forward` when absent."""
    shared_d_ff: int = Field(0, ge=0)
    """Hidden width of a network that every token uses besides; 0: none."""
    normalised: bool = True
    """Divide the weights of a token's experts by their sum."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How the experts' shares are made equal: by an additional loss, by a bias on the choice, or not at all."""
    balance_weight: float = Field(0.01, gt=0)
    """Weight of the additional loss of `balance: loss`, per layer."""
    bias_rate: float = Field(0.001, gt=0)
    """Change of an expert's bias in one step with `balance: bias`."""


_Optional: Any = partial(ExpertsConfig)


class ExpertsOverride(_Optional):
    """Puts a mixture of experts into a layer: `token_choice`, or `{count: 4, top_k: 1}` for one with other settings."""

    kind: Literal["token_choice"] = "token_choice"
    """token_choice: each token uses its most probable experts, however many tokens an expert then has."""
