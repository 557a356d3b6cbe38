"""Gated retention against its formula; what holds for every mixer with a state is in test_recurrent_mixers.py."""

import pytest
import torch
from torch.testing import assert_close

from lit_llm.components.recurrence.module import RecurrentInputs
from lit_llm.components.retention.config import RetentionConfig
from lit_llm.components.rope import Frequencies, rotate, rotation_at
from tests.recurrent_mixers import HEADS, D, K, mixer_of, resolved, whole

B, T = 2, 13


def x_of():
    return torch.randn(B, T, D, dtype=torch.float64)


def rotation(positions, dtype=torch.float64):
    return rotation_at(positions, Frequencies(10000.0, K), dtype)


def plain(module, x, tau=16.0, eps=1e-5):
    """The formulas of config.py's docstring, from the weights."""
    q, k, v, decay, gate, out = (
        getattr(module, name).weight.T for name in ("q", "k", "v", "decay", "output_gate", "out")
    )
    turn = rotation(torch.arange(x.shape[1]))
    q, k, v = ((x @ w).unflatten(-1, (HEADS, -1)) for w in (q, k, v))
    q, k = rotate(q, turn), rotate(k, turn) / K**0.5
    gamma = torch.sigmoid(x @ decay) ** (1 / tau)
    state, outs = torch.zeros(len(x), HEADS, K, v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = gamma[:, t, :, None, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    heads = torch.stack(outs, dim=1)
    normed = heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt()
    swish = x @ gate * torch.sigmoid(x @ gate)
    return swish * normed.flatten(2) @ out


@pytest.mark.parametrize(("tau", "eps"), [(16.0, 1e-5), (1.0, 1e-5), (16.0, 0.5)])
@pytest.mark.parametrize("chunk", [4, 256])
def test_the_module_is_its_formula(chunk, tau, eps):
    module, x = mixer_of("retention", chunk=chunk, gate_temperature=tau, norm_eps=eps), x_of()
    assert_close(whole(module, x), plain(module, x, tau, eps))


def test_the_defaults_are_those_of_the_authors_code():
    config = RetentionConfig(heads=8)
    assert (config.gate_temperature, config.norm_eps, config.chunk, config.rope_theta) == (16.0, 1e-5, 256, 10000.0)


def test_head_dims_that_cannot_be_rotated_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="head_dim 5 must be even"):
        resolved("retention", {"heads": 4})


def test_retention_knows_distances_and_no_absolute_place():
    module, x = mixer_of("retention"), x_of()
    here, there, reversed_ = (
        module(x, RecurrentInputs(rotation(positions), None, None))
        for positions in (torch.arange(T), torch.arange(T) + 50, torch.arange(T).flip(0))
    )
    assert_close(there, here, rtol=1e-4, atol=1e-5)  # angles are float32
    assert (reversed_ - here).abs().max() > 1e-2
