"""Gated linear attention against the paper's recurrence, from the weights."""

import pytest
import torch
from torch.testing import assert_close

from tests.recurrent_mixers import HEADS, D, K, V, mixer_of, weights, whole


def plain(module, x, tau=16.0, eps=1e-5):
    """The formulas of config.py's docstring, token by token."""
    q, k, v, gate, out = (getattr(module, name).weight.T for name in ("q", "k", "v", "output_gate", "out"))
    down, up, bias = weights(module, *(f"directions.0.{name}" for name in ("down.weight", "up.weight", "up.bias")))
    alpha = torch.sigmoid(x @ down.T @ up.T + bias) ** (1 / tau)
    q, k, v, alpha = (part.unflatten(-1, (HEADS, -1)) for part in (x @ q, x @ k, x @ v, alpha))
    state, outs = torch.zeros(len(x), HEADS, K, V, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] / K**0.5 * state).sum(-2))
    heads = torch.stack(outs, dim=1)
    normed = module.head_scale * heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt()
    return (x @ gate * torch.sigmoid(x @ gate) * normed.flatten(2)) @ out


@pytest.mark.parametrize(("tau", "eps"), [(16.0, 1e-5), (1.0, 0.5)])
@pytest.mark.parametrize("chunk", [4, 16])
def test_the_module_is_its_formula(chunk, tau, eps):
    module = mixer_of("gla", chunk=chunk, gate_temperature=tau, norm_eps=eps)
    x = torch.randn(2, 13, D, dtype=torch.float64)
    assert_close(whole(module, x), plain(module, x, tau, eps))
