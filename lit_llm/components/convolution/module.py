"""Modules of short convolutions; see `resolved.py` for the formula and the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.convolution.cache import ConvolutionStates
from lit_llm.components.convolution.resolved import KERNEL
from lit_llm.components.forward_context import ForwardContext


class ConvolutionInputs(NamedTuple):
    """Inputs of a convolution other than activations; see `LayerPart.prepare`."""

    counted: tuple[Tensor | None, ...]
    """For each of the KERNEL neighbours, B x T x 1: tokens for which it counts; None: all."""
    states: ConvolutionStates | None = None
    """Inputs of earlier passes; None in training."""


def convolution_inputs(context: ForwardContext, causal: bool, states: ConvolutionStates | None) -> ConvolutionInputs:
    """Inputs that all convolutions of a part share. causal: whether the layer is a decoder's."""
    counted = context.once(("convolution", causal), lambda: tuple(_counted(context, i) for i in _neighbours(causal)))
    return ConvolutionInputs(counted, states)


def _neighbours(causal: bool) -> range:
    """Distances of the tokens that a convolution reads, those before a token negative."""
    after = 0 if causal else KERNEL - 1 - KERNEL // 2
    return range(after - KERNEL + 1, after + 1)


def _counted(context: ForwardContext, distance: int) -> Tensor | None:
    """B x T x 1: tokens whose neighbour at a distance is of their document, and no padding; None: all."""
    counted: Tensor | None = None
    documents, lengths_B = context.mask.documents, context.mask.key_lengths
    if distance and documents is not None:
        of_token_BT = documents[0].to(context.device)
        # What comes around from the other end of the row is read as zero.
        counted = of_token_BT.roll(-distance, dims=1) == of_token_BT
    if distance > 0 and lengths_B is not None:
        place_T = torch.arange(context.queries, device=context.device) + distance
        within = place_T < lengths_B.to(context.device)[:, None]
        counted = within if counted is None else counted & within
    return None if counted is None else counted[..., None]


class ShortConvolution(nn.Module):
    """
    x ─┬─ weighted sum of KERNEL neighbours, entry by entry ─(+)─▶
       └──────────────────────────────────────────────────────┘
    """

    initial_std = (3 * KERNEL) ** -0.5
    """That of torch's own start for such a convolution."""
    is_table = True
    """A row of its weights is no map between widths."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, KERNEL))
        self.after = _neighbours(causal)[-1]

    def forward(self, x_BTD: Tensor, inputs: ConvolutionInputs, name: str) -> Tensor:
        """B x T x width -> B x T x width. name: that of its state."""
        if inputs.states is None:
            whole = F.pad(x_BTD, (0, 0, KERNEL - 1 - self.after, self.after))
        else:
            whole = inputs.states.extended(name, x_BTD)
        tokens, out_BTD = x_BTD.shape[1], x_BTD
        weights = self.weight.to(x_BTD.dtype).unbind(1)
        for first, (weight_D, counted) in enumerate(zip(weights, inputs.counted, strict=True)):
            neighbour_BTD = whole[:, first : first + tokens]
            if counted is not None:
                neighbour_BTD = neighbour_BTD * counted
            out_BTD = out_BTD + neighbour_BTD * weight_D
        return out_BTD


def convolutions(widths: Mapping[str, int], causal: bool) -> nn.ModuleDict:
    """The convolutions of a part of a layer. widths: {name: entries of a token}."""
    return nn.ModuleDict({name: ShortConvolution(width, causal) for name, width in widths.items()})
