"""Liger's kernels by Triton's interpreter: values and gradients are those of formulas and of torch, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lit_llm.components import liger
from lit_llm.components.embedding.module import Head, Unembedding
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.liger import liger_kernels
from lit_llm.components.loss.module import Losses, LossWeights, Teacher, target_loss
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.norm.module import Norm, rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.rope import Frequencies, rotate, rotation_at

EPS = 0.3  # an eps that one would notice


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of `liger` that were called."""
    names: list[str] = []

    def spied(name: str, function: Callable) -> Callable:
        def spy(*arguments: object) -> object:
            names.append(name)
            return function(*arguments)

        return spy

    for name in ("rms_norm", "rotate", "gated", "target_loss"):
        monkeypatch.setattr(liger, name, spied(name, getattr(liger, name)))
    return names


def check(found: Tensor, wanted: Tensor, inputs: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Compare values, and gradients with random weights. exact: the inputs in float64, of which `wanted` is made."""
    assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(found) if found.dim() else torch.ones(())
    kept = gradient.clone()
    gradients = torch.autograd.grad(found, inputs, gradient)
    assert torch.equal(gradient, kept), "another branch may share it"
    for mine, right in zip(gradients, torch.autograd.grad(wanted, exact, gradient.double()), strict=True):
        assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(
    ("shape", "scaled"),
    [((2, 3, 12), False), ((2, 3, 12), True), ((1, 1, 1), True), ((3, 5, 2, 37), False), ((32_769, 4), True)],
    ids=str,
)
def test_rms_norm(shape: tuple[int, ...], scaled: bool, called: list[str]) -> None:
    """arXiv 1910.07467, equation 4. From 32,768 narrow rows on, as of many heads, Liger has another kernel."""
    x = (torch.randn(shape) + 1).requires_grad_()
    inputs = [x, *[(torch.rand(shape[-1]) + 0.5).requires_grad_()] * scaled]
    exact = doubled(*inputs)
    wanted = exact[0] / (exact[0].square().mean(-1, keepdim=True) + EPS).sqrt()
    with liger_kernels(True):
        found = rms_norm(x, inputs[1] if scaled else None, EPS)
        check(found, wanted * exact[1] if scaled else wanted, inputs, exact)
    assert called == ["rms_norm"]


def test_the_norm_of_transposed_memory(called: list[str]) -> None:
    x = torch.randn(2, 4, 3, 8, requires_grad=True)
    exact = doubled(x)
    wanted = F.rms_norm(exact[0].transpose(1, 2), (8,), None, EPS)
    with liger_kernels(True):
        check(rms_norm(x.transpose(1, 2), None, EPS), wanted, [x], exact)
        Norm(NormConfig(function="layer_norm"), 8)(x)
    assert called == ["rms_norm"], "LayerNorm stays torch's"


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("head_dim", [2, 6, 8])
@pytest.mark.parametrize("each_row", [False, True])
def test_rotations_are_products_with_complex_numbers(
    heads: int, head_dim: int, each_row: bool, called: list[str]
) -> None:
    """RoFormer, equation 34, with the pairs (i, i + K/2). each_row: positions of their own in every row."""
    x = torch.randn(3, 5, heads, head_dim, requires_grad=True)
    positions = torch.randint(0, 40, (3, 5)) if each_row else torch.arange(5) + 7
    exact = doubled(x)
    angles = positions.double()[..., None, None] * 100.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    turned = torch.complex(*exact[0].chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    kept = x.detach().clone()
    with liger_kernels(True):
        found = rotate(x, rotation_at(positions, Frequencies(100.0, head_dim), torch.float32))
        check(found, torch.cat([turned.real, turned.imag], -1), [x], exact)
    assert torch.equal(x, kept), "the input is as it was"
    assert called == ["rotate"]


def test_a_rotation_of_fewer_pairs_leaves_the_other_entries(called: list[str]) -> None:
    x = torch.randn(3, 5, 2, 12, requires_grad=True)
    exact = doubled(x)
    cos, sin = rotation_at(torch.arange(5), Frequencies(100.0, 8), torch.float64)
    first, second, rest = exact[0].split([4, 4, 4], dim=-1)
    with liger_kernels(True):
        found = rotate(x, (cos.float(), sin.float()))
        check(found, torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1), [x], exact)
    assert called == ["rotate"]


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "geglu", "reglu"])
def test_gated_networks(activation: str, called: list[str]) -> None:
    functions = {
        "swiglu": F.silu,
        "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "geglu": F.gelu,
        "reglu": F.relu,
    }
    module = FeedForward(FeedForwardConfig(activation=activation, d_ff=21), Widths(7, 7), causal=False)
    x = torch.randn(2, 3, 7, requires_grad=True)
    inputs = [x, module.gate.weight, module.up.weight, module.down.weight]
    exact = doubled(*inputs)
    wanted = (functions[activation](exact[0] @ exact[1].T) * (exact[0] @ exact[2].T)) @ exact[3].T
    with liger_kernels(True):
        check(module(x), wanted, inputs, exact)
    assert called == ["gated"] * (activation in liger.GATES)


COUNTED = [0, 2, 3, 4, 7, 9, 10]


def losses(
    given: Sequence[Tensor], weights: LossWeights, places: Sequence[int] = COUNTED, **unembedding: object
) -> Losses:
    hidden, matrix, targets = given
    with liger_kernels(True):
        return target_loss(hidden, Unembedding(matrix, **unembedding), (targets, torch.tensor(places).long()), weights)


def given(vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, matrix = torch.randn(3, 4, width), torch.randn(vocabulary, width)
    return hidden.requires_grad_(), matrix.requires_grad_(), torch.randint(vocabulary, (3, 4))


@pytest.mark.parametrize("squares", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("more", ["", "bias", "head"])
@pytest.mark.parametrize(("vocabulary", "width"), [(5, 6), (61, 6)], ids=["1 chunk", "many"])
def test_losses_and_their_gradients(
    vocabulary: int, width: int, squares: float, softcap: float | None, more: str, called: list[str]
) -> None:
    """Judge: torch's cross_entropy and logsumexp over the counted targets. The objective is scaled, as in a step."""
    hidden, matrix, targets = given(vocabulary, width)
    bias = torch.randn(vocabulary, requires_grad=True) if more == "bias" else None
    head = Head(NormConfig(), width) if more == "head" else None
    inputs = [hidden, matrix, *([] if bias is None else [bias]), *([] if head is None else head.parameters())]
    found = losses((hidden, matrix, targets), LossWeights(squares=squares), bias_V=bias, softcap=softcap, head=head)

    exact = doubled(*inputs)
    states = exact[0]
    if head is not None:
        parameters = dict(zip(dict(head.named_parameters()), exact[2:], strict=True))
        states = torch.func.functional_call(Head(NormConfig(), width), parameters, exact[0])
    logits = states @ exact[1].T + (0 if bias is None else exact[2])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nats, normalisers = by_torch(logits, targets)
    assert_close(found.nats.double(), nats, rtol=1e-5, atol=1e-5)
    assert_close(found.squares.double(), normalisers, rtol=1e-5, atol=1e-5)
    assert found.divergence == 0
    assert {part.dtype for part in found} == {torch.float32}
    check(found.objective * 0.37, (nats + squares * normalisers) * 0.37, inputs, exact)
    assert called.count("target_loss") == 1


def by_torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(nats, squared log-normalisers), sums over the counted targets."""
    counted = logits.flatten(0, 1)[COUNTED]
    nats = F.cross_entropy(counted, targets.flatten()[COUNTED], reduction="sum")
    return nats, counted.logsumexp(-1).square().sum()


def test_a_vocabulary_of_two_blocks() -> None:
    """The kernel passes over a row of more than 32,768 logits in parts."""
    hidden, matrix, targets = given(40_001, 3)
    exact = doubled(hidden, matrix)
    nats, normalisers = by_torch(exact[0] @ exact[1].T, targets)
    found = losses((hidden, matrix, targets), LossWeights(squares=0.1))
    check(found.objective, nats + 0.1 * normalisers, (hidden, matrix), exact)


def test_rows_that_do_not_count_cannot_influence() -> None:
    hidden, matrix, targets = given(61, 6)
    counted = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(COUNTED), True).view(3, 4)
    spoilt = hidden.detach().masked_fill(~counted[..., None], torch.nan).requires_grad_()
    found = losses((spoilt, matrix, targets), LossWeights(squares=0.1))
    assert torch.equal(torch.stack(found), torch.stack(losses((hidden, matrix, targets), LossWeights(squares=0.1))))
    to_hidden, to_matrix = torch.autograd.grad(found.objective, (spoilt, matrix))
    assert (to_hidden[~counted] == 0).all()
    assert to_matrix.isfinite().all()


def test_where_liger_has_no_answer_ours_is_taken(called: list[str]) -> None:
    """No target, states that need no gradient, and a teacher."""
    hidden, matrix, targets = given(61, 6)
    none = losses((hidden, matrix, targets), LossWeights(squares=0.1), places=[])
    assert tuple(none) == (0, 0, 0, 0)
    assert all((g == 0).all() for g in torch.autograd.grad(none.objective, (hidden, matrix)))

    whole = torch.autograd.grad(losses((hidden, matrix, targets), LossWeights()).objective, matrix)
    frozen = losses((hidden.detach(), matrix, targets), LossWeights())
    assert_close(torch.autograd.grad(frozen.objective, matrix), whole)

    teacher = Teacher(torch.randn(3, 4, 5), Unembedding(torch.randn(61, 5)), 2.0)
    arguments = hidden, Unembedding(matrix), (targets, torch.tensor(COUNTED)), LossWeights(0.7, 0.1, 0.3), teacher
    with liger_kernels(True):
        taught = target_loss(*arguments)
    assert torch.equal(torch.stack(taught), torch.stack(target_loss(*arguments)))
    assert taught.divergence > 0
    assert called == ["target_loss"], "but for the one that `frozen` is compared with"
