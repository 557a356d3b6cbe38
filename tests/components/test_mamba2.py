"""Mamba-2 against the paper's recurrence, and against the layer of transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.recurrent_mixers import D, K, mixer_of, weights, whole

B, T = 2, 13


def plain(module, x, heads, groups):
    """h_t = exp(A Δ) h + Δ B x, y = C h + D x for each head, then the norm of the gated output."""
    names = ("convolution.weight", "convolution.bias", "steps.a_log", "steps.dt_bias", "d")
    filters, bias, a, b, skip = weights(module, *(f"directions.0.{name}" for name in names))
    joined = torch.cat([getattr(module, name)(x) for name in ("q", "k", "v")], dim=-1).transpose(1, 2)
    width = filters.shape[1]
    mixed = F.conv1d(F.pad(joined, (width - 1, 0)), filters[:, None], bias, groups=len(filters)).transpose(1, 2)
    mixed = mixed * torch.sigmoid(mixed)
    c, k, v = mixed.split([groups * K, groups * K, module.v.weight.shape[0]], dim=-1)
    c, k = (part.unflatten(-1, (groups, K)).repeat_interleave(heads // groups, dim=2) for part in (c, k))
    v, steps = v.unflatten(-1, (heads, -1)), F.softplus(module.decay(x) + b)
    state, outs = torch.zeros(len(x), heads, K, v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        step = steps[:, t, :, None, None]
        state = torch.exp(-a.exp()[:, None, None] * step) * state + step * k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((c[:, t, :, :, None] * state).sum(-2) + skip[:, None] * v[:, t])
    gate = module.output_gate(x)
    gated = (torch.stack(outs, dim=1).flatten(2) * gate * torch.sigmoid(gate)).unflatten(-1, (groups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return module.out(module.head_scale * normed.flatten(2))


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (6, 3)])
@pytest.mark.parametrize("chunk", [4, 64])
def test_the_module_is_its_formula(chunk, heads, groups):
    module = mixer_of("mamba2", chunk=chunk, heads=heads, groups=groups)
    x = torch.randn(B, T, D, dtype=torch.float64)
    assert_close(whole(module, x), plain(module, x, heads, groups))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_module_is_the_layer_of_transformers_with_the_same_weights(groups):
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    heads, value_dim = 4, 10  # its values have twice the width of the residual stream
    config = Mamba2Config(
        hidden_size=D,
        num_heads=heads,
        head_dim=value_dim,
        state_size=K,
        n_groups=groups,
        chunk_size=8,
        num_hidden_layers=1,
    )
    peer = Mamba2Mixer(config, 0)
    module = mixer_of("mamba2", torch.float32, heads=heads, value_dim=value_dim, groups=groups)
    direction, value_width, keys = module.directions[0], heads * value_dim, groups * K
    with torch.no_grad():
        # The order is gate, x, B, C, Δ there; here C, B, x.
        rows = [module.output_gate.weight, module.v.weight, module.k.weight, module.q.weight, module.decay.weight]
        peer.in_proj.weight.copy_(torch.cat(rows))
        filters, bias = direction.convolution.weight, direction.convolution.bias
        for ours, theirs in ((filters[:, None], peer.conv1d.weight), (bias, peer.conv1d.bias)):
            c, b, x = ours.split([keys, keys, value_width])
            theirs.copy_(torch.cat([x, b, c]))
        peer.A_log.copy_(direction.steps.a_log)
        peer.dt_bias.copy_(direction.steps.dt_bias)
        peer.D.copy_(direction.d)
        peer.norm.weight.copy_(module.head_scale)
        peer.out_proj.weight.copy_(module.out.weight)
        x = torch.randn(B, T, D)
        assert_close(whole(module, x), peer.eval()(x), rtol=1e-4, atol=1e-5)
