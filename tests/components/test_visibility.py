"""Masks and the call that applies them, against softmax written out over a dense mask."""

import pytest
import torch
from torch.testing import assert_close

from lit_llm.components.attention.visibility import DotProduct, Visibility, largest_logit

T = 7


def tensors(heads=4, kv_heads=4, queries=T, keys=T, batch=2):
    return [
        torch.randn(batch, n, length, 8, dtype=torch.float64)
        for n, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    ]


def dense(q, k, v, seen):
    """softmax(QKᵀ/√K)V with -inf where `seen` (B x T x S) is False, every key head repeated for its query heads."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


def seen_by_rule(prefixes, queries=T, keys=T):
    """The docstring's picture, one pair at a time: a query sees the past, and inside a prefix everything of it."""
    return torch.tensor(
        [[[s <= t or (s < p and t < p) for s in range(keys)] for t in range(queries)] for p in prefixes]
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("prefix", range(T + 1))
def test_a_prefix_in_two_calls_is_softmax_over_its_dense_mask(prefix, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads)
    out = DotProduct()(q, k, v, Visibility(causal=True, prefix=prefix))
    assert_close(out, dense(q, k, v, seen_by_rule([prefix] * 2)))


@pytest.mark.parametrize("prefixes", [[0, 0], [1, 5], [T, 3]])
def test_rows_may_have_prefixes_of_their_own(prefixes):
    q, k, v = tensors(kv_heads=2)
    out = DotProduct()(q, k, v, Visibility(causal=True, prefix=torch.tensor(prefixes)))
    assert_close(out, dense(q, k, v, seen_by_rule(prefixes)))


def test_keys_beyond_a_rows_length_are_not_read():
    """Whatever stands in the padding, even a value that would swamp the rest: it has no weight."""
    q, k, v = tensors(queries=3)
    lengths = torch.tensor([4, 7])
    out = DotProduct()(q, k, v, Visibility(key_lengths=lengths))
    seen = (torch.arange(T) < lengths[:, None])[:, None].expand(2, 3, T)
    assert_close(out, dense(q, k, v, seen))
    k[0, :, 4:], v[0, :, 4:] = 1e4, 1e9
    assert_close(DotProduct()(q, k, v, Visibility(key_lengths=lengths)), out, rtol=0, atol=0)


def test_without_a_mask_everything_is_seen():
    q, k, v = tensors(queries=3)
    assert Visibility().mask(3, T, q.device) is None
    assert_close(DotProduct()(q, k, v, Visibility()), dense(q, k, v, torch.ones(2, 3, T, dtype=torch.bool)))


@pytest.mark.parametrize("prefix", [None, *range(T + 1)])
def test_the_mask_is_the_picture(prefix):
    mask = Visibility(causal=True, prefix=prefix).mask(T, T, torch.device("cpu"))
    assert_close(mask, seen_by_rule([prefix or 0])[0])


@pytest.mark.parametrize(
    "visible",
    [
        Visibility(),
        Visibility(causal=True),
        Visibility(causal=True, prefix=3),
        Visibility(causal=True, prefix=torch.tensor([2, 5])),
        Visibility(key_lengths=torch.tensor([4, 6])),
    ],
)
def test_the_largest_logit_is_that_of_visible_pairs(visible):
    q, k, _ = tensors(kv_heads=2)
    q, k = q.float(), k.float()
    mask = visible.mask(T, T, q.device)
    seen = torch.ones(2, 1, T, T, dtype=torch.bool) if mask is None else mask.expand(2, 1, T, T)
    largest = max(
        abs(float(q[b, h, t] @ k[b, h // 2, s])) / 8**0.5
        for b in range(2)
        for h in range(4)
        for t in range(T)
        for s in range(T)
        if seen[b, 0, t, s]
    )
    assert_close(float(largest_logit(q, k, visible)), largest, rtol=1e-5, atol=0)


def test_a_huge_logit_behind_the_mask_does_not_count():
    q, k, _ = tensors()
    hidden = k.clone()
    hidden[:, :, -1] = 1e6
    causal = Visibility(causal=True)
    assert largest_logit(q[:, :, :-1], hidden[:, :, :-1], causal) == largest_logit(q[:, :, :-1], k[:, :, :-1], causal)
    assert largest_logit(q, hidden, Visibility(causal=True)) > 1e5, "the last query sees it"
    q[:, :, -1] = 0
    assert largest_logit(q, hidden, causal) == largest_logit(q, k, causal), "nobody else does"
