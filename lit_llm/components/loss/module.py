"""Losses over target tokens: negative log-likelihood, z-loss, distillation. Sums, so that a step can be split anywhere.

z-loss (PaLM, arXiv 2204.02311, section 5): the squared log-normaliser, which keeps logits from drifting.

The logits of a few hundred positions exist at a time. Their gradient is computed beside the loss, in the forward pass,
so that the logits are neither kept nor computed again (the idea of Liger's fused linear cross-entropy, arXiv
2410.10989, for any unembedding). `tests/components/test_target_loss.py` has the plain formulas as the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.components import liger
from lit_llm.components.embedding.module import Unembedding
from lit_llm.components.loss.config import chunk_rows, pass_rows


class LossWeights(NamedTuple):
    """Weights of the terms of the objective, which is summed over target tokens."""

    nats: float = 1.0
    """Of the negative log-likelihood."""
    squares: float = 0.0
    """Of the squared log-normalisers (z-loss)."""
    divergence: float = 0.0
    """Of the divergence from the teacher."""


class Teacher(NamedTuple):
    """A teacher's predictions of the same targets; it gets no gradient."""

    states_BTE: Tensor
    """States from which the teacher predicts the targets."""
    unembedding: Unembedding
    temperature: float
    """Temperature of both softmaxes."""


class Losses(NamedTuple):
    """Sums over target tokens, in float32. Only the objective has a gradient."""

    objective: Tensor
    """Sum of the weighted terms."""
    nats: Tensor
    squares: Tensor
    """Squared log-normalisers."""
    divergence: Tensor
    """temperature² KL(teacher || model), both softmaxed at that temperature, in nats (Hinton et al., arXiv 1503.02531,
    section 2); zero without a teacher."""


def target_loss(
    hidden_BTD: Tensor,
    unembedding: Unembedding,
    targets: tuple[Tensor, Tensor],
    weights: LossWeights = LossWeights(),
    teacher: Teacher | None = None,
) -> Losses:
    """The losses over the target tokens.

    Args:
        hidden_BTD: States after the last norm.
        unembedding: Maps states to logits.
        targets: (B x T ids, N places of those that count, as indices into B·T).
        weights: Weights of the terms of the objective.
        teacher: Teacher, for `weights.divergence`.
    """
    targets_BT, places_N = targets
    hidden_ND, *others = _counted(places_N, hidden_BTD, targets_BT)
    # Liger has no divergence, divides by the number of targets, and makes no gradient where the states need none.
    suits = len(places_N) > 0 and teacher is None and weights.nats == 1.0 and hidden_ND.requires_grad
    if liger.uses_liger() and suits:
        states_ND = unembedding.states(hidden_ND)
        output = unembedding.weight_VD, unembedding.bias_V, unembedding.softcap
        sums = liger.target_loss(states_ND, output, others[0], weights.squares)
        return Losses(*sums, divergence=torch.zeros_like(sums[0]))
    if teacher is not None:
        others += _counted(places_N, teacher.states_BTE.detach())
    terms = _Terms(unembedding, weights, teacher)
    return Losses(*_SummedOverChunks.apply(terms, torch.is_grad_enabled(), others, hidden_ND, *unembedding.parameters))


def target_nats(hidden_BTD: Tensor, unembedding: Unembedding, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Nats of every counted target, row by row, as one vector; call it without gradients.

    targets: as in `target_loss`.
    """
    chunks = target_logits(hidden_BTD, unembedding, targets)
    return torch.cat([F.cross_entropy(logits_NV.float(), ids_N, reduction="none") for logits_NV, ids_N in chunks])


def target_hits(hidden_BTD: Tensor, unembedding: Unembedding, targets: tuple[Tensor, Tensor]) -> Tensor:
    """1 for every counted target that has the largest logit, 0 for others, row by row, as one vector.

    targets: as in `target_loss`.
    """
    chunks = target_logits(hidden_BTD, unembedding, targets)
    return torch.cat([(logits_NV.argmax(-1) == ids_N).float() for logits_NV, ids_N in chunks])


def target_logits(
    hidden_BTD: Tensor, unembedding: Unembedding, targets: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and ids of the counted targets, row by row, in chunks that fit: N x V, in the model's precision, and N.

    Call it without gradients. targets: as in `target_loss`.
    """
    targets_BT, places_N = targets
    for hidden_ND, ids_N in _chunks(unembedding, *_counted(places_N, hidden_BTD, targets_BT)):
        yield unembedding(hidden_ND), ids_N


def _counted(places_N: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The rows of B x T x ... at these places: N x ..., selected before the product with the vocabulary."""
    return [tensor.flatten(0, 1).index_select(0, places_N) for tensor in tensors]


def _chunks(unembedding: Unembedding, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors with N rows, cut into the rows whose logits exist at the same time."""
    size = chunk_rows(unembedding.vocabulary, rows[0].device.type)
    yield from zip(*(tensor.split(size) for tensor in rows), strict=True)


class _Terms(NamedTuple):
    """Losses of a chunk, and the gradient of its objective with respect to its logits."""

    unembedding: Unembedding
    weights: LossWeights
    teacher: Teacher | None

    def of_chunk(self, logits_NV: Tensor, targets_N: Tensor, *states_NE: Tensor) -> Tensor:
        """(objective, nats, squares, divergence) as one vector; the logits become their gradient."""
        columns = [logits_NV, targets_N[:, None]]
        temperature = 1.0
        if self.teacher is not None:
            columns.append(self.teacher.unembedding(states_NE[0]))
            temperature = self.teacher.temperature
        if (compiled := self.unembedding.compiled_terms) is not None:  # it passes over a row at a time by itself
            sums: Tensor = compiled(self.weights, temperature, *columns)
            return sums
        size = pass_rows(logits_NV.shape[-1], logits_NV.device.type)
        parts = zip(*(column.split(size) for column in columns), strict=True)
        return torch.stack([terms_of_rows(self.weights, temperature, *part) for part in parts]).sum(0)


def terms_of_rows(
    weights: LossWeights, temperature: float, logits_NV: Tensor, target_N1: Tensor, taught_NV: Tensor | None = None
) -> Tensor:
    """(objective, nats, squares, divergence) of rows, by their formulas; the logits become the objective's gradient.

    taught_NV: The teacher's logits. temperature: That of both softmaxes of the divergence.
    """
    divergence, added = logits_NV.new_zeros((), dtype=torch.float32), None
    x_NV = logits_NV.float()  # float32 logits themselves
    if taught_NV is not None:
        t = temperature
        log_p_NV, log_q_NV = (taught_NV.float() / t).log_softmax(-1), (x_NV / t).log_softmax(-1)
        divergence = F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True) * t**2
        added = log_q_NV.exp_().sub_(log_p_NV.exp_()).mul_(weights.divergence * t)
    largest_N1 = x_NV.amax(-1, keepdim=True)
    shifted_N1 = x_NV.sub_(largest_N1).gather(-1, target_N1)
    sum_N1 = x_NV.exp_().sum(-1, keepdim=True)
    normaliser_N1 = sum_N1.log().add_(largest_N1)
    # The target's log-probability from shifted logits: large ones would cancel.
    nats, squares = (sum_N1.log() - shifted_N1).sum(), normaliser_N1.square().sum()
    objective = weights.nats * nats + weights.squares * squares + weights.divergence * divergence
    # The gradient is a multiple of the probabilities, less the weight at the target.
    x_NV.mul_((weights.nats + 2.0 * weights.squares * normaliser_N1).div_(sum_N1))
    x_NV.scatter_add_(-1, target_N1, torch.full_like(normaliser_N1, -weights.nats))
    if added is not None:
        x_NV.add_(added)
    if x_NV.dtype != logits_NV.dtype:
        logits_NV.copy_(x_NV)
    return torch.stack([objective, nats, squares, divergence])


class _SummedOverChunks(torch.autograd.Function):
    """Sums of the terms over chunks of rows, whose gradients are made in the forward pass.

    Hooks on a parameter's gradient accumulation fire once, in the backward pass; tensor hooks on it once for a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, terms: _Terms, with_gradient: bool, others: list[Tensor], hidden_ND: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        needed = [with_gradient and each for each in ctx.needs_input_grad[3:]]
        sums = hidden_ND.new_zeros(4, dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden_ND) if needed[0] else None
        trained = [parameter for parameter, each in zip(parameters, needed[1:], strict=True) if each]
        summed: list[Tensor] = []
        begin = 0
        for chunk_ND, *rest in _chunks(terms.unembedding, hidden_ND, *others):
            leaf_ND = chunk_ND.detach().requires_grad_(needed[0])
            with torch.set_grad_enabled(any(needed)):
                logits_NV = terms.unembedding(leaf_ND)
            d_logits = logits_NV.detach()
            sums += terms.of_chunk(d_logits, *rest)
            if any(needed):
                inputs = [*[leaf_ND] * needed[0], *trained]
                gradients = list(torch.autograd.grad(logits_NV, inputs, d_logits))
                if d_hidden is not None:
                    d_hidden[begin : begin + len(chunk_ND)] = gradients.pop(0)
                # In float32 at least: in bfloat16 the sum of many chunks would stand still.
                exact = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
                summed = [whole.add_(each) for whole, each in zip(summed, exact, strict=True)] if summed else exact
            begin += len(chunk_ND)
        made = iter(whole.to(p.dtype) for whole, p in zip(summed, trained, strict=True))
        ctx.save_for_backward(d_hidden, *(next(made) if each else None for each in needed[1:]))
        objective, *reported = sums.unbind()
        ctx.mark_non_differentiable(*reported)
        return objective, *reported

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        factor = gradients[0]
        return None, None, None, *(None if made is None else made * factor for made in ctx.saved_tensors)
