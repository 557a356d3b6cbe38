"""flash-linear-attention's kernels by Triton's interpreter compute the recurrences of our mixers, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.masks import AttentionMask
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.fla import borders_of, fused_chunkwise
from tests.recurrent_mixers import MIXERS, D, by_recurrence, mixer_of, whole, whole_by_fla
from tests.training.test_fla_choice import stepped, uneven_batch

B, T = 2, 70
"""More tokens than a chunk of the kernels."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def streams_of(kind: str, sizes: tuple[int, int]) -> Streams:
    """Random streams whose heads share memory as those of the mixers. sizes: of keys, of values."""
    keys, values = sizes
    heads, of_keys = ((2, 2), (2, 1)) if kind == "in groups" else ((2,), (2,))
    q, k = torch.randn(2, B, *of_keys, T, keys)
    entries = keys if kind == "by entry" else 1
    gates = F.logsigmoid(torch.randn(B, *heads, T, entries))
    betas = torch.rand(B, *heads, T, 1) if kind == "delta" else None
    return Streams(q, F.normalize(k, dim=-1) if kind == "delta" else k, torch.randn(B, *heads, T, values), gates, betas)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("scalar", (16, 18)), ("in groups", (16, 16)), ("by entry", (16, 18)), ("delta", (16, 18)), ("delta", (66, 80))],
)
def test_outputs_and_gradients_are_those_of_the_recurrence(kind: str, sizes: tuple[int, int], documents: bool) -> None:
    """Documents of one token, of one chunk and more."""
    borders = (0, 1, 4, 69) if documents else ()
    runs_BT = torch.tensor([sum(t >= border for border in borders) for t in range(T)]).expand(B, T)
    streams = streams_of(kind, sizes)
    inputs = [x.requires_grad_() for x in streams if x is not None]
    found = fused_chunkwise(streams, borders_of(runs_BT if documents else None, both_ways=False).forwards)
    wanted, _ = by_recurrence(streams, borders)
    assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    weight = torch.randn(wanted.shape)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    for mine, right in zip(gradients, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        assert_close(mine, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixers_output_and_gradients_are_those_of_chunks_in_float64(name: str, causal: bool) -> None:
    """Two documents in each row, and in an encoder padding behind the second row."""
    if name == "retention" and not causal:
        return
    module = mixer_of(name, torch.float32, causal=causal, head_dim=16, value_dim=18)
    exact = mixer_of(name, causal=causal, head_dim=16, value_dim=18)
    exact.load_state_dict({key: value.double() for key, value in module.state_dict().items()})
    documents = torch.tensor([[0] * 5 + [1] * 17, [3] * 16 + [4] * 6])
    lengths = None if causal else torch.tensor([22, 19])
    mask = AttentionMask(causal=causal, documents=(documents, documents), key_lengths=lengths)
    x, weight = torch.randn(B, 22, D), torch.randn(B, 22, D)
    if not causal:
        weight[1, 19:] = 0
    found, wanted = whole_by_fla(module, x, mask), whole(exact, x.double(), mask)
    assert_close(found * weight, (wanted * weight).float(), rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad((found * weight).sum(), list(module.parameters()))
    expected = torch.autograd.grad((wanted * weight).sum(), list(exact.parameters()))
    for mine, right in zip(gradients, expected, strict=True):
        assert (mine - right).norm() < 1e-4 * right.norm()


def test_a_training_step_by_the_kernels_is_the_step_by_chunks() -> None:
    """With layers computed again in the backward pass, in micro-batches of uneven rows."""
    found, wanted = (
        stepped(uneven_batch("decoder", True), kernels=kernels, activation_checkpointing=True, micro_batch_size=3)[1]
        for kernels in ("fla", "auto")
    )
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted), "equal bits: nothing was replaced"
