"""The loss over target tokens and its gradient against F.cross_entropy, logsumexp and kl_div with autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.embedding.module import Head, Unembedding
from lit_llm.components.loss import config
from lit_llm.components.loss.module import LossWeights, Teacher, target_hits, target_logits, target_loss, target_nats
from lit_llm.components.norm.config import NormConfig

B, T, D, E, V = 3, 5, 8, 6, 11
COUNTED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 1, 1]], dtype=torch.bool)
PLACES = COUNTED.flatten().nonzero().squeeze(-1)
ALL = LossWeights(0.7, 0.1, 0.3)
ONLY = {name: LossWeights(**{"nats": 0.0, name: 1.0}) for name in LossWeights._fields}


@pytest.fixture
def given():
    """Hidden states, unembedding's matrix, targets."""
    torch.manual_seed(0)
    return torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.randint(V, (B, T))


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return Teacher(torch.randn(B, T, E), Unembedding(torch.randn(V, E)), temperature=2.0)


@pytest.fixture(params=["one chunk", "chunks of three"])
def chunks(request, monkeypatch):
    """Ten positions count, so that the last chunk of three is a short one."""
    if request.param != "one chunk":
        monkeypatch.setattr(config, "MOST_ENTRIES", 3 * V + 1)
        monkeypatch.setattr(config, "CACHED_ENTRIES", 2 * V)
        assert (config.chunk_rows(V, "cpu"), config.pass_rows(V, "cpu")) == (3, 2)


def loss(given, weights=LossWeights(), teacher=None, places=PLACES):
    hidden, matrix, targets = given
    return target_loss(hidden, Unembedding(matrix), (targets, places), weights, teacher)


def by_the_book(given, weights, teacher=None, unembedding=None):
    """(objective, nats, squares, divergence): every position by torch's functions and autograd, then selected."""
    hidden, matrix, targets = given
    logits = (unembedding or Unembedding(matrix))(hidden)[COUNTED].float()
    nats = F.cross_entropy(logits, targets[COUNTED], reduction="sum")
    squares, divergence = torch.logsumexp(logits, -1).square().sum(), torch.zeros(())
    if teacher is not None:
        t = teacher.temperature
        p = (teacher.unembedding(teacher.states_BTE)[COUNTED] / t).softmax(-1)
        divergence = t**2 * (p * (p.log() - (logits / t).log_softmax(-1))).sum()
    return weights.nats * nats + weights.squares * squares + weights.divergence * divergence, nats, squares, divergence


def gradients(objective, *tensors):
    return torch.autograd.grad(objective, tensors)


def test_the_chunks_fit_the_cache_of_a_cpu_and_the_memory_of_any_device():
    assert config.chunk_rows(8192, "cpu") * 8192 == config.CPU_ENTRIES
    assert config.chunk_rows(32768, "cpu") == config.CPU_ROWS, "a product for fewer rows would be slow"
    assert (
        config.chunk_rows(262144, "cpu") * 262144 == config.chunk_rows(262144, "cuda") * 262144 == config.MOST_ENTRIES
    )
    assert config.chunk_rows(1 << 26, "cpu") == 1


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(squares=0.1), *ONLY.values(), ALL], ids=str)
def test_values_and_gradients_are_those_of_the_formulas(given, teacher, chunks, weights):
    taught = teacher if weights.divergence else None
    losses, wanted = loss(given, weights, taught), by_the_book(given, weights, taught)
    assert_close(tuple(losses), wanted)
    assert_close(gradients(losses.objective, *given[:2]), gradients(wanted[0], *given[:2]))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_divergence_is_hintons_formula(given, teacher, temperature):
    """Its gradient with respect to the model's logits is τ (q - p) (arXiv 1503.02531, section 2)."""
    hidden, matrix, _ = given
    losses = loss(given, ONLY["divergence"], teacher._replace(temperature=temperature))
    p = (teacher.unembedding(teacher.states_BTE)[COUNTED] / temperature).softmax(-1)
    q = (hidden[COUNTED] @ matrix.T / temperature).softmax(-1)
    to_logits = (temperature * (q - p)).detach()
    to_hidden, to_matrix = gradients(losses.objective, hidden, matrix)
    assert_close(to_matrix, to_logits.T @ hidden[COUNTED])
    assert_close(to_hidden[COUNTED], to_logits @ matrix)


def test_a_twin_has_nothing_to_teach(given):
    hidden, matrix, _ = given
    losses = loss(given, ONLY["divergence"], Teacher(hidden, Unembedding(matrix), 3.0))
    assert_close(losses.objective, torch.zeros(()), rtol=0, atol=1e-5)
    assert_close(gradients(losses.objective, hidden)[0], torch.zeros(B, T, D), rtol=0, atol=1e-5)


def test_a_teacher_gets_no_gradient(given, teacher):
    states, matrix = teacher.states_BTE.requires_grad_(), teacher.unembedding.weight_VD.requires_grad_()
    objective = loss(given, ALL, teacher).objective
    assert torch.autograd.grad(objective, (states, matrix), allow_unused=True) == (None, None)


def test_the_gradient_passes_a_bias_a_soft_cap_and_a_head(given, chunks):
    hidden, matrix, targets = given
    head, bias = Head(NormConfig(), D), torch.randn(V, requires_grad=True)
    unembedding = Unembedding(matrix, bias, 2.0, head)
    losses = target_loss(hidden, unembedding, (targets, PLACES), LossWeights(squares=0.1))
    wanted = by_the_book(given, LossWeights(squares=0.1), unembedding=unembedding)
    inputs = (hidden, matrix, bias, *head.parameters())
    assert len(inputs) == 5
    assert_close(gradients(losses.objective, *inputs), gradients(wanted[0], *inputs))


def test_a_frozen_matrix_or_state_gets_no_gradient(given, chunks):
    hidden, matrix, targets = given
    for frozen, trained in ((hidden, matrix), (matrix, hidden)):
        other = frozen.detach()
        args = (other, matrix, targets) if frozen is hidden else (hidden, other, targets)
        assert_close(gradients(loss(args).objective, trained), gradients(by_the_book(given, ALL)[1], trained))


def test_no_logits_are_kept(given, chunks):
    """Neither for the outer backward pass nor for that of a chunk; the matrix, D x V once transposed, is."""
    kept = [0]

    def pack(tensor):
        kept.append(tensor.numel() if tensor.shape[-1:] == (V,) and tensor.shape != (D, V) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(given)
    assert len(kept) > 1
    assert max(kept) == 0


def test_nothing_is_computed_for_a_gradient_that_nobody_asked_for(given):
    with torch.no_grad():
        assert not loss(given).objective.requires_grad
    assert not loss([tensor.detach() for tensor in given]).objective.requires_grad


def test_positions_that_do_not_count_cannot_influence_and_get_no_gradient(given, chunks):
    """Not even with nan in them: they are dropped before the product, not multiplied with zero after it."""
    hidden, matrix, targets = given
    spoilt = hidden.detach().masked_fill(~COUNTED[..., None], torch.nan).requires_grad_()
    changed = torch.where(COUNTED, targets, (targets + 1) % V)
    dirty = loss((spoilt, matrix, changed), LossWeights(squares=0.1))
    assert_close(tuple(dirty), tuple(loss(given, LossWeights(squares=0.1))), rtol=0, atol=0)
    gradient, of_matrix = gradients(dirty.objective, spoilt, matrix)
    assert (gradient[~COUNTED] == 0).all()
    assert (gradient[COUNTED] != 0).any(-1).all()
    assert of_matrix.isfinite().all()


def test_large_logits_keep_the_digits_of_small_nats(chunks):
    """In float32 30,000 has a last digit of 0.002."""
    hidden, matrix = torch.eye(2)[None] * 3e4, torch.tensor([[1.0, 0.0], [1 - 8 / 3e4, 0.0]])
    losses = target_loss(hidden, Unembedding(matrix), (torch.tensor([[0, 0]]), torch.tensor([0])))
    assert_close(losses.nats, torch.tensor(-8.0).exp().log1p(), rtol=0.01, atol=0)


def test_a_step_may_be_cut_anywhere(given):
    """Sums add up: of rows one by one they are the batch's."""
    hidden, matrix, targets = given
    rows = [
        loss((hidden[i : i + 1], matrix, targets[i : i + 1]), ALL, places=COUNTED[i].nonzero().squeeze(-1))
        for i in range(B)
    ]
    assert_close(tuple(map(sum, zip(*rows, strict=True))), tuple(loss(given, ALL)))


def test_without_a_counted_position_the_loss_is_zero_and_has_a_gradient_of_zero(given):
    losses = loss(given, LossWeights(squares=0.1), places=PLACES[:0])
    assert tuple(losses) == (0, 0, 0, 0)
    assert all((g == 0).all() for g in gradients(losses.objective, *given[:2]))


def test_target_nats_are_the_counted_ones_row_by_row(given, chunks):
    hidden, matrix, targets = given
    logp = (hidden @ matrix.T).log_softmax(-1)
    wanted = [-logp[b, t, targets[b, t]] for b in range(B) for t in range(T) if COUNTED[b, t]]
    with torch.no_grad():
        assert_close(target_nats(hidden, Unembedding(matrix), (targets, PLACES)), torch.stack(wanted).detach())


def test_sums_are_float32_whatever_the_product_was(given, chunks):
    """Under bfloat16 a sum of thousands of nats would lose whole nats."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(given, LossWeights(squares=0.1))
    assert {part.dtype for part in losses} == {torch.float32}
    wanted = by_the_book(given, LossWeights(squares=0.1))
    assert_close(tuple(losses)[:3], wanted[:3], rtol=0.02, atol=0)
    for mine, theirs in zip(gradients(losses.objective, *given[:2]), gradients(wanted[0], *given[:2]), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_gradients_of_chunks_add_up_in_float32_for_a_matrix_in_bfloat16(given, monkeypatch):
    """In bfloat16 the sum of many chunks would stand still: 256 + 1 is 256."""
    monkeypatch.setattr(config, "MOST_ENTRIES", V)
    hidden = torch.ones(1, 300, D, dtype=torch.bfloat16)
    matrix = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    targets, places = torch.zeros(1, 300, dtype=torch.long), torch.arange(300)
    objective = target_loss(hidden, Unembedding(matrix), (targets, places)).objective
    (gradient,) = gradients(objective, matrix)
    assert_close(gradient[0].float(), torch.full((D,), -300 * (1 - 1 / V)), rtol=0.01, atol=0)


def test_hits_of_bfloat16_logits_need_no_copy_in_float32(given):
    """The largest logit is the same one in either precision; nats are computed in float32."""
    hidden, matrix, targets = (each.detach().bfloat16() if each.is_floating_point() else each for each in given)
    unembedding = Unembedding(matrix)
    assert {logits.dtype for logits, _ in target_logits(hidden, unembedding, (targets, PLACES))} == {torch.bfloat16}
    logits, ids = unembedding(hidden)[COUNTED].float(), targets[COUNTED]
    hits = target_hits(hidden, unembedding, (targets, PLACES))
    assert hits.tolist() == (logits.argmax(-1) == ids).float().tolist()
    nats = target_nats(hidden, unembedding, (targets, PLACES))
    assert torch.equal(nats, F.cross_entropy(logits, ids, reduction="none"))
