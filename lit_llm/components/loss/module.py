"""Losses over target tokens: negative log-likelihood, z-loss, distillation. Sums, so that a step can be split anywhere.

z-loss (PaLM, arXiv 2204.02311, section 5): the squared log-normaliser, which keeps logits from drifting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_llm.components.embedding.module import Unembedding
from lit_llm.components.loss.config import chunk_rows


def target_loss(
    hidden_BTD: Tensor, unembedding: Unembedding, targets_BT: Tensor, weights_BT: Tensor, z_loss: bool = False
) -> tuple[Tensor, Tensor]:
    """(sum of nats, sum of squared log-normalisers) over the positions with weight 1, in float32.

    The second is zero without `z_loss`.
    """
    chunks = list(_chunks(hidden_BTD, unembedding, targets_BT, weights_BT))
    if len(chunks) == 1:
        return _sums(*chunks[0], unembedding, z_loss)
    sums = [checkpoint(_sums, *chunk, unembedding, z_loss, use_reentrant=False) for chunk in chunks]
    return torch.stack([nats for nats, _ in sums]).sum(), torch.stack([squares for _, squares in sums]).sum()


class Teacher(NamedTuple):
    """A teacher's predictions of the same targets; it gets no gradient."""

    states: Tensor
    """States from which the teacher predicts the targets: B x T x E, or N x E of a chunk."""
    unembedding: Unembedding
    temperature: float
    """Temperature of both softmaxes."""


def distilled_loss(
    hidden_BTD: Tensor, unembedding: Unembedding, targets_BT: Tensor, weights_BT: Tensor, teacher: Teacher
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of nats, sum of squared log-normalisers, sum of the teacher's divergence) over the positions with weight 1.

    The divergence is temperature² KL(teacher || model), both softmaxed at that temperature, in nats (Hinton et al.,
    arXiv 1503.02531, section 2).
    """
    student_chunks = list(_chunks(hidden_BTD, unembedding, targets_BT, weights_BT))
    teacher_chunks = _chunks(teacher.states.detach(), unembedding, targets_BT, weights_BT)
    chunks = [
        (hidden_ND, targets_N, unembedding, teacher._replace(states=states_NE))
        for (hidden_ND, targets_N), (states_NE, _) in zip(student_chunks, teacher_chunks, strict=True)
    ]
    if len(chunks) == 1:
        return _distilled_sums(*chunks[0])
    sums = [checkpoint(_distilled_sums, *chunk, use_reentrant=False) for chunk in chunks]
    nats, squares, divergence = zip(*sums, strict=True)
    return torch.stack(nats).sum(), torch.stack(squares).sum(), torch.stack(divergence).sum()


def target_nats(hidden_BTD: Tensor, unembedding: Unembedding, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Nats of every counted target, row by row, as one vector; call it without gradients."""
    chunks = _chunks(hidden_BTD, unembedding, targets_BT, weights_BT)
    return torch.cat([_nats(*chunk, unembedding)[0] for chunk in chunks])


def _chunks(
    hidden_BTD: Tensor, unembedding: Unembedding, targets_BT: Tensor, weights_BT: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden states, targets) of the positions with weight 1, selected before the product with the vocabulary."""
    counted_N = weights_BT.flatten().nonzero().squeeze(-1)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, counted_N)
    targets_N = targets_BT.flatten().index_select(0, counted_N)
    rows = chunk_rows(unembedding.vocabulary)
    yield from zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)


def _nats(hidden_ND: Tensor, targets_N: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor]:
    logits_NV = unembedding(hidden_ND).float()
    return F.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV


def _distilled_sums(
    hidden_ND: Tensor, targets_N: Tensor, unembedding: Unembedding, teacher: Teacher
) -> tuple[Tensor, Tensor, Tensor]:
    nats_N, logits_NV = _nats(hidden_ND, targets_N, unembedding)
    temperature = teacher.temperature
    with torch.no_grad():
        log_p_NV = (teacher.unembedding(teacher.states).float() / temperature).log_softmax(-1)
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    divergence = F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True) * temperature**2
    normaliser_N = nats_N + logits_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    return nats_N.sum(), normaliser_N.square().sum(), divergence


def _sums(hidden_ND: Tensor, targets_N: Tensor, unembedding: Unembedding, z_loss: bool) -> tuple[Tensor, Tensor]:
    nats_N, logits_NV = _nats(hidden_ND, targets_N, unembedding)
    if not z_loss:
        return nats_N.sum(), nats_N.new_zeros(())
    # nats = normaliser - target's logit: the normaliser takes no second pass over the logits.
    normaliser_N = nats_N + logits_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    return nats_N.sum(), normaliser_N.square().sum()
