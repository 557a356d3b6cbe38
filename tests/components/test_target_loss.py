"""The loss over target tokens against F.cross_entropy and logsumexp."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.embedding.module import Unembedding
from lit_llm.components.loss import config, module

B, T, D, V = 3, 5, 8, 11
WEIGHTS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 1, 1]], dtype=torch.float32)


def target_loss(hidden, matrix, *rest, **options):
    return module.target_loss(hidden, Unembedding(matrix), *rest, **options)


def target_nats(hidden, matrix, *rest):
    return module.target_nats(hidden, Unembedding(matrix), *rest)


@pytest.fixture
def given():
    """Hidden states, unembedding, targets."""
    return (
        torch.randn(B, T, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (B, T)),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Three positions at a time; ten count, so the last chunk is a short one."""
    monkeypatch.setattr(config, "CHUNK_ENTRIES", 3 * V + 1)
    assert config.chunk_rows(V) == 3


def by_the_book(hidden, unembedding, targets, weights=WEIGHTS):
    """(sum of nats, sum of squared log-normalisers) over every position, masked afterwards."""
    logits = (hidden @ unembedding.T).flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none") * weights.flatten()
    return nats.sum(), (torch.logsumexp(logits, -1) ** 2 * weights.flatten()).sum()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def test_nats_are_the_masked_sum_of_cross_entropy(given):
    nats, squares = target_loss(*given, WEIGHTS)
    kept = WEIGHTS.bool()
    hidden, unembedding, targets = given
    assert_close(nats, F.cross_entropy(hidden[kept] @ unembedding.T, targets[kept], reduction="sum"))
    assert squares == 0, "not asked for"


def test_z_loss_is_the_squared_logsumexp(given):
    nats, squares = target_loss(*given, WEIGHTS, z_loss=True)
    wanted_nats, wanted_squares = by_the_book(*given)
    assert_close(nats, wanted_nats)
    assert_close(squares, wanted_squares)


def test_gradients_are_those_of_the_formula(given):
    nats, squares = target_loss(*given, WEIGHTS, z_loss=True)
    wanted_nats, wanted_squares = by_the_book(*given)
    assert_close(gradients(nats + 0.1 * squares, *given[:2]), gradients(wanted_nats + 0.1 * wanted_squares, *given[:2]))


@pytest.mark.parametrize("z_loss", [False, True])
def test_in_chunks_value_and_gradient_are_the_same(given, small_chunks, monkeypatch, z_loss):
    nats, squares = target_loss(*given, WEIGHTS, z_loss=z_loss)
    pieces = gradients(nats + 0.1 * squares, *given[:2])
    monkeypatch.setattr(config, "CHUNK_ENTRIES", 1 << 25)
    whole_nats, whole_squares = target_loss(*given, WEIGHTS, z_loss=z_loss)
    assert_close((nats, squares), (whole_nats, whole_squares))
    assert_close(pieces, gradients(whole_nats + 0.1 * whole_squares, *given[:2]))


def kept_logits(given):
    """Entries of the largest tensor of V columns that is kept for the backward pass."""
    kept = [0]

    def pack(tensor):
        kept.append(tensor.numel() if tensor.shape[-1:] == (V,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        target_loss(*given, WEIGHTS)
    return max(kept)


def test_in_one_piece_the_logits_of_counted_positions_are_kept(given):
    assert kept_logits(given) == WEIGHTS.sum() * V


def test_in_chunks_no_logits_are_kept(given, small_chunks):
    assert kept_logits(given) == 0


@pytest.mark.parametrize("chunks", [False, True])
def test_positions_that_do_not_count_cannot_influence_and_get_no_gradient(given, request, chunks):
    """Not even with nan in them: they are dropped before the product, not multiplied with zero after it."""
    if chunks:
        request.getfixturevalue("small_chunks")
    hidden, unembedding, targets = given
    clean = target_loss(*given, WEIGHTS, z_loss=True)
    spoilt = hidden.detach().masked_fill(WEIGHTS[..., None] == 0, torch.nan).requires_grad_()
    changed_targets = torch.where(WEIGHTS == 0, (targets + 1) % V, targets)
    dirty = target_loss(spoilt, unembedding, changed_targets, WEIGHTS, z_loss=True)
    assert_close(dirty, clean, rtol=0, atol=0)
    gradient, of_matrix = gradients(sum(dirty), spoilt, unembedding)
    assert (gradient[WEIGHTS == 0] == 0).all()
    assert (gradient[WEIGHTS == 1] != 0).any(-1).all()
    assert of_matrix.isfinite().all()


def test_a_step_may_be_cut_anywhere(given):
    """Sums add up: of rows one by one they are the batch's."""
    hidden, unembedding, targets = given
    rows = [
        target_loss(hidden[i : i + 1], unembedding, targets[i : i + 1], WEIGHTS[i : i + 1], z_loss=True)
        for i in range(B)
    ]
    assert_close(tuple(map(sum, zip(*rows, strict=True))), target_loss(*given, WEIGHTS, z_loss=True))


def test_without_a_counted_position_the_loss_is_zero_and_has_a_gradient_of_zero(given):
    nats, squares = target_loss(*given, torch.zeros(B, T), z_loss=True)
    assert (nats, squares) == (0, 0)
    assert all((g == 0).all() for g in gradients(nats + squares, *given[:2]))


@pytest.mark.parametrize("chunks", [False, True])
def test_target_nats_are_the_counted_ones_row_by_row(given, request, chunks):
    if chunks:
        request.getfixturevalue("small_chunks")
    hidden, unembedding, targets = given
    logp = (hidden @ unembedding.T).log_softmax(-1)
    wanted = [-logp[b, t, targets[b, t]] for b in range(B) for t in range(T) if WEIGHTS[b, t]]
    with torch.no_grad():
        assert_close(target_nats(*given, WEIGHTS), torch.stack(wanted).detach())


def test_sums_are_float32_whatever_the_product_was(given):
    """Under bfloat16 a sum of thousands of nats would lose whole nats."""
    with torch.autocast("cpu", torch.bfloat16):
        nats, squares = target_loss(*given, WEIGHTS, z_loss=True)
    assert nats.dtype == squares.dtype == torch.float32
    assert_close((nats, squares), by_the_book(*given), rtol=0.02, atol=0)
