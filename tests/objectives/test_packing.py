"""Examples that share a row: each is computed as if it were alone."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.objectives.collate import collate, collate_packed
from lit_llm.objectives.config import EOD, MasksConfig
from lit_llm.objectives.packing import rows_of, sizes_of
from lit_llm.training.stability import largest_attention_logit
from tests.tiny_models import PAPER_NORMS, VOCABULARY, build

ROOM = 24, 10
OPEN = MasksConfig(prefix="bidirectional")
ROPE = "decoder.cross_attention.rope"
MODELS = {
    "decoder": ("decllm", [], MasksConfig()),
    "decoder, positions only": ("decllm", ["attention.kv_heads=2", "attention.qkv_norm=[]"], MasksConfig()),
    "decoder, open prefix": ("decllm", [], OPEN),
    "decoder-decoder": ("yoco", ["attention.kv_heads=2"], MasksConfig()),
    "double decoder": ("double", ["block=3", "attention.kv_heads=2"], MasksConfig()),
    "decoder-decoder, open prefix": ("yoco", [], OPEN),
    "decoder-decoder, retention": ("yoco", ["self_decoder.retention={chunk: 7}"], MasksConfig()),
    **{
        f"decoder, {mixer}": ("decllm", [f"decoder.layer_ranges.0.{mixer}={{chunk: 7}}"], MasksConfig())
        for mixer in ("gla", "gated_deltanet", "mamba2")
    },
    "encoder-decoder, mixers": ("redllm", ["encoder.gated_deltanet={chunk: 7}", "decoder.mamba2={}"], MasksConfig()),
    **{f"encoder-decoder, {rope}": ("redllm", [f"{ROPE}={rope}"], MasksConfig()) for rope in ("restart", "none")},
    "encoder-decoder, continuous": ("redllm", [], MasksConfig()),
}


def examples(count=13, seed=0):
    """Of 0 to 24 tokens of input and 1 to 10 of target; the first fills a row."""
    random = np.random.default_rng(seed)
    lengths = [ROOM, *((int(random.integers(0, 13)), int(random.integers(1, 6))) for _ in range(count - 1)), (0, 3)]
    sources = [random.integers(2, VOCABULARY, size=source) for source, _ in lengths]
    return sources, [np.append(random.integers(2, VOCABULARY, size=target - 1), EOD) for _, target in lengths]


def nats_and_gradient(model, batch):
    """Nats of each counted target, and the gradient of their mean."""
    model.zero_grad()
    logits_BTV, real = model.logits(model.hidden(**batch.inputs)), batch.weights.bool()
    nats = F.cross_entropy(logits_BTV[real], batch.targets[real], reduction="none")
    nats.mean().backward()
    return nats.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("double", "off"), [(True, 1e-12), (False, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_has_the_loss_and_the_gradient_of_the_same_examples_in_rows_of_their_own(name, double, off):
    family, overrides, masks = MODELS[name]
    model = build(family, *PAPER_NORMS[family], *overrides, double=double)
    of, (sources, targets) = model.config.family, examples()
    alone, packed = collate(sources, targets, of, masks), collate_packed(sources, targets, of, masks)
    assert len(packed) < len(alone) / 2
    assert packed.weights.sum() == alone.weights.sum() == sum(map(len, targets))
    nats, gradient = nats_and_gradient(model, packed)
    expected, wanted = nats_and_gradient(model, alone)
    assert_close(nats.sum(), expected.sum(), rtol=off, atol=0)
    assert_close(nats.sort().values, expected.sort().values, rtol=off, atol=off)  # the same ones, in another order
    if "mixers" in name and not double:
        off *= 5  # the gradient of a head's decay sums terms of both signs over all tokens
    for parameter, value in wanted.items():
        assert_close(gradient[parameter], value, rtol=0, atol=off * value.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_in_pieces_it_has_it_too(name):
    """Rows are what a micro-batch counts."""
    family, overrides, masks = MODELS[name]
    model, (sources, targets) = build(family, *PAPER_NORMS[family], *overrides), examples()
    packed = collate_packed(sources, targets, model.config.family, masks)
    whole = nats_and_gradient(model, packed)[0].sum()
    assert len(list(packed.micro_batches(2))) > 1
    assert_close(
        sum(nats_and_gradient(model, piece)[0].sum() for piece in packed.micro_batches(2)), whole, rtol=1e-12, atol=0
    )
    assert math.isfinite(largest_attention_logit(model, packed))


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_every_example_is_in_one_row_and_no_row_is_longer_than_the_longest_example(family):
    sources, targets = examples(50, seed=1)
    packed = collate_packed(sources, targets, family, MasksConfig())
    if family == "decoder":
        assert packed.targets.shape[1] <= sum(ROOM)
        read = [
            row[document == number].tolist()
            for row, documents in zip(packed.targets, packed.inputs["documents_BT"], strict=True)
            for document, number in ((documents, n) for n in range(int(documents.max()) + 1))
        ]
        assert sorted(read) == sorted([*s, *t] for s, t in zip(sources, targets, strict=True))
    else:
        assert packed.inputs["source_BS"].shape[1] <= ROOM[0]
        assert packed.targets.shape[1] <= ROOM[1]
        read = [
            (source[of_source == number].tolist(), target[of_target == number].tolist())
            for source, of_source, target, of_target in zip(
                packed.inputs["source_BS"], packed.inputs["documents_BS"],
                packed.targets, packed.inputs["documents_BT"], strict=True,
            )
            for number in range(int(of_target.max()) + 1)
        ]  # fmt: skip
        assert sorted(read) == sorted((list(s) or [EOD], list(t)) for s, t in zip(sources, targets, strict=True))


def fewest(sizes, room):
    """Rows of the best of all packings."""
    return min(len(_in_order(order, room)) for order in itertools.permutations(sizes))


def _in_order(order, room):
    rows = [0]
    for size in order:
        rows = [*rows[:-1], rows[-1] + size] if rows[-1] + size <= room else [*rows, size]
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_few(seed):
    """First fit decreasing needs no more than 11/9 of the fewest, and 6/9 more (Dosa 2007)."""
    sizes = [*np.random.default_rng(seed).integers(1, 8, size=6).tolist(), 10]
    rows = rows_of([(size,) for size in sizes])
    assert sorted(number for row in rows for number in row) == list(range(7))
    assert all(sum(sizes[number] for number in row) <= 10 for row in rows)
    assert len(rows) <= 11 / 9 * fewest(sizes, 10) + 6 / 9


def test_an_encoder_decoder_has_room_on_each_side():
    """Two of these fit by their sum, not by their targets."""
    lengths = [ROOM, (3, 6), (3, 6)]
    assert rows_of(sizes_of(lengths, "decoder")) == [[0], [1, 2]]
    assert rows_of(sizes_of(lengths, "encoder_decoder")) == [[0], [1], [2]]


def test_padding_is_seen_by_nobody_and_gives_no_nan():
    model, (sources, targets) = build("redllm", *PAPER_NORMS["redllm"]), examples(4)
    packed = collate_packed(sources, targets, "encoder_decoder", MasksConfig())
    padding = packed.inputs["documents_BS"] == -1
    assert padding.any()
    hidden = model.hidden(**packed.inputs)
    changed = {**packed.inputs, "source_BS": packed.inputs["source_BS"].masked_fill(padding, 7)}
    real = packed.weights.bool()
    assert torch.isfinite(hidden).all()
    assert torch.equal(model.hidden(**changed)[real], hidden[real])


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_examples_of_one_length_are_laid_out_as_ever(family):
    """No row has room for two, and without a mask the kernels are quicker."""
    ids = np.arange(2, 32).reshape(5, 6)
    packed, alone = (lay(ids[:, :4], ids[:, 4:], family) for lay in (partial(collate_packed, masks=OPEN), collate))
    assert packed.inputs.keys() <= alone.inputs.keys() | {"prefix_length"}
    assert torch.equal(packed.targets, alone.targets)
