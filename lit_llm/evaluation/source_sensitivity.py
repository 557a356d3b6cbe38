"""Sensitivity of the targets to the source: norms of derivatives at chosen target positions.

After Fu et al. 2023 (arXiv 2304.04052), who show that a decoder-only model's dependence on its source may fade as it
generates ("attention degeneration").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.components.attention.module import Attention
from lit_llm.models.families import EncoderDecoder, LanguageModel
from lit_llm.models.stacks import Block
from lit_llm.objectives.collate import Batch


def source_places(batch: Batch) -> slice:
    """Positions of the source's tokens in the input of their stack; all examples must be cut at one place."""
    if "source_BS" in batch.inputs:
        return slice(0, batch.inputs["source_BS"].shape[1])
    targets = int(batch.weights[0].sum())
    return slice(1, batch.targets.shape[1] - targets + 1)  # <s> stands before it


def target_queries(batch: Batch) -> range:
    """Decoder positions that predict the targets 1, 2, ...; all examples must be cut at one place."""
    length = batch.targets.shape[1]
    return range(length - int(batch.weights[0].sum()), length)


def end_to_end_sensitivity(model: LanguageModel, batch: Batch, steps: Sequence[int]) -> Tensor:
    """B x steps: ‖∂ log p(y_i) / ∂E_S‖, E_S the embedded source, given the tokens before y_i.

    steps: values of i, counted from 1.
    """
    stack = model.encoder if isinstance(model, EncoderDecoder) else model.decoder
    kept: list[Tensor] = []

    def embedded(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(inputs[0].detach().requires_grad_())
        return kept[0], *inputs[1:]

    with torch.enable_grad(), hooked([stack.register_forward_pre_hook(embedded)]):
        hidden_BTD = model.hidden(**batch.inputs)
        queries, source, norms = target_queries(batch), source_places(batch), []
        for step in steps:
            at = queries[step - 1]
            logits_BV = model.logits(hidden_BTD[:, at])
            logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
            chosen_B = logits_BV.log_softmax(-1).gather(-1, batch.targets[:, at, None]).squeeze(-1)
            # Rows do not depend on each other: the sum's derivative holds that of each.
            (gradient_BSD,) = torch.autograd.grad(chosen_B.sum(), kept[0], retain_graph=True)
            norms.append(_row_norms(gradient_BSD[:, source]))
    return torch.stack(norms, dim=1)


def attention_sensitivity(
    model: LanguageModel, batch: Batch, steps: Sequence[int], directions_BRD: Tensor
) -> list[Tensor]:
    """B x steps for each decoder layer: ‖∂o_i / ∂S‖_F, where o_i is what the attention that reads the source adds.

    In a decoder-only model that is self-attention, and S the source's states before the layer; in an encoder-decoder it
    is cross-attention, and S the encoder's output. Only Jᵀu of the Jacobian J is computed: E‖Jᵀu‖² = ‖J‖_F² for
    directions u with E uuᵀ = 1 (Hutchinson); the mean is over a row's R directions. An output norm of the block belongs
    to o_i.
    """
    crossed = isinstance(model, EncoderDecoder)
    inputs: list[tuple[Any, ...]] = []
    states: list[Tensor] = []
    hooks = []
    for block in model.decoder.layers:
        attention, norm, _ = _source_attention(block, crossed)
        hooks.append(attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments)))
        hooks.append(norm.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0])))
    with torch.no_grad(), hooked(hooks):
        model.hidden(**batch.inputs)
    source, queries, sensitivities = source_places(batch), target_queries(batch), []
    for block, (x_BTD, part_inputs), state_BTD in zip(model.decoder.layers, inputs, states, strict=True):
        attention, norm, after = _source_attention(block, crossed)
        with torch.enable_grad():
            whole_BSD = (part_inputs.source_BSD if crossed else state_BTD).detach()
            source_BSD = whole_BSD[:, source].clone().requires_grad_()
            whole_BSD = torch.cat([whole_BSD[:, : source.start], source_BSD, whole_BSD[:, source.stop :]], dim=1)
            if crossed:
                out_BTD = attention(x_BTD.detach(), part_inputs._replace(source_BSD=whole_BSD))
            else:
                out_BTD = attention(norm(whole_BSD), part_inputs)
            out_BTD = out_BTD if after is None else after(out_BTD)
        sensitivities.append(
            torch.stack([_norm_by_draws(out_BTD[:, queries[i - 1]], source_BSD, directions_BRD) for i in steps], 1)
        )
    return sensitivities


def _source_attention(block: nn.Module, crossed: bool) -> tuple[Attention, nn.Module, nn.Module | None]:
    """(attention of a layer that reads the source, norm of its input, norm of its output)."""
    assert isinstance(block, Block)
    part = "cross_attention" if crossed else "self_attention"
    attention = block.part(part)
    assert isinstance(attention, Attention)
    norm = block.norm_before(part)
    assert norm is not None
    return attention, norm, block.norm_of_added(part)


def _norm_by_draws(out_BD: Tensor, source_BSD: Tensor, directions_BRD: Tensor) -> Tensor:
    """B: root of the mean of ‖Jᵀu‖² over directions."""
    norms: list[Tensor] = []
    for u_BD in directions_BRD.to(out_BD.dtype).unbind(1):
        (gradient_BSD,) = torch.autograd.grad(out_BD, source_BSD, u_BD, retain_graph=True)
        norms.append(_row_norms(gradient_BSD))
    return torch.stack(norms).square().mean(0).sqrt()


def _row_norms(x: Tensor) -> Tensor:
    """Norm of each row: B, in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1)


@contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks when the context ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
