"""Attention by blocks of queries against torch's kernel in float64, in value and gradient, for every mask."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.attention import query_blocks
from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.attention.query_blocks import block_attention, suits_blocks
from lit_llm.components.masks import AttentionMask, KernelMask, MergedMask

ROWS, HEADS, TOKENS, SOURCE, WIDTH = 2, 4, 150, 37, 8
CPU = torch.device("cpu")
DOCUMENTS = torch.arange(TOKENS).repeat(ROWS, 1) // 40
CAUSAL = AttentionMask(causal=True)
MASKS = {
    "causal": (CAUSAL, TOKENS),
    "short prefix": (replace(CAUSAL, prefix=5), TOKENS),
    "prefix beyond a block": (replace(CAUSAL, prefix=70), TOKENS),
    "all prefix": (replace(CAUSAL, prefix=TOKENS), TOKENS),
    "a prefix for each row": (replace(CAUSAL, prefix=torch.tensor([3, 100])), TOKENS),
    "open keys": (replace(CAUSAL, prefix=(torch.arange(TOKENS) % 50 < 7).expand(ROWS, -1)), TOKENS),
    "full": (AttentionMask(), TOKENS),
    "a source": (AttentionMask(), SOURCE),
    "padded sources": (AttentionMask(key_lengths=torch.tensor([20, SOURCE])), SOURCE),
    "documents": (replace(CAUSAL, documents=(DOCUMENTS, DOCUMENTS)), TOKENS),
    "documents without a source": (AttentionMask(documents=(DOCUMENTS, DOCUMENTS[:, :SOURCE])), SOURCE),
    "window": (replace(CAUSAL, window=(60, 1)), TOKENS),
    "merged": (MergedMask(CAUSAL, AttentionMask(key_lengths=torch.tensor([20, SOURCE])), SOURCE), TOKENS + SOURCE),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(query_blocks, "QUERIES", {})
    monkeypatch.setattr(query_blocks, "multiplies_bfloat16", lambda: True)


def heads(keys, key_heads=HEADS, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (HEADS, TOKENS), (key_heads, keys), (key_heads, keys)
    return [torch.randn(ROWS, *shape, WIDTH, dtype=dtype, requires_grad=True) for shape in shapes]


def kernel_mask(mask, keys, dtype=torch.float64):
    return KernelMask(mask, (TOKENS, keys), (dtype, CPU), scores=False, bias=False)


def with_gradients(out, *inputs):
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype))]


def by_torch(q, k, v, mask, scale=None):
    """Torch's kernel with the whole mask; queries that see nothing see everything, as in a KernelMask."""
    visible = mask.rows(0, TOKENS, k.shape[2], CPU)
    if visible is not None:
        visible = visible | ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("case", MASKS)
def test_values_and_gradients_are_those_of_torchs_kernel(case, key_heads, monkeypatch):
    mask, keys = MASKS[case]
    q, k, v = heads(keys, key_heads)
    wanted = with_gradients(by_torch(q, k, v, mask, 0.3), q, k, v)
    for most in (1 << 20, 1):  # all rows together, each alone
        monkeypatch.setattr(query_blocks, "BLOCK_SCORES", most)
        out = block_attention(q, k, v, kernel_mask(mask, keys), 0.3)
        assert_close(with_gradients(out, q, k, v), wanted, rtol=1e-9, atol=1e-12)


def test_the_default_scale_is_one_over_the_root_of_the_width():
    q, k, v = heads(TOKENS)
    assert_close(block_attention(q, k, v, kernel_mask(CAUSAL, TOKENS), None), by_torch(q, k, v, CAUSAL))


@pytest.mark.parametrize("case", MASKS)
def test_under_bfloat16_it_is_as_exact_as_torchs_kernel_but_for_the_rounding_of_the_scores(case):
    mask, keys = MASKS[case]
    exact = q, k, v = heads(keys)
    wanted = with_gradients(by_torch(q, k, v, mask), *exact)
    rounded = q, k, v = [x.detach().float().requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16):
        blocks = block_attention(q, k, v, kernel_mask(mask, keys, torch.bfloat16), None)
        theirs = by_torch(q, k, v, mask)
    assert blocks.dtype == torch.bfloat16
    for mine, other, right in zip(
        with_gradients(blocks, *rounded), with_gradients(theirs, *rounded), wanted, strict=True
    ):
        error, bound = ((x.double() - right).norm() / right.norm() for x in (mine, other))
        assert error < max(2.5 * bound, 2**-7)


def test_a_later_key_cannot_influence_a_query():
    q, k, v = heads(TOKENS)
    mask = kernel_mask(CAUSAL, TOKENS)
    before = block_attention(q, k, v, mask, None)
    k, v = (x.detach().clone() for x in (k, v))
    k[:, :, 100:], v[:, :, 100:] = 1e6, 1e6
    assert torch.equal(block_attention(q, k, v, mask, None)[:, :, :100], before[:, :, :100])


def test_the_backward_pass_keeps_nothing_of_the_size_of_the_scores():
    q, k, v = heads(TOKENS)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        block_attention(q, k, v, kernel_mask(CAUSAL, TOKENS), None)
    assert kept == [ROWS * HEADS * TOKENS * WIDTH] * 3


def test_everything_else_keeps_torchs_kernel(monkeypatch):
    mask = kernel_mask(CAUSAL, TOKENS)
    row = torch.empty(1, 1, query_blocks.LONGEST, 8, dtype=torch.bfloat16, requires_grad=True)
    assert suits_blocks(row, row, mask)
    assert not suits_blocks(row.detach(), row, mask), "and without a backward pass"
    long = torch.cat([row, row], 2)
    assert not suits_blocks(long, row, mask), "and for long rows"
    assert not suits_blocks(row, long, mask)
    assert not suits_blocks(row.to("meta"), row, mask)
    assert not suits_blocks(row, row, KernelMask(CAUSAL, (9, 9), (row.dtype, CPU), scores=True, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        assert suits_blocks(row.float(), row, mask)
    monkeypatch.setattr(query_blocks, "multiplies_bfloat16", lambda: False)
    assert not suits_blocks(row, row, mask), "and on a CPU without matrix units"


def test_in_float32_only_causal_rows_of_middle_length_and_enough_heads_take_blocks(monkeypatch):
    def suits(tokens=512, mask=CAUSAL, rows=2, width=64):
        q = torch.empty(rows, HEADS, tokens, width, requires_grad=True)
        return suits_blocks(q, q, KernelMask(mask, (tokens, tokens), (q.dtype, CPU), scores=False, bias=False))

    monkeypatch.setattr(query_blocks, "has_avx512", lambda: True)
    assert [tokens for tokens in (383, 384, 640, 641) if suits(tokens)] == [384, 640]
    assert suits(mask=replace(CAUSAL, prefix=128))
    assert not suits(mask=replace(CAUSAL, prefix=129))
    assert not suits(mask=AttentionMask())
    assert not suits(rows=1)
    assert not suits(width=31)
    monkeypatch.setattr(query_blocks, "has_avx512", lambda: False)
    assert not suits()


def test_float32_is_as_exact_as_torchs_kernel():
    exact = q, k, v = heads(TOKENS)
    wanted = with_gradients(by_torch(q, k, v, CAUSAL), *exact)
    rounded = q, k, v = [x.detach().float().requires_grad_() for x in exact]
    mine = with_gradients(block_attention(q, k, v, kernel_mask(CAUSAL, TOKENS, torch.float32), None), *rounded)
    theirs = with_gradients(by_torch(q, k, v, CAUSAL), *rounded)
    for found, other, right in zip(mine, theirs, wanted, strict=True):
        error, bound = ((x.double() - right).norm() for x in (found, other))
        assert 0 < error < 1.5 * bound


@pytest.mark.parametrize("case", ["prefix beyond a block", "documents", "a prefix for each row", "a source"])
def test_torchs_checks_of_an_operator_pass(case):
    """Among them: shapes and strides of the traced result are the real ones, and lengths may vary."""
    mask, keys = MASKS[case]
    made = kernel_mask(mask, keys, torch.float32)
    inputs = heads(keys, 2, torch.float32)
    tensor = made.visible if made.added is None else made.added
    causal = made.kernel == "causal"
    torch.library.opcheck(query_blocks._forward, (*inputs, made.prefix if causal else None, None if causal else tensor))


def test_dot_product_takes_blocks_unless_it_is_the_reference(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lit_llm.components.attention.dot_product.block_attention",
        lambda *inputs: calls.append(inputs) or block_attention(*inputs),
    )
    q, k, v = heads(SOURCE, dtype=torch.bfloat16)
    documents = AttentionMask(documents=(DOCUMENTS, DOCUMENTS[:, :SOURCE]))
    mask = kernel_mask(documents, SOURCE, torch.bfloat16)
    attention = DotProduct()
    out = attention(q, k, v, mask)
    assert len(calls) == 1
    blind = DOCUMENTS[0] > DOCUMENTS[0, SOURCE - 1]
    assert (out[:, :, blind] == 0).all(), "a query without a key adds nothing"
    attention.reference = True
    assert_close(attention(q, k, v, mask), out, rtol=0, atol=0.02)
    attention.reference = False
    attention(q, k, v, mask, torch.zeros(HEADS, TOKENS, SOURCE, dtype=torch.bfloat16))
    assert len(calls) == 1
