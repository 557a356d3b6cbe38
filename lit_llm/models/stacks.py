"""Blocks, each a sequence of parts behind one protocol, and stacks of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llm.components.flex import FlexAttention
from lit_llm.components.forward_context import CacheRows, ForwardContext, cast_once
from lit_llm.components.kv_cache import Cache, StackCache
from lit_llm.components.layer_part import LayerPart, build_part
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.norm.module import Norm
from lit_llm.components.residual.module import BranchScale
from lit_llm.models.layer import Layer
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.scaling import residual_factors


class Block(nn.Module):
    """One layer of a stack:

    x ─┬─ norm ─ self_attention ─ drop ─(+)─┬─ norm ─ cross_attention ─ drop ─(+)─┬─ norm ─ feed_forward ─ drop ─(+)─▶
       └─────────────────────────────────┘  │        ▲ encoder_BSD             │  └────────────────────────────────┘
                                            └──────────────────────────────────┘
    Each part reads the residual stream, and its output is added to it; the layer's configuration lists the parts. With
    `residual` or completep (+) is a x + b g * f(x): constants a and b from the depth, and a learned factor g.

    The drawing shows `norm.placement: pre`. The other placements, for each part f:

    post      x ─┬─ f ─ drop ─(+)─ post_norm ─▶      sandwich  x ─┬─ norm ─ f ─ post_norm ─ drop ─(+)─▶
                 └─────────────┘                                  └─────────────────────────────────┘
    output    as sandwich, without the first
    parallel  as pre, but each part reads the layer's input, not what the parts before it have added to it
    """

    def __init__(
        self, layer: Layer, model: ResolvedModel, side: str, first: bool, tied_to: Block | None = None
    ) -> None:
        """Build a layer.

        Args:
            layer: Its parts.
            model: The model that it belongs to.
            side: encoder or decoder.
            first: Whether the layer is the first of its stack.
            tied_to: A layer whose parts and norms are also those of this one, which then has no parameters.
        """
        super().__init__()
        # In a tuple, so that they are modules of the other layer alone: counted, saved and updated once.
        self._tied_to = () if tied_to is None else (tied_to,)
        widths, norm = model.widths(side), model.norm
        self.placement = norm.placement
        self.parts = tuple(name for name, _ in layer.parts)
        """Names of the parts' modules, in the order in which they act."""
        for number, (name, part) in enumerate(() if self._tied_to else layer.parts):
            self._norms(name, norm, widths.row, skip=first and number == 0 and norm.skip_first)
            branch = model.residual.branch_shape(widths.row)
            scale = None if branch is None else BranchScale(branch, model.residual.initial)
            self.add_module(f"{name}_branch", scale)
            causal = side == "decoder" or model.block is not None
            self.add_module(name, build_part(part, widths, causal=causal))
        self.stream_factor, self.branch_factor = residual_factors(model, side)
        """Factors of the residual stream and of each branch, where they are added."""
        self.dropout = nn.Dropout(0.0)

    @property
    def _owner(self) -> Block:
        """The layer that has the modules."""
        return self._tied_to[0] if self._tied_to else self

    def part(self, name: str) -> LayerPart:
        """The module of that name."""
        return cast(LayerPart, getattr(self._owner, name))

    def prepare(self, context: ForwardContext, cache: Mapping[str, Cache]) -> dict[str, Any]:
        """{part: its inputs for `forward`}, made before the layers run."""
        return {name: self.part(name).prepare(context, cache.get(name)) for name in self.parts}

    def new_cache(self, rows: CacheRows) -> dict[str, Cache]:
        """{part: empty cache}, without parts that keep nothing between passes."""
        caches = {name: self.part(name).new_cache(rows) for name in self.parts}
        return {name: cache for name, cache in caches.items() if cache is not None}

    def _norms(self, part: str, norm: NormConfig, width: int, skip: bool = False) -> None:
        """Add a part's norms, `<part>_norm` before it and `<part>_post_norm` after it; None for an absent norm."""
        after = norm.after or norm.placement == "post"
        self.add_module(f"{part}_norm", Norm(norm, width) if norm.before and not skip else None)
        self.add_module(f"{part}_post_norm", Norm(norm, width) if after else None)

    def norm_before(self, part: str) -> nn.Module | None:
        """The norm of a part's input; None where it has none."""
        return cast("nn.Module | None", getattr(self._owner, f"{part}_norm"))

    def norm_of_added(self, part: str) -> nn.Module | None:
        """The norm of a part's output before it is added to the residual stream; None where it has none."""
        return None if self.placement == "post" else cast("nn.Module | None", getattr(self._owner, f"{part}_post_norm"))

    def _normed_input(self, part: str, x_BTD: Tensor) -> Tensor:
        norm = self.norm_before(part)
        # Under autocast every matrix of the part would cast the same input.
        return cast_once(x_BTD if norm is None else norm(x_BTD))

    def _add_output(self, part: str, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        norm, scale = self.norm_of_added(part), getattr(self._owner, f"{part}_branch")
        added_BTD = self._drop(out_BTD if norm is None else norm(out_BTD))
        added_BTD = added_BTD if scale is None else scale(added_BTD)
        stream_BTD = x_BTD if self.stream_factor == 1 else x_BTD * self.stream_factor
        if self.branch_factor == 1:
            sum_BTD = stream_BTD + added_BTD
        else:
            sum_BTD = torch.add(stream_BTD, added_BTD, alpha=self.branch_factor)
        if self.placement == "post":
            return cast(Tensor, getattr(self._owner, f"{part}_post_norm")(sum_BTD))
        return sum_BTD

    def _drop(self, out_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(out_BTD)) if self.training else out_BTD

    def forward(self, x_BTD: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """B x T x D -> B x T x D. inputs: the result of `prepare`."""
        input_BTD = x_BTD
        for name in self.parts:
            read_BTD = input_BTD if self.placement == "parallel" else x_BTD
            x_BTD = self._add_output(name, x_BTD, self.part(name)(self._normed_input(name, read_BTD), inputs[name]))
        return x_BTD


def apply_block(block: Block, x_BTD: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The block's output, B x T x D."""
    return cast(Tensor, block(x_BTD, inputs))


class Stack(nn.Module):
    """Layers and the norm after the last of them."""

    def __init__(self, model: ResolvedModel, side: str, tied_to: Stack | None = None) -> None:
        """tied_to: a stack whose layers have the modules of this one's."""
        super().__init__()
        layers: tuple[Layer, ...] = getattr(model, side)
        owners = [None] * len(layers) if tied_to is None else tied_to._blocks()
        self.layers = nn.ModuleList(
            Block(layer, model, side, index == 0, owner)
            for index, (layer, owner) in enumerate(zip(layers, owners, strict=True))
        )
        ahead = model.output.future_tokens if side == "decoder" else 0
        self.future = nn.ModuleList(Block(layers[-1], model, side, False) for _ in range(ahead))
        """Layers beside the last, each for a further token."""
        self.future_states: list[Tensor] = []
        """States of the last pass in training from which further tokens are predicted: B x T x D each."""
        self.norm = self._norm_after(model, side)
        self.shared = tuple(self._add_shared())
        """Names of the modules that all layers share."""
        self.recompute = False
        """Whether only each layer's input is kept for the backward pass, which then computes the layer again."""
        self.apply_in_training: Callable[[Block, Tensor, Mapping[str, Any]], Tensor] = apply_block
        """Computes a block in training: `apply_block`, or that function compiled."""
        self.flex_in_training: FlexAttention | None = None
        """FlexAttention, where it computes attention in training."""
        self.fla_in_training = False
        """True where flash-linear-attention computes recurrences in training."""

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """B x T x D -> B x T x D, in training, evaluation and cached decoding alike."""
        last = len(self.layers)
        if not (len(self.future) and self.training and torch.is_grad_enabled()):
            return self._apply_final_norm(self._run(x_BTD, context, 0, last))
        x_BTD = self._run(x_BTD, context, 0, last - 1)
        out_BTD = self._apply_final_norm(self._run(x_BTD, context, last - 1, last))
        heads = cast("list[Block]", list(self.future))
        self.future_states = [self._apply_final_norm(self._run_blocks([head], x_BTD, context)) for head in heads]
        return out_BTD

    def take_future_states(self) -> list[Tensor]:
        """States from which further tokens are predicted, of the last pass in training; they are handed out once."""
        states, self.future_states = self.future_states, []
        return states

    def new_cache(self, rows: CacheRows) -> StackCache:
        """An empty cache for all layers."""
        return StackCache([layer.new_cache(rows) for layer in self._blocks()])

    @staticmethod
    def _norm_after(model: ResolvedModel, side: str) -> Norm | None:
        """The norm after the last layer; None with placement post, whose last block ends with a norm."""
        return None if model.norm.placement == "post" else Norm(model.norm, model.width(side))

    def _add_shared(self) -> Iterator[str]:
        for block in self._blocks():
            for part in block.parts:
                for name, module in block.part(part).stack_modules().items():
                    if name not in self._modules:
                        self.add_module(name, module)
                        yield name

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    def _apply_final_norm(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.norm is None else cast(Tensor, self.norm(x_BTD))

    def _run(self, x_BTD: Tensor, context: ForwardContext, first: int, last: int) -> Tensor:
        """Run the layers `first` to `last` (exclusive), after preparing the inputs of all of them."""
        kept = None if context.cache is None else context.cache.layers[first:last]
        return self._run_blocks(self._blocks()[first:last], x_BTD, context, kept)

    def _run_blocks(
        self,
        blocks: Sequence[Block],
        x_BTD: Tensor,
        context: ForwardContext,
        kept: Sequence[Mapping[str, Cache]] | None = None,
    ) -> Tensor:
        """Run blocks. kept: their caches."""
        # Evaluations run eagerly: their shapes and hooks would compile further graphs.
        trains = self.training and torch.is_grad_enabled()
        apply = self.apply_in_training if trains else apply_block
        context.flex = self.flex_in_training if trains else None
        context.fla = self.fla_in_training and trains
        context.stack_modules = {name: getattr(self, name) for name in self.shared}
        kept = [{}] * len(blocks) if kept is None else kept
        inputs = [block.prepare(context, cache) for block, cache in zip(blocks, kept, strict=True)]
        for block, prepared in zip(blocks, inputs, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # `checkpoint` keeps the state of the random generators, so that dropout drops the same entries again.
                x_BTD = cast(Tensor, checkpoint(apply, block, x_BTD, prepared, use_reentrant=False))
            else:
                x_BTD = apply(block, x_BTD, prepared)
        return x_BTD
