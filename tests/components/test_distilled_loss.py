"""The divergence from a teacher against Hinton's formula (arXiv 1503.02531, section 2), written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.embedding.module import Unembedding
from lit_llm.components.loss import config
from lit_llm.components.loss.module import Teacher, distilled_loss, target_loss

B, T, D, E, V = 3, 5, 8, 6, 11
WEIGHTS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 1, 1]], dtype=torch.float32)


@pytest.fixture
def given():
    """The model's states and matrix, the teacher's, and targets."""
    torch.manual_seed(0)
    mine = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return *mine, torch.randn(B, T, E), torch.randn(V, E), torch.randint(V, (B, T))


def of(hidden, matrix, states, teacher, targets, temperature=1.0):
    predictions = Teacher(states, Unembedding(teacher), temperature)
    return distilled_loss(hidden, Unembedding(matrix), targets, WEIGHTS, predictions)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_divergence_and_its_gradient_are_the_formulas(given, temperature):
    """sum of p (log p - log q), whose gradient with respect to the model's logits is τ² (q - p) / τ."""
    hidden, matrix, states, teacher, _ = given
    _, _, divergence = of(*given, temperature=temperature)
    kept = WEIGHTS.bool()
    p = ((states[kept] @ teacher.T) / temperature).softmax(-1)
    logits = hidden[kept] @ matrix.T
    q = (logits / temperature).softmax(-1)
    assert_close(divergence, temperature**2 * (p * (p.log() - q.log())).sum())
    to_hidden, to_matrix = torch.autograd.grad(divergence, (hidden, matrix))
    to_logits = (temperature * (q - p)).detach()
    assert_close(to_matrix, to_logits.T @ hidden[kept])
    assert_close(to_hidden[kept], to_logits @ matrix)
    assert not to_hidden[~kept].any()


def test_the_texts_own_loss_is_untouched_by_the_teacher(given):
    hidden, matrix, _, _, targets = given
    nats, squares, _ = of(*given)
    assert_close((nats, squares), target_loss(hidden, Unembedding(matrix), targets, WEIGHTS, z_loss=True))
    assert_close(nats, F.cross_entropy(hidden[WEIGHTS.bool()] @ matrix.T, targets[WEIGHTS.bool()], reduction="sum"))


def test_a_twin_has_nothing_to_teach(given):
    hidden, matrix, _, _, targets = given
    _, _, divergence = of(hidden, matrix, hidden, matrix, targets, 3.0)
    assert_close(divergence, torch.zeros(()), rtol=0, atol=1e-5)
    assert_close(torch.autograd.grad(divergence, hidden)[0], torch.zeros(B, T, D), rtol=0, atol=1e-5)


def test_a_teacher_gets_no_gradient(given):
    hidden, matrix, states, teacher, targets = given
    states, teacher = states.requires_grad_(), teacher.requires_grad_()
    _, _, divergence = of(hidden, matrix, states, teacher, targets)
    assert torch.autograd.grad(divergence, (states, teacher), allow_unused=True) == (None, None)


def test_chunks_of_logits_change_neither_value_nor_gradient(given, monkeypatch):
    hidden, matrix = given[:2]
    whole = of(*given, temperature=2.0)
    expected = torch.autograd.grad(whole[0] + whole[1] + whole[2], (hidden, matrix))
    monkeypatch.setattr(config, "CHUNK_ENTRIES", 3 * V + 1)
    cut = of(*given, temperature=2.0)
    assert_close(cut, whole)
    assert_close(torch.autograd.grad(cut[0] + cut[1] + cut[2], (hidden, matrix)), expected)
