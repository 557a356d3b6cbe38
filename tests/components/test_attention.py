"""The attention module against its formula written out: where each norm stands, what cross-attention knows."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_llm.components.attention.dot_product import largest_logit
from lit_llm.components.attention.resolve import resolve_attention
from lit_llm.components.layer_part import build_part
from lit_llm.components.masks import AttentionMask
from lit_llm.components.part import Widths
from tests.attending import inputs_of, largest

D, HEADS, K, B, T, S = 20, 4, 6, 2, 5, 7  # so that the widths D, K and HEADS x K are three
FULL, CAUSAL = AttentionMask(), AttentionMask(causal=True)


def attention(place="cross", **values):
    config = resolve_attention({"heads": HEADS, "head_dim": K, "rope": "none", **values}, D, place)
    module = build_part(config, Widths(D, D), causal=True).double()
    for name, parameter in module.named_parameters():
        if "scale" in name:  # ones would hide a scale that is not applied
            nn.init.uniform_(parameter, 0.5, 2)
    return module


def x_and_memory():
    return torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, S, D, dtype=torch.float64)


def over(module, x, memory, **positions):
    """The module's output for x, of which each token sees all of the memory."""
    return module(x, inputs_of(module, x, CAUSAL, positions, memory))


def over_itself(module, x, mask):
    return module(x, inputs_of(module, x, mask))


def rms(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def split(x):
    return x.unflatten(-1, (-1, K)).transpose(1, 2)


def heads_output(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / K**0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def joined(heads_BHTK):
    return heads_BHTK.transpose(1, 2).flatten(2)


def plain(module, x, memory, norms=""):
    """Each head's softmax(QKᵀ/√K)V, with rms() around those of q, k, v that `norms` names."""
    q, k, v = split(x @ module.q.weight.T), split(memory @ module.k.weight.T), split(memory @ module.v.weight.T)
    return heads_output(rms(q) if "q" in norms else q, rms(k) if "k" in norms else k, rms(v) if "v" in norms else v)


@pytest.mark.parametrize("norms", ["", "q", "k", "v", "qk", "qkv"])
def test_each_of_q_k_and_v_is_normalised_where_named_and_nowhere_else(norms):
    """Equation 1 of arXiv 2510.26622: LN over the K entries of each head, without parameters."""
    module, (x, memory) = attention(qkv_norm=list(norms)), x_and_memory()
    assert_close(over(module, x, memory), joined(plain(module, x, memory, norms)) @ module.out.weight.T)
    assert {name for name, _ in module.named_parameters()} == {"q.weight", "k.weight", "v.weight", "out.weight"}


def test_head_norm_is_over_each_heads_entries_before_the_output_matrix():
    """Equation 2, read literally: Attn_Red = LN(Attn_Dec), with Attn_Dec of one head."""
    module, (x, memory) = attention(output_norm="head"), x_and_memory()
    assert_close(over(module, x, memory), joined(rms(plain(module, x, memory))) @ module.out.weight.T)


def test_concat_norm_is_over_all_heads_before_the_output_matrix():
    module, (x, memory) = attention(output_norm="concat"), x_and_memory()
    assert_close(over(module, x, memory), rms(joined(plain(module, x, memory))) @ module.out.weight.T)


def test_after_out_norm_is_behind_the_output_matrix():
    module, (x, memory) = attention(output_norm="after_out"), x_and_memory()
    assert_close(over(module, x, memory), rms(joined(plain(module, x, memory)) @ module.out.weight.T))


def test_scales_are_learned_per_part_and_multiply_after_the_norm():
    module, (x, memory) = attention(qkv_norm=["q", "v"], qkv_norm_scale=True), x_and_memory()
    q, k, v = split(x @ module.q.weight.T), split(memory @ module.k.weight.T), split(memory @ module.v.weight.T)
    out = heads_output(rms(q) * module.qkv_scale["q"], k, rms(v) * module.qkv_scale["v"])
    assert_close(over(module, x, memory), joined(out) @ module.out.weight.T)
    assert set(module.qkv_scale) == {"q", "v"}


@pytest.mark.parametrize("scaled", [False, True])
def test_queries_and_keys_may_be_normalised_over_all_heads_together(scaled):
    """OLMo 2, arXiv 2501.00656; of fewer key heads over those."""
    keys = {"qkv_norm": ["q", "k"], "qkv_norm_over": "concat", "qkv_norm_scale": scaled, "kv_heads": 2}
    module, (x, memory) = attention(**keys), x_and_memory()
    scales = {"q": module.qkv_scale["q"], "k": module.qkv_scale["k"]} if scaled else {"q": 1.0, "k": 1.0}
    q, k = split(rms(x @ module.q.weight.T) * scales["q"]), split(rms(memory @ module.k.weight.T) * scales["k"])
    k, v = (heads.repeat_interleave(HEADS // 2, 1) for heads in (k, split(memory @ module.v.weight.T)))
    assert_close(over(module, x, memory), joined(heads_output(q, k, v)) @ module.out.weight.T)


@pytest.mark.parametrize(("place", "width"), [("head", K), ("concat", HEADS * K), ("after_out", D)])
def test_the_output_scale_has_the_width_of_its_place(place, width):
    module, (x, memory) = attention(output_norm=place, output_norm_scale=True), x_and_memory()
    assert module.output_scale.shape == (width,)
    heads, scale, matrix = plain(module, x, memory), module.output_scale, module.out.weight.T
    wanted = {
        "head": lambda: joined(rms(heads) * scale) @ matrix,
        "concat": lambda: (rms(joined(heads)) * scale) @ matrix,
        "after_out": lambda: rms(joined(heads) @ matrix) * scale,
    }
    assert_close(over(module, x, memory), wanted[place]())


@pytest.mark.parametrize("scaled", [False, True])
def test_the_norms_of_an_attention_may_be_layer_norms(scaled):
    """Judge: torch's function over a head's entries."""
    keys = {"qkv_norm": ["q", "k"], "output_norm": "head", "qkv_norm_scale": scaled, "output_norm_scale": scaled}
    module, (x, memory) = attention(**keys, norm_function="layer_norm", norm_eps=1e-3), x_and_memory()

    def norm(y, scale):
        return nn.functional.layer_norm(y, (K,), scale, eps=1e-3)

    q, k, v = split(x @ module.q.weight.T), split(memory @ module.k.weight.T), split(memory @ module.v.weight.T)
    q, k = (norm(y, module.qkv_scale[part] if scaled else None) for part, y in (("q", q), ("k", k)))
    heads = norm(heads_output(q, k, v), module.output_scale)
    assert_close(over(module, x, memory), joined(heads) @ module.out.weight.T)


@pytest.mark.parametrize("norm", ["none", "head", "concat", "after_out"])
@pytest.mark.parametrize(("gate", "width"), [("per_head", HEADS), ("per_element", HEADS * K)])
def test_a_gate_of_the_query_tokens_multiplies_what_the_output_matrix_reads(gate, width, norm):
    """Y ⊙ σ(X W_g) of arXiv 2505.06708, equation 5, at position G1: after the weighted sum, before W_o."""
    module, (x, memory) = attention(gate=gate, output_norm=norm), x_and_memory()
    assert module.gate.weight.shape == (width, D)
    heads = plain(module, x, memory)
    normed = {"head": lambda: joined(rms(heads)), "concat": lambda: rms(joined(heads))}.get(norm, lambda: joined(heads))
    factors = 1 / (1 + (-(x @ module.gate.weight.T)).exp())
    gated = normed() * factors.repeat_interleave(HEADS * K // width, -1)
    out = gated @ module.out.weight.T
    assert_close(over(module, x, memory), rms(out) if norm == "after_out" else out)


def test_norm_eps_stands_under_the_root():
    module, (x, memory) = attention(output_norm="after_out", norm_eps=0.5), x_and_memory()
    assert_close(over(module, x, memory), rms(joined(plain(module, x, memory)) @ module.out.weight.T, eps=0.5))


def scores_of(module, x, visible=FULL):
    """The largest |logit| that the module computes over x itself."""
    seen = []
    module.dot_product.register_forward_pre_hook(
        lambda own, args: seen.append(largest_logit(own, args[0], args[1], args[3]))
    )
    with torch.no_grad():
        over_itself(module, x, visible)
    return float(seen[0])


def test_norms_on_queries_and_keys_bound_the_logits_by_the_root_of_head_dim():
    """|q| = |k| = √K, so |q·k|/√K <= √K (Cauchy-Schwarz), however large the weights have grown."""
    bounded, free, (x, _) = attention("self", qkv_norm=["q", "k"]), attention("self"), x_and_memory()
    free.load_state_dict(bounded.state_dict())
    for module in (bounded, free):
        module.q.weight.data *= 100
        module.k.weight.data *= 100
    assert scores_of(bounded, x) <= K**0.5 * (1 + 1e-6)
    assert scores_of(free, x) > 10 * K**0.5


def test_the_bound_is_reached_where_query_and_key_are_parallel():
    module, (x, _) = attention("self", qkv_norm=["q", "k"], norm_eps=1e-12), x_and_memory()
    module.k.weight = module.q.weight
    assert_close(scores_of(module, x, CAUSAL), K**0.5, rtol=1e-6, atol=0)


def test_a_norm_on_one_side_alone_bounds_nothing():
    module, (x, _) = attention("self", qkv_norm=["q", "v"]), x_and_memory()
    module.k.weight.data *= 100
    assert scores_of(module, x) > 10 * K**0.5


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("visible", [FULL, CAUSAL, AttentionMask(causal=True, prefix=3)])
def test_grouped_queries_are_repeated_key_and_value_heads(kv_heads, visible):
    """arXiv 2305.13245: each key head serves heads / kv_heads query heads that stand together."""
    grouped, (x, _) = attention("self", kv_heads=kv_heads, qkv_norm=["q", "k", "v"]), x_and_memory()
    repeated = attention("self", qkv_norm=["q", "k", "v"])
    state = grouped.state_dict()
    for part in "kv":
        heads_HKD = state[f"{part}.weight"].unflatten(0, (kv_heads, K))
        state[f"{part}.weight"] = heads_HKD.repeat_interleave(HEADS // kv_heads, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    assert_close(over_itself(grouped, x, visible), over_itself(repeated, x, visible))


def test_head_dim_may_differ_from_the_share_of_d_model():
    own, share = attention(head_dim=10), attention(head_dim=None)
    assert own.q.weight.shape == (HEADS * 10, D) == own.out.weight.T.shape
    assert share.q.weight.shape == (D, D), "d_model / heads where it is not given"
    x, memory = x_and_memory()
    assert over(own, x, memory).shape == over(share, x, memory).shape == (B, T, D)


def cross(module, x, memory, query_start, key_start):
    query, key = torch.arange(query_start, query_start + T), torch.arange(key_start, key_start + S)
    return over(module, x, memory, continuous=query, source=key)


def test_cross_attention_knows_distances_and_no_absolute_place():
    """Continuous positions S + t and s: both moved by a constant, the same output; one moved alone, another."""
    module, (x, memory) = attention(rope="continuous"), x_and_memory()
    module.q.weight.data *= 5
    here = cross(module, x, memory, S, 0)
    assert_close(cross(module, x, memory, S + 50, 50), here, rtol=1e-4, atol=1e-5)  # angles are float32
    assert (cross(module, x, memory, S + 50, 0) - here).abs().max() > 1e-2


def test_without_rotation_cross_attention_reads_a_set():
    """T5Gemma's choice: the order of the source reaches the decoder through the encoder only."""
    (x, memory), order = x_and_memory(), torch.randperm(S)
    assert not torch.equal(order, torch.arange(S))
    module = attention()
    assert_close(over(module, x, memory[:, order]), over(module, x, memory))
    module = attention(rope="continuous")
    rotated = [cross(module, x, source, S, 0) for source in (memory, memory[:, order])]
    assert (rotated[0] - rotated[1]).abs().max() > 1e-2


def test_values_are_never_rotated():
    """With one key its weight is 1 whatever the scores are, so the output is the value's, at any position."""
    module, (x, memory) = attention(rope="continuous"), x_and_memory()
    one = memory[:, :1]
    out = over(module, x, one, continuous=torch.arange(T), source=torch.tensor([9]))
    assert_close(out, (one @ module.v.weight.T @ module.out.weight.T).expand(B, T, D))


@pytest.mark.parametrize("scores", [1, 50, 1 << 22])
@pytest.mark.parametrize("biased", [False, True])
def test_the_largest_logit_is_that_of_all_scores_and_few_of_them_exist_at_a_time(scores, biased, monkeypatch):
    """At 8,192 tokens and 32 heads all scores of two sequences are 17 GB; each part of them has `scores` or one row."""
    monkeypatch.setattr("lit_llm.components.attention.dot_product.SCORES", scores)
    module, (x, _) = attention("self", kv_heads=2), x_and_memory()
    q, k = module.heads("q", x, None), module.heads("k", x, None)
    bias = torch.randn(HEADS, T, T, dtype=torch.float64) if biased else None
    whole = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / K**0.5 + (bias if biased else 0)
    expected = whole.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), 0).abs().max()
    made, plain_scores = [], module.dot_product.scores

    def counted(*inputs):
        made.append(plain_scores(*inputs))
        return made[-1]

    module.dot_product.scores = counted
    assert_close(largest(module.dot_product, q, k, AttentionMask(causal=True), bias), expected)
    assert max(part.numel() for part in made) <= max(scores, B * HEADS * T)
