"""Attention by FlexAttention: values and gradients are those of softmax written out; blocks are those of the mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.attention.relative import alibi_slopes
from lit_llm.components.flex import FlexAttention, FlexMask, ScoreChange
from lit_llm.components.masks import AttentionMask, Mask, MergedMask
from lit_llm.components.windows import BLOCK
from lit_llm.training.compiled_blocks import compiled_flex
from tests.flex_on_cpu import gradients_allowed

B, H, T, S, K = 2, 4, 150, 140, 8
CPU = torch.device("cpu")


def documents(tokens: int) -> Tensor:
    return torch.stack([torch.arange(tokens) // 60, torch.arange(tokens) // 45])


CAUSAL = AttentionMask(causal=True)
PAIR = documents(T), documents(T)
OPEN = torch.stack([torch.arange(T) % 60 < 9, torch.arange(T) % 45 < 30])
LENGTHS = torch.tensor([T, 37])
MASKS: dict[str, tuple[Mask, int]] = {
    "causal": (CAUSAL, T),
    "everything": (AttentionMask(), S),
    "prefix": (replace(CAUSAL, prefix=40), T),
    "prefix of each row": (replace(CAUSAL, prefix=torch.tensor([0, 140])), T),
    "open tokens": (replace(CAUSAL, prefix=OPEN, documents=PAIR), T),
    "window": (replace(CAUSAL, window=(20, 20)), T),
    "window of an encoder": (AttentionMask(window=(30, 12)), T),
    "prefix in a window": (replace(CAUSAL, prefix=100, window=(20, 40)), T),
    "documents": (replace(CAUSAL, documents=PAIR), T),
    "documents, prefix and window": (replace(CAUSAL, documents=PAIR, prefix=70, window=(30, 30)), T),
    "documents of an encoder": (AttentionMask(documents=PAIR), T),
    "documents without a source": (AttentionMask(documents=(documents(T) + 1, documents(S))), S),
    "padding": (AttentionMask(key_lengths=torch.tensor([S, 11])), S),
    "padding and documents": (AttentionMask(key_lengths=LENGTHS, documents=PAIR), T),
    "padding in a window": (AttentionMask(key_lengths=LENGTHS, window=(9, 9)), T),
    "merged": (MergedMask(replace(CAUSAL, window=(25, 25)), AttentionMask(key_lengths=torch.tensor([S, 3])), S), S + T),
    "merged, everything of the source": (MergedMask(CAUSAL, AttentionMask(), S), S + T),
}
"""{kind: (mask, number of keys)}; T queries each."""


@pytest.fixture(scope="module")
def counter() -> Iterator[CompileCounterWithBackend]:
    with gradients_allowed() as counts:
        yield counts


@pytest.fixture(scope="module")
def flex(counter: CompileCounterWithBackend) -> FlexAttention:
    return compiled_flex(lengths_vary=False, backend=counter)


def tensors(keys: int, kv_heads: int = 2, rows: int = B, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values, and the gradient of the output."""
    shapes = [(rows, H, T, K), (rows, kv_heads, keys, K), (rows, kv_heads, keys, K), (rows, H, T, K)]
    q, k, v, d_out = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [*(x.requires_grad_() for x in (q, k, v)), d_out]


def by_formula(inputs: list[Tensor], seen: Tensor, change: ScoreChange = ScoreChange()) -> Tensor:
    """softmax(cap(QKᵀ/√K) + bias)V over the visible keys; zero for a query that sees none."""
    q, k, v, _ = inputs
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / K**0.5
    if change.softcap:
        scores = change.softcap * (scores / change.softcap).tanh()
    if change.alibi:
        slopes, positions = change.alibi
        ago = (positions[..., :, None] - positions[..., None, :]).abs()
        scores = scores - slopes[:, None, None] * (ago if ago.dim() == 2 else ago[:, None])
    blind = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(~(seen | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0) @ v


def seen_of(mask: Mask, keys: int) -> Tensor:
    """B x 1 x T x S, by `Mask.rows`, which the tests of masks judge by pictures."""
    rows = mask.rows(0, T, keys, CPU)
    return (torch.ones((), dtype=torch.bool) if rows is None else rows).expand(B, 1, T, keys)


def assert_same(mask: FlexMask, inputs: list[Tensor], wanted: Tensor) -> None:
    *qkv, d_out = inputs
    found = DotProduct()(*qkv, mask)
    assert found.shape == wanted.shape
    assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(*(torch.autograd.grad(out, qkv, d_out) for out in (found, wanted)), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_is_softmax_over_its_visible_keys(kind: str, flex: FlexAttention) -> None:
    """With two query heads for each head of keys."""
    mask, keys = MASKS[kind]
    inputs = tensors(keys)
    blocks = FlexMask(mask, (T, keys), (torch.float64, CPU), flex, ScoreChange())
    assert_same(blocks, inputs, by_formula(inputs, seen_of(mask, keys)))


SLOPES = torch.tensor(alibi_slopes(H))
POSITIONS = torch.stack([torch.arange(T) % 60, torch.arange(T) % 45])
CHANGES = {
    "cap": ScoreChange(softcap=0.7),
    "ALiBi": ScoreChange(alibi=(SLOPES, torch.arange(T))),
    "ALiBi at positions of each row": ScoreChange(alibi=(SLOPES, POSITIONS)),
    "cap, then ALiBi": ScoreChange(0.7, (SLOPES, torch.arange(T))),
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("causal", "cap"),
        ("causal", "ALiBi"),
        ("documents", "ALiBi at positions of each row"),
        ("documents, prefix and window", "cap, then ALiBi"),
    ],
)
def test_scores_are_capped_then_biased_then_masked(kind: str, change: str, flex: FlexAttention) -> None:
    mask, keys = MASKS[kind]
    inputs = tensors(keys, kv_heads=H)
    blocks = FlexMask(mask, (T, keys), (torch.float64, CPU), flex, CHANGES[change])
    assert_same(blocks, inputs, by_formula(inputs, seen_of(mask, keys), CHANGES[change]))


@pytest.mark.parametrize("kind", MASKS)
def test_listed_blocks_are_those_with_a_visible_pair(kind: str) -> None:
    """What the kernels for a GPU read: blocks with some pairs, those with all, and both for the backward pass."""
    mask, keys = MASKS[kind]
    flex = FlexAttention(lambda: torch.empty(0), lengths_vary=False)
    blocks = FlexMask(mask, (T, keys), (torch.float64, CPU), flex, ScoreChange()).blocks
    seen = seen_of(mask, keys)[: blocks.kv_num_blocks.shape[0], 0].int()
    seen = torch.nn.functional.pad(seen, (0, -keys % BLOCK, 0, -T % BLOCK))
    count = seen.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum((2, 4))

    def listed(numbers: Tensor, indices: Tensor) -> Tensor:
        dense = torch.zeros(*indices.shape[:3], indices.shape[3] + 1, dtype=torch.bool)
        used = torch.arange(indices.shape[3]) < numbers[..., None]
        return dense.scatter(3, indices.long().where(used, indices.shape[3]), True)[:, 0, :, :-1]

    some, every = (count > 0) & (count < BLOCK * BLOCK), count == BLOCK * BLOCK
    assert torch.equal(listed(blocks.kv_num_blocks, blocks.kv_indices), some)
    assert torch.equal(listed(blocks.full_kv_num_blocks, blocks.full_kv_indices), every)
    assert torch.equal(listed(blocks.q_num_blocks, blocks.q_indices), some.transpose(1, 2))
    assert torch.equal(listed(blocks.full_q_num_blocks, blocks.full_q_indices), every.transpose(1, 2))
    assert not blocks.BLOCK_SIZE[0] % BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_scaled_and_in_the_precision_of_the_pass(dtype: torch.dtype, flex: FlexAttention) -> None:
    """Under autocast queries may still be in float32. Judge: the formula in float64."""
    mask, keys = MASKS["documents"]
    inputs = tensors(keys, dtype=torch.float32)
    scale = 0.2
    q, *others = (x.double() for x in inputs)
    exact = by_formula([q * scale * K**0.5, *others], seen_of(mask, keys))
    out = DotProduct(scale)(*inputs[:3], FlexMask(mask, (T, keys), (dtype, CPU), flex, ScoreChange()))
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * exact.norm()


def test_where_lengths_vary_few_sizes_are_compiled(counter: CompileCounterWithBackend) -> None:
    """Rows and tokens are filled up to powers of two; other prefixes and documents are no other graph."""
    before = counter.frame_count
    flex = compiled_flex(lengths_vary=True, backend=counter)
    for rows, tokens in ((3, 150), (4, 250), (3, 129), (4, 256)):
        of_row = torch.randint(0, 3, (rows, tokens)).cumsum(1)
        mask = AttentionMask(causal=True, prefix=int(tokens / 3), documents=(of_row, of_row))
        blocks = FlexMask(mask, (tokens, tokens), (torch.float64, CPU), flex, ScoreChange())
        q, k, v = (torch.randn(rows, 2, tokens, K, dtype=torch.float64, requires_grad=True) for _ in range(3))
        out = DotProduct()(q, k, v, blocks)
        seen = mask.rows(0, tokens, tokens, CPU)
        assert seen is not None
        wanted = (q @ k.transpose(-1, -2) / K**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        assert_close(out, wanted)
    assert counter.frame_count == before + 1


def test_blocks_are_found_without_reading_the_device() -> None:
    """On the meta device every such read raises."""
    meta = torch.device("meta")
    flex = FlexAttention(lambda: torch.empty(0), lengths_vary=True)
    for kind, (mask, keys) in MASKS.items():
        blocks = FlexMask(mask, (T, keys), (torch.float32, meta), flex, ScoreChange()).blocks
        assert blocks.kv_indices.is_meta, kind
        with pytest.raises((RuntimeError, NotImplementedError)):
            blocks.kv_num_blocks.sum().item()
