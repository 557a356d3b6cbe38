"""Windows, soft caps, T5's relative bias and merged attention, against masks and softmaxes written out."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5Attention

from lit_llm.components import masks
from lit_llm.components.attention.relative import alibi_slopes, bucket
from lit_llm.components.attention.resolve import resolve_attention
from lit_llm.components.layer_part import build_part
from lit_llm.components.masks import AttentionMask, MergedMask
from lit_llm.components.part import Widths
from lit_llm.components.rope import Frequencies, rotation_at
from tests.attending import dot_product, inputs_of

B, H, T, K = 2, 3, 9, 8
CPU = torch.device("cpu")


def near(behind, ahead, tokens=T):
    """T x T, entry by entry."""
    return torch.tensor([[q - k < behind and k - q < ahead for k in range(tokens)] for q in range(tokens)])


def by_the_book(q, k, v, seen, scale=None, cap=None, bias=0.0):
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if cap is None else cap * (scores / cap).tanh()
    return (scores + bias).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def tensors(tokens=T):
    return (torch.randn(B, H, tokens, K, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize(("behind", "ahead"), [(1, 1), (3, 3), (4, 2), (2, 5), (50, 50)])
def test_a_window_leaves_what_is_fewer_tokens_away(behind, ahead):
    q, k, v = tensors()
    for visible, mask in (
        (AttentionMask(), torch.ones(T, T, dtype=torch.bool)),
        (AttentionMask(causal=True), torch.ones(T, T).tril().bool()),
        (AttentionMask(causal=True, prefix=5), torch.ones(T, T).tril().bool() | (torch.arange(T) < 5)),
    ):
        out = dot_product(q, k, v, replace(visible, window=(behind, ahead)))
        assert_close(out, by_the_book(q, k, v, mask & near(behind, ahead)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("behind", "ahead"), [(17, 17), (30, 5), (5, 30), (2, 2), (1, 1)])
@pytest.mark.parametrize("tokens", [150, 128])
def test_a_long_row_is_cut_into_blocks_and_is_the_same(monkeypatch, causal, behind, ahead, tokens):
    """Values and gradients, with grouped heads; and no T x S mask is made."""
    visible = AttentionMask(causal=causal, window=(behind, ahead))
    q = torch.randn(B, 4, tokens, K, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, 2, tokens, K, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seen = near(behind, ahead, tokens) & (torch.ones(tokens, tokens).tril().bool() if causal else True)
    wanted = by_the_book(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), seen)
    monkeypatch.setattr(masks, "BAND", 4)
    monkeypatch.setattr(AttentionMask, "rows", None)
    out = dot_product(q, k, v, visible)
    assert_close(out, wanted)
    weights = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, wanted)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("cap", [None, 0.5, 30.0])
@pytest.mark.parametrize("scale", [None, 1.0, 0.1])
def test_scores_are_scaled_then_capped_then_biased(cap, scale):
    q, k, v = tensors()
    bias = torch.randn(H, T, T, dtype=torch.float64)
    causal = torch.ones(T, T).tril().bool()
    for visible, seen in ((AttentionMask(causal=True), causal), (AttentionMask(), torch.ones_like(causal))):
        out = dot_product(q, k, v, visible, bias, scale=scale, cap=cap)
        assert_close(out, by_the_book(q, k, v, seen, scale, cap, bias))
        assert_close(dot_product(q, k, v, visible, scale=scale, cap=cap), by_the_book(q, k, v, seen, scale, cap))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_documents_hold_under_caps_and_biases(cap):
    q, k, v = tensors(4)
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    of_keys = torch.tensor([[0, 0, 1, 1], [2, 1, 1, 1]])  # the second row's first query sees nothing
    bias = torch.randn(H, 4, 4, dtype=torch.float64)
    out = dot_product(q, k, v, AttentionMask(documents=(documents, of_keys)), bias, cap=cap)
    seen = (documents[:, :, None] == of_keys[:, None, :])[:, None]
    wanted = by_the_book(q, k, v, seen, cap=cap, bias=bias).nan_to_num(0.0)
    assert_close(out, wanted)
    assert (out[1, :, 0] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 64)])
def test_distances_fall_into_t5s_buckets(causal, buckets, distance):
    away = torch.arange(-300, 301)
    wanted = T5Attention._relative_position_bucket(away, not causal, buckets, distance)
    assert torch.equal(bucket(away, buckets, distance, causal), wanted)


@pytest.mark.parametrize("heads", [1, 3, 4, 8, 12, 16])
def test_alibis_slopes_are_those_of_bloom(heads):
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    assert_close(torch.tensor(alibi_slopes(heads)), _get_alibi_slopes(heads, CPU).float())


@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(causal=True), AttentionMask(causal=True, prefix=4)])
def test_alibi_takes_from_each_score_the_distance_times_the_heads_slope(mask):
    """arXiv 2108.12409, section 3; for keys ahead of the query by the same distance."""
    values = {"heads": 4, "head_dim": K, "rope": "none", "relative_bias": "alibi", "window": 6}
    module = build_part(resolve_attention(values, 24, "self"), Widths(24, 24), causal=mask.causal).double()
    x = torch.randn(B, T, 24, dtype=torch.float64)
    q, k, v = (module.heads(part, x, None) for part in "qkv")
    at = torch.arange(T, dtype=torch.float64)
    bias = -torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None, None] * (at[:, None] - at).abs()
    seen = mask.rows(0, T, T, CPU)
    seen = near(6, 6) & (True if seen is None else seen)
    wanted = module.out(by_the_book(q, k, v, seen, bias=bias).transpose(1, 2).flatten(2))
    assert_close(module(x, inputs_of(module, x, mask)), wanted)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 16), (8, 4), (8, 1)])
def test_a_distance_within_those_that_are_told_apart_exactly_is_refused(buckets, distance):
    values = {"heads": 2, "relative_bias": "shared", "relative_buckets": buckets, "relative_distance": distance}
    with pytest.raises(ValueError, match="relative_distance"):
        resolve_attention(values, 16, "self")
    assert resolve_attention({**values, "relative_distance": distance + buckets}, 16, "self")


@pytest.mark.parametrize("rope", ["continuous", "restart", "none"])
@pytest.mark.parametrize("window", [None, 3])
def test_merged_attention_is_one_softmax_over_target_and_source(rope, window):
    """T5Gemma 2 (arXiv 2512.14856): K = [X; H] W_k, V = [X; H] W_v, causal on X, full on H."""
    d, source = 24, 5
    values = {"heads": H, "qkv_norm": ("q", "k"), "rope": rope, "window": window, "norm_eps": 1e-6}
    module = build_part(resolve_attention(values, d, "merged"), Widths(d, d), causal=True).double()
    x, h = torch.randn(B, T, d, dtype=torch.float64), torch.randn(B, source, d, dtype=torch.float64)
    positions = {"continuous": torch.arange(T) + source, "source": torch.arange(source)}
    lengths = torch.tensor([5, 2])
    inputs = inputs_of(module, x, AttentionMask(causal=True), positions, h, AttentionMask(key_lengths=lengths))
    out = module(x, inputs)
    rows = torch.arange(T) + (source if rope == "continuous" else 0)
    rotation = None if rope == "none" else rotation_at(rows, Frequencies(10000.0, K), torch.float64)
    of_source = None
    if rope == "continuous":
        of_source = rotation_at(torch.arange(source), Frequencies(10000.0, K), torch.float64)
    q, k, v = module.heads("q", x, rotation), module.heads("k", x, rotation), module.heads("v", x, None)
    k = torch.cat([module.heads("k", h, of_source), k], dim=2)
    v = torch.cat([module.heads("v", h, None), v], dim=2)
    target = torch.ones(T, T).tril().bool() & (near(window, window) if window else True)
    real = (torch.arange(source) < lengths[:, None])[:, None, None, :].expand(B, 1, T, source)
    seen = torch.cat([real, target.expand(B, 1, T, T)], dim=-1)
    wanted = module.out(by_the_book(q, k, v, seen).transpose(1, 2).flatten(2))
    assert_close(out, wanted)


def test_a_single_query_of_even_rows_needs_no_mask():
    assert MergedMask(AttentionMask(), AttentionMask(), 4).rows(0, 1, 9, CPU) is None
