"""Gated DeltaNet against the paper's recurrence, and against the layer and function of transformers.

transformers' function is unwrapped: where triton and fla-core are installed it would call kernels, which need a GPU.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.recurrence.chunks import Streams, chunkwise
from tests.recurrent_mixers import HEADS, D, K, V, mixer_of, weights, whole

B, T = 2, 13


def convolved(x, weight):
    """Σ_i w_i x_{t-i} of each channel, then swish."""
    width = weight.shape[1]
    rows = [
        sum(weight[:, width - 1 - ago] * x[:, t - ago] for ago in range(min(width, t + 1))) for t in range(x.shape[1])
    ]
    mixed = torch.stack(rows, dim=1)
    return mixed * torch.sigmoid(mixed)


def plain(module, x):
    """The formulas of config.py's docstring, token by token, with S as the paper's transposed."""
    q, k, v, decay, beta, gate, out = (
        getattr(module, name).weight.T for name in ("q", "k", "v", "decay", "beta", "output_gate", "out")
    )
    names = ("convolution.weight", "steps.a_log", "steps.dt_bias")
    filters, a, b = weights(module, *(f"directions.0.{name}" for name in names))
    mixed = convolved(torch.cat([x @ q, x @ k, x @ v], dim=-1), filters)
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in mixed.split([HEADS * K, HEADS * K, HEADS * V], dim=-1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    alpha, beta = torch.exp(-a.exp() * F.softplus(x @ decay + b)), torch.sigmoid(x @ beta)
    state, outs = torch.zeros(len(x), HEADS, K, V, dtype=x.dtype), []
    for t in range(x.shape[1]):
        rate, key = beta[:, t, :, None, None], k[:, t, :, :, None]
        erased = torch.eye(K, dtype=x.dtype) - rate * key @ key.transpose(-1, -2)
        state = alpha[:, t, :, None, None] * erased @ state + rate * key * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] / K**0.5 * state).sum(-2))
    heads = torch.stack(outs, dim=1)
    normed = module.head_scale * heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (x @ gate * torch.sigmoid(x @ gate) * normed.flatten(2)) @ out


@pytest.mark.parametrize("conv", [1, 3])
@pytest.mark.parametrize("chunk", [4, 64])
def test_the_module_is_its_formula(chunk, conv):
    module, x = mixer_of("gated_deltanet", chunk=chunk, conv=conv), torch.randn(B, T, D, dtype=torch.float64)
    assert_close(whole(module, x), plain(module, x))


def test_chunks_are_those_of_transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k = torch.randn(2, B, 50, HEADS, K)
    v, beta, g = torch.randn(B, 50, HEADS, V), torch.rand(B, 50, HEADS), F.logsigmoid(torch.randn(B, 50, HEADS))
    k = F.normalize(k, dim=-1)
    by_torch = inspect.unwrap(torch_chunk_gated_delta_rule)
    wanted, last = by_torch(q, k, v, g, beta, chunk_size=16, output_final_state=True)
    by_head = (x.transpose(1, 2) for x in (q / K**0.5, k, v, g[..., None], beta[..., None]))
    out, state = chunkwise(Streams(*by_head), 8, keep_state=True)
    assert_close(out.transpose(1, 2), wanted, rtol=1e-4, atol=1e-5)
    assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_the_module_is_the_layer_of_transformers_with_the_same_weights(monkeypatch):
    """OLMo Hybrid's, which has a matrix for each of queries, keys, values and gates."""
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as peers
    from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig

    rule = "torch_chunk_gated_delta_rule"
    monkeypatch.setattr(peers, rule, inspect.unwrap(getattr(peers, rule)))
    config = OlmoHybridConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=3,
        linear_allow_neg_eigval=False,
    )
    peer, module = peers.OlmoHybridGatedDeltaNet(config, 0), mixer_of("gated_deltanet", torch.float32)
    taken = {"q": "q", "k": "k", "v": "v", "decay": "a", "beta": "b", "output_gate": "g", "out": "o"}
    with torch.no_grad():
        for ours, theirs in taken.items():
            getattr(peer, f"{theirs}_proj").weight.copy_(getattr(module, ours).weight)
        direction = module.directions[0]
        peer.conv1d.weight.copy_(direction.convolution.weight[:, None])
        peer.A_log.copy_(direction.steps.a_log)
        peer.dt_bias.copy_(direction.steps.dt_bias)
        peer.o_norm.weight.copy_(module.head_scale)
        x = torch.randn(B, T, D)
        assert_close(whole(module, x), peer(x), rtol=1e-4, atol=1e-5)
