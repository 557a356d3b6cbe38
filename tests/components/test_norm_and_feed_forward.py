"""Norms of the residual stream and feed-forward networks against their papers' formulas."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.norm.module import Norm

WIDTH, EPS = 12, 0.3  # an eps that one would notice


def scaled(module):
    nn.init.uniform_(module.scale, 0.5, 2)
    return module.double()


def test_rms_norm_divides_by_the_root_mean_square():
    """arXiv 1910.07467, equation 4."""
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64) + 1
    module = scaled(Norm(NormConfig(eps=EPS), WIDTH))
    assert_close(module(x), x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * module.scale)


def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation():
    """arXiv 1607.06450, equation 4, without a bias."""
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64) + 1
    module = scaled(Norm(NormConfig(function="layer_norm", eps=EPS), WIDTH))
    centred = x - x.mean(-1, keepdim=True)
    assert_close(module(x), centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * module.scale)


@pytest.mark.parametrize("function", ["rms_norm", "layer_norm"])
def test_without_scale_a_norm_has_no_parameters_and_is_the_norm_with_a_scale_of_one(function):
    kind = functools.partial(NormConfig, function=function)
    x = torch.randn(2, 3, WIDTH)
    free, learned = Norm(kind(scale=False), WIDTH), Norm(kind(), WIDTH)
    assert not list(free.parameters())
    assert sum(p.numel() for p in learned.parameters()) == kind().parameters(WIDTH) == WIDTH
    assert kind(scale=False).parameters(WIDTH) == 0
    assert_close(free(x), learned(x))


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(("activation", "function"), [("swiglu", silu), ("geglu", gelu)])
def test_gated_networks_multiply_the_activated_gate_with_up(activation, function):
    """arXiv 2002.05202, equation 6: FFN(x) = (f(xW) ⊗ xV) W₂."""
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    module = FeedForward(FeedForwardConfig(activation=activation, d_ff=20), WIDTH).double()
    gate, up, down = module.gate.weight.T, module.up.weight.T, module.down.weight.T
    assert_close(module(x), (function(x @ gate) * (x @ up)) @ down)


def test_gelu_has_two_matrices():
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    module = FeedForward(FeedForwardConfig(activation="gelu", d_ff=20), WIDTH).double()
    assert_close(module(x), gelu(x @ module.up.weight.T) @ module.down.weight.T)
    assert {name for name, _ in module.named_parameters()} == {"up.weight", "down.weight"}
