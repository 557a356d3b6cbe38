"""Masks and the call that applies them, against softmax written out over a dense mask."""

import pytest
import torch
from torch.testing import assert_close

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.masks import AttentionMask
from tests.attending import dot_product
from tests.attending import largest as largest_score

T = 7
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 2]])


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
    out = dot_product(q, k, v, AttentionMask(causal=True, prefix=prefix))
    assert_close(out, dense(q, k, v, seen_by_rule([prefix] * 2)))


@pytest.mark.parametrize("prefixes", [[0, 0], [1, 5], [T, 3]])
def test_rows_may_have_prefixes_of_their_own(prefixes):
    q, k, v = tensors(kv_heads=2)
    out = dot_product(q, k, v, AttentionMask(causal=True, prefix=torch.tensor(prefixes)))
    assert_close(out, dense(q, k, v, seen_by_rule(prefixes)))


def test_keys_beyond_a_rows_length_are_not_read():
    """Whatever stands in the padding, even a value that would swamp the rest: it has no weight."""
    q, k, v = tensors(queries=3)
    lengths = torch.tensor([4, 7])
    out = dot_product(q, k, v, AttentionMask(key_lengths=lengths))
    seen = (torch.arange(T) < lengths[:, None])[:, None].expand(2, 3, T)
    assert_close(out, dense(q, k, v, seen))
    k[0, :, 4:], v[0, :, 4:] = 1e4, 1e9
    assert_close(dot_product(q, k, v, AttentionMask(key_lengths=lengths)), out, rtol=0, atol=0)


def test_without_a_mask_everything_is_seen():
    q, k, v = tensors(queries=3)
    assert AttentionMask().rows(0, 3, T, q.device) is None
    assert_close(dot_product(q, k, v, AttentionMask()), dense(q, k, v, torch.ones(2, 3, T, dtype=torch.bool)))


def same_document(of_queries, of_keys):
    return torch.tensor(
        [[[s == t for s in keys] for t in queries] for queries, keys in zip(of_queries, of_keys, strict=True)]
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("prefix", [None, 1, 3, 6, T, torch.tensor([2, 5])])
def test_documents_cut_every_causal_mask_at_their_borders(prefix, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads)
    out = dot_product(q, k, v, AttentionMask(causal=True, prefix=prefix, documents=(DOCUMENTS, DOCUMENTS)))
    prefixes = prefix.tolist() if isinstance(prefix, torch.Tensor) else [prefix or 0] * 2
    assert_close(out, dense(q, k, v, seen_by_rule(prefixes) & same_document(DOCUMENTS.tolist(), DOCUMENTS.tolist())))


def test_documents_cut_a_full_mask_and_padding_stays_unread():
    q, k, v = tensors()
    lengths = torch.tensor([6, 5])  # of each document something is left
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]])
    out = dot_product(q, k, v, AttentionMask(key_lengths=lengths, documents=(documents, documents)))
    real = (torch.arange(T) < lengths[:, None])[:, None]
    assert_close(out, dense(q, k, v, same_document(documents.tolist(), documents.tolist()) & real))


def written_out(q, k, v, attn_mask, dropout_p, scale, enable_gqa):
    """What a kernel may do that knows of no special case: NaN for a query without any key."""
    assert not enable_gqa
    assert scale is None
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("kernel", [None, written_out])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_whose_document_has_no_key_gets_zero_and_gives_no_gradient(monkeypatch, kernel, dtype):
    """Whatever the kernel makes of such a row: here torch's own, and one that would make NaN of it."""
    if kernel:
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", kernel)
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(queries=4))
    of_queries = torch.tensor([[0, 2, 2, 3], [5, 5, 5, 5]])
    out = dot_product(q, k, v, AttentionMask(documents=(of_queries, DOCUMENTS)))
    blind = torch.tensor([[False, False, False, True], [True, True, True, True]])
    assert (out.transpose(1, 2)[blind] == 0).all()
    assert (out.transpose(1, 2)[~blind] != 0).all()
    out.float().sum().backward()  # also through the rows of zeros
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad[1] == 0).all(), "the second row reads nothing"
    assert (q.grad.transpose(1, 2)[blind] == 0).all()
    assert (v.grad[0, :, 2:5] == 0).all(), "document 1 is nobody's"
    assert (v.grad[0, :, :2] != 0).any()


@pytest.mark.parametrize("prefix", [None, *range(T + 1)])
def test_the_mask_is_the_picture(prefix):
    mask = AttentionMask(causal=True, prefix=prefix).rows(0, T, T, torch.device("cpu"))
    assert_close(mask, seen_by_rule([prefix or 0])[0])


@pytest.mark.parametrize(
    "visible",
    [
        AttentionMask(),
        AttentionMask(causal=True),
        AttentionMask(causal=True, prefix=3),
        AttentionMask(causal=True, prefix=torch.tensor([2, 5])),
        AttentionMask(key_lengths=torch.tensor([4, 6])),
        AttentionMask(causal=True, prefix=3, documents=(DOCUMENTS, DOCUMENTS)),
    ],
)
def test_the_largest_logit_is_that_of_visible_pairs(visible):
    q, k, _ = tensors(kv_heads=2)
    q, k = q.float(), k.float()
    mask = visible.rows(0, T, T, q.device)
    seen = torch.ones(2, 1, T, T, dtype=torch.bool) if mask is None else mask.expand(2, 1, T, T)
    largest = max(
        abs(float(q[b, h, t] @ k[b, h // 2, s])) / 8**0.5
        for b in range(2)
        for h in range(4)
        for t in range(T)
        for s in range(T)
        if seen[b, 0, t, s]
    )
    assert_close(float(largest_score(DotProduct(), q, k, visible)), largest, rtol=1e-5, atol=0)


def test_a_huge_logit_behind_the_mask_does_not_count():
    q, k, _ = tensors()
    hidden = k.clone()
    hidden[:, :, -1] = 1e6
    causal = AttentionMask(causal=True)
    assert largest_score(DotProduct(), q[:, :, :-1], hidden[:, :, :-1], causal) == largest_score(
        DotProduct(), q[:, :, :-1], k[:, :, :-1], causal
    )
    assert largest_score(DotProduct(), q, hidden, AttentionMask(causal=True)) > 1e5, "the last query sees it"
    q[:, :, -1] = 0
    assert largest_score(DotProduct(), q, hidden, causal) == largest_score(DotProduct(), q, k, causal), (
        "nobody else does"
    )
