"""How strongly what is generated depends on the source, as norms of derivatives at chosen target positions.

After Fu et al. 2023 (arXiv 2304.04052), who show that a decoder-only model's dependence on its source may fade as it
generates ("attention degeneration"). The source is what a stack reads of it, in an encoder-decoder the encoder.
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
    """Where the source's tokens stand in the input that holds them; of examples that are all cut at one place."""
    if "source_BS" in batch.inputs:
        return slice(0, batch.inputs["source_BS"].shape[1])
    targets = int(batch.weights[0].sum())
    return slice(1, batch.targets.shape[1] - targets + 1)  # <s> stands before it


def target_queries(batch: Batch) -> range:
    """The decoder's positions that predict the targets 1, 2, ...; of examples that are all cut at one place."""
    length = batch.targets.shape[1]
    return range(length - int(batch.weights[0].sum()), length)


def end_to_end_sensitivity(model: LanguageModel, batch: Batch, steps: Sequence[int]) -> Tensor:
    """B x steps: ‖∂ log p(y_i) / ∂E_S‖, E_S the embedded source, the tokens before y_i being given.

    steps: i, from 1.
    """
    stack = model.encoder if isinstance(model, EncoderDecoder) else model.decoder
    kept: list[Tensor] = []

    def embedded(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(inputs[0].detach().requires_grad_())
        return kept[0], *inputs[1:]

    with torch.enable_grad(), hooked([stack.register_forward_pre_hook(embedded)]):
        hidden_BTD = model.hidden(**batch.inputs)
        queries, source, found = target_queries(batch), source_places(batch), []
        for step in steps:
            at = queries[step - 1]
            logits_BV = model.logits(hidden_BTD[:, at])
            logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
            chosen_B = logits_BV.log_softmax(-1).gather(-1, batch.targets[:, at, None]).squeeze(-1)
            # Rows do not depend on each other: the sum's derivative holds that of each.
            (gradient_BSD,) = torch.autograd.grad(chosen_B.sum(), kept[0], retain_graph=True)
            found.append(_norm_of_each(gradient_BSD[:, source]))
    return torch.stack(found, dim=1)


def attention_sensitivity(
    model: LanguageModel, batch: Batch, steps: Sequence[int], directions_BRD: Tensor
) -> list[Tensor]:
    """For each decoder layer, B x steps: ‖∂o_i / ∂S‖_F, o_i what the attention that reads the source adds to the
    residual stream.

    That is self-attention, and S the source's states as the layer gets them; in an encoder-decoder cross-attention, and
    S the encoder's output. Of the Jacobian J only Jᵀu is computed: E‖Jᵀu‖² = ‖J‖_F² for directions u with E uuᵀ = 1
    (Hutchinson), here the mean over a row's R directions.
    """
    crossed = isinstance(model, EncoderDecoder)
    inputs: list[tuple[Any, ...]] = []
    states: list[Tensor] = []
    hooks = []
    for block in model.decoder.layers:
        attention, norm, _ = _reader(block, crossed)
        hooks.append(attention.register_forward_pre_hook(lambda _, found: inputs.append(found)))
        hooks.append(norm.register_forward_pre_hook(lambda _, found: states.append(found[0])))
    with torch.no_grad(), hooked(hooks):
        model.hidden(**batch.inputs)
    source, queries, found = source_places(batch), target_queries(batch), []
    for block, (x_BTD, given), state_BTD in zip(model.decoder.layers, inputs, states, strict=True):
        attention, norm, after = _reader(block, crossed)
        with torch.enable_grad():
            whole_BSD = (given.source_BSD if crossed else state_BTD).detach()
            source_BSD = whole_BSD[:, source].clone().requires_grad_()
            whole_BSD = torch.cat([whole_BSD[:, : source.start], source_BSD, whole_BSD[:, source.stop :]], dim=1)
            if crossed:
                out_BTD = attention(x_BTD.detach(), given._replace(source_BSD=whole_BSD))
            else:
                out_BTD = attention(norm(whole_BSD), given)
            out_BTD = out_BTD if after is None else after(out_BTD)
        found.append(
            torch.stack([_norm_by_draws(out_BTD[:, queries[i - 1]], source_BSD, directions_BRD) for i in steps], 1)
        )
    return found


def _reader(block: nn.Module, crossed: bool) -> tuple[Attention, nn.Module, nn.Module | None]:
    """The attention of a layer that reads the source, the norm before it, and that of what it adds."""
    assert isinstance(block, Block)
    part = "cross_attention" if crossed else "self_attention"
    attention = block.part(part)
    assert isinstance(attention, Attention)
    norm = block.norm_before(part)
    assert norm is not None
    return attention, norm, block.norm_of_added(part)


def _norm_by_draws(out_BD: Tensor, source_BSD: Tensor, directions_BRD: Tensor) -> Tensor:
    """B: the root of the mean of ‖Jᵀu‖² over directions."""
    norms: list[Tensor] = []
    for u_BD in directions_BRD.to(out_BD.dtype).unbind(1):
        (gradient_BSD,) = torch.autograd.grad(out_BD, source_BSD, u_BD, retain_graph=True)
        norms.append(_norm_of_each(gradient_BSD))
    return torch.stack(norms).square().mean(0).sqrt()


def _norm_of_each(x: Tensor) -> Tensor:
    """B, in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1)


@contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Take these handles of hooks away afterwards."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
