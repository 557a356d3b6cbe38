"""Norms of the residual stream and feed-forward networks against their papers' formulas."""

import functools
import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.forward_context import ForwardContext, SourceInput
from lit_llm.components.masks import AttentionMask
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.norm.module import FUNCTIONS, Norm
from lit_llm.components.norm.module import rms_norm as module_rms_norm
from lit_llm.components.part import Widths
from tests.tiny_models import build

WIDTH, EPS = 12, 0.3  # an eps that one would notice


def scaled(module):
    nn.init.uniform_(module.scale, 0.5, 2)
    return module.double()


def rms_norm(x):
    """arXiv 1910.07467, equation 4."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def layer_norm(x):
    """arXiv 1607.06450, equation 4, without a bias."""
    return rms_norm(x - x.mean(-1, keepdim=True))


NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}


def test_every_norm_has_its_function_and_its_formula_here():
    names = set(get_args(NormConfig.model_fields["function"].annotation))
    assert set(FUNCTIONS) == set(NORMS) == names


@pytest.mark.parametrize("function", NORMS)
def test_norms_compute_their_papers_formula_times_a_scale(function):
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64) + 1
    module = scaled(Norm(NormConfig(function=function, eps=EPS), WIDTH))
    assert_close(module(x), NORMS[function](x) * module.scale)


@pytest.mark.parametrize("function", NORMS)
def test_without_scale_a_norm_has_no_parameters_and_is_the_norm_with_a_scale_of_one(function):
    kind = functools.partial(NormConfig, function=function)
    x = torch.randn(2, 3, WIDTH)
    free, learned = Norm(kind(scale=False), WIDTH), Norm(kind(), WIDTH)
    assert not list(free.parameters())
    assert sum(p.numel() for p in learned.parameters()) == WIDTH
    assert_close(free(x), learned(x))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("function", NORMS)
def test_gradients_are_those_of_the_formula(function, scale):
    x = (torch.randn(2, 3, WIDTH, dtype=torch.float64) + 1).requires_grad_()
    module = Norm(NormConfig(function=function, eps=EPS, scale=scale), WIDTH).double()
    wanted = NORMS[function](x)
    if scale:
        wanted = wanted * scaled(module).scale
    inputs, gradient = [x, *module.parameters()], torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert_close(torch.autograd.grad(module(x), inputs, gradient), torch.autograd.grad(wanted, inputs, gradient))


@pytest.mark.parametrize("scale", [False, True])
def test_rms_norm_in_bfloat16_is_as_exact_as_torchs(scale):
    """Judge: the same numbers in float64; torch's own norm beside it."""
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    weight = (torch.rand(256) + 0.5).bfloat16().requires_grad_() if scale else None
    gradient, inputs = torch.randn(64, 256).bfloat16(), [x, *[weight] * scale]
    exact = [each.detach().double().requires_grad_() for each in inputs]

    def results(normed, inputs, gradient):
        return [normed, *torch.autograd.grad(normed, inputs, gradient)]

    right = results(rms_norm(exact[0]) * (exact[1] if scale else 1), exact, gradient.double())
    mine = results(module_rms_norm(x, weight, EPS), inputs, gradient)
    torchs = results(torch.nn.functional.rms_norm(x, (256,), weight, EPS), inputs, gradient)
    for ours, theirs, wanted in zip(mine, torchs, right, strict=True):
        assert ours.dtype == torch.bfloat16
        error, bound = ((each.double() - wanted).norm() / wanted.norm() for each in (ours, theirs))
        assert error < max(1.1 * bound, 2**-9)


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # arXiv 1706.02515, equation 14
GATED = {
    "swiglu": silu,
    "geglu": gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": lambda x: x * (x > 0),
    "glu": lambda x: 1 / (1 + (-x).exp()),
    "liglu": lambda x: x,
}
UNGATED = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: (x * (x > 0)) ** 2,
    "swish": silu,
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "selu": lambda x: SELU_SCALE * torch.where(x > 0, x, SELU_ALPHA * (x.exp() - 1)),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softplus": lambda x: (1 + x.exp()).log(),
}


def test_every_activation_has_its_formula_here():
    assert {*GATED, *UNGATED} == set(get_args(FeedForwardConfig.model_fields["activation"].annotation))


@pytest.mark.parametrize("activation", GATED)
def test_gated_networks_multiply_the_activated_gate_with_up(activation):
    """arXiv 2002.05202, equation 6: FFN(x) = (f(xW) ⊗ xV) W₂."""
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    module = FeedForward(FeedForwardConfig(activation=activation, d_ff=20), Widths(WIDTH, WIDTH), causal=False).double()
    gate, up, down = module.gate.weight.T, module.up.weight.T, module.down.weight.T
    assert_close(module(x), (GATED[activation](x @ gate) * (x @ up)) @ down)


@pytest.mark.parametrize("activation", UNGATED)
def test_the_others_have_two_matrices(activation):
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    module = FeedForward(FeedForwardConfig(activation=activation, d_ff=20), Widths(WIDTH, WIDTH), causal=False).double()
    assert_close(module(x), UNGATED[activation](x @ module.up.weight.T) @ module.down.weight.T)
    assert {name for name, _ in module.named_parameters()} == {"up.weight", "down.weight"}


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_biases_are_added_to_what_each_matrix_makes(activation):
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    config = FeedForwardConfig(activation=activation, d_ff=20, bias=True)
    module = FeedForward(config, Widths(WIDTH, WIDTH), causal=False).double()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    up = x @ module.up.weight.T + module.up.bias
    if activation == "swiglu":
        hidden = GATED[activation](x @ module.gate.weight.T + module.gate.bias) * up
    else:
        hidden = UNGATED[activation](up)
    assert_close(module(x), hidden @ module.down.weight.T + module.down.bias)


PLACES = {
    "pre": "norm f",
    "post": "f + norm",
    "sandwich": "norm f norm",
    "output": "f norm",
}


def test_parallel_parts_read_the_layers_input_and_are_added_together():
    model = build("redllm", "norm.placement=parallel", "attention.rope=none")
    block, x = model.decoder.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
    source = SourceInput(AttentionMask(), 4, torch.randn(2, 4, 32, dtype=torch.float64))
    inputs = block.prepare(ForwardContext(x, AttentionMask(causal=True), {"self": torch.arange(5)}, source), {})
    added = [block.part(name)(block.norm_before(name)(x), inputs[name]) for name in block.parts]
    assert len(added) == 3
    assert_close(block(x, inputs), x + sum(added))


@pytest.mark.parametrize("placement", PLACES)
def test_norms_stand_where_their_placement_says(placement):
    """One block of a model, its parts called one by one."""
    model = build("decllm", "decoder.layers=1", f"norm.placement={placement}", "attention.rope=none", double=True)
    block, x = model.decoder.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = block.prepare(ForwardContext(x, AttentionMask(causal=True), {"self": torch.arange(5)}), {})
    y = x
    for part in ("self_attention", "feed_forward"):
        own = getattr(block, part)
        inner = y
        added = None
        for step in PLACES[placement].split():
            if step == "f":
                inner = own(inner, inputs[part])
            elif step == "+":
                inner = y + inner
                added = True
            else:
                before = inner is y
                inner = getattr(block, f"{part}_norm" if before else f"{part}_post_norm")(inner)
        y = inner if added else y + inner
    assert_close(block(x, inputs), y)
    assert (model.decoder.norm is None) == (placement == "post")
