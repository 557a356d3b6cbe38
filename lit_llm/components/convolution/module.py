"""Modules of short convolutions; see `resolved.py` for their forms and papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.convolution.cache import ConvolutionStates
from lit_llm.components.convolution.resolved import Form, canon_form
from lit_llm.components.forward_context import ForwardContext


class ConvolutionInputs(NamedTuple):
    """Inputs of a convolution other than activations; see `LayerPart.prepare`."""

    counted: tuple[Tensor | None, ...]
    """For each neighbour, B x T x 1: tokens for which it counts; None: all."""
    states: ConvolutionStates | None = None
    """Inputs of earlier passes; None in training."""


def convolution_inputs(
    context: ForwardContext, form: Form, causal: bool, states: ConvolutionStates | None
) -> ConvolutionInputs:
    """Inputs that all convolutions of this form share. causal: whether the layer is a decoder's."""
    # Padding comes after a decoder's tokens, which never read it.
    runs_BT = context.document_runs(padding=not causal)
    return ConvolutionInputs(context.once(("convolution", form), lambda: neighbours_that_count(form, runs_BT)), states)


def canon_inputs(context: ForwardContext, causal: bool, states: ConvolutionStates | None) -> ConvolutionInputs:
    """Inputs that all Canon layers share."""
    return convolution_inputs(context, canon_form(causal), causal, states)


def neighbours_that_count(form: Form, runs_BT: Tensor | None) -> tuple[Tensor | None, ...]:
    """For each neighbour, B x T x 1: tokens of the same document; None: all. runs_BT: equal within a document."""
    # What comes around from the other end of the row is read as zero.
    return tuple(
        None if runs_BT is None or not distance else (runs_BT.roll(-distance, dims=1) == runs_BT)[..., None]
        for distance in form.distances
    )


class ShortConvolution(nn.Module):
    """A depthwise convolution over the few tokens around each:

    x ─┬─ weighted sum of neighbours, entry by entry ─[+ bias]─(+)─[swish]─▶
       └─────────────────────────────────────────────[residual]┘
    """

    is_table = True
    """A row of its weights is one entry's filter, which Muon should not mix with others."""

    def __init__(self, entries: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.initial_std = (3 * form.width) ** -0.5
        """As torch's own start for such a convolution, uniform values within 1/sqrt(width)."""
        self.weight = nn.Parameter(torch.empty(entries, form.width))
        self.bias = nn.Parameter(torch.empty(entries)) if form.bias else None

    def forward(self, x_BTD: Tensor, inputs: ConvolutionInputs, name: str) -> Tensor:
        """B x T x entries -> B x T x entries. name: that of its state."""
        form, tokens = self.form, x_BTD.shape[1]
        if inputs.states is None:
            whole = F.pad(x_BTD, (0, 0, form.width - 1 - form.after, form.after))
        else:
            whole = inputs.states.extended(name, x_BTD, form.width)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32) if form.swish else x_BTD.dtype
        sum_BTD = x_BTD.to(dtype) if form.residual else torch.zeros((), dtype=dtype, device=x_BTD.device)
        if self.bias is not None:
            sum_BTD = sum_BTD + self.bias.to(dtype)
        for first, (weight_D, counted) in enumerate(zip(self.weight.to(dtype).unbind(1), inputs.counted, strict=True)):
            neighbour_BTD = whole[:, first : first + tokens]
            if counted is not None:
                neighbour_BTD = neighbour_BTD * counted
            sum_BTD = sum_BTD + neighbour_BTD * weight_D
        return F.silu(sum_BTD).to(x_BTD.dtype) if form.swish else sum_BTD


def canon_layers(widths: Mapping[str, int], causal: bool) -> nn.ModuleDict:
    """The Canon layers of a part of a layer. widths: {name: entries of a token}."""
    return nn.ModuleDict({name: ShortConvolution(width, canon_form(causal)) for name, width in widths.items()})
