"""Base classes of recurrent mixers: what they read beside activations, their cache, and both directions of a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_llm.components.convolution.module import ConvolutionInputs, convolution_inputs, neighbours_that_count
from lit_llm.components.few_rows import Linear
from lit_llm.components.forward_context import CacheRows, ForwardContext
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.part import Widths
from lit_llm.components.recurrence.cache import RecurrentState
from lit_llm.components.recurrence.chunks import Streams, chunkwise, recurrent, without_padding
from lit_llm.components.recurrence.fla import DocumentBorders, borders_of, fused_chunkwise
from lit_llm.components.recurrence.resolved import ResolvedConvolved, ResolvedRecurrence, ResolvedTwoWay
from lit_llm.components.rope import Rotation


class RecurrentInputs(NamedTuple):
    """Inputs of a recurrent mixer other than activations; see `LayerPart.prepare`."""

    rotation: Rotation | None
    """RoPE of queries and keys; None without."""
    runs_BT: Tensor | None
    """Number of changes of document up to each token; None for one document."""
    cache: RecurrentState | None
    convolution: ConvolutionInputs | None = None
    """Set only with a short convolution."""
    fla: DocumentBorders | None = None
    """Borders of documents for the kernels of flash-linear-attention; None where torch computes the recurrence."""


class RecurrentMixer(LayerPart):
    """A sequence mixer with a state of fixed size in place of keys and values."""

    def __init__(self, config: ResolvedRecurrence, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.chunk, self.causal_only = config.chunk, config.causal_only
        self.causal, self.without_fla = causal, config.without_fla

    def prepare(self, context: ForwardContext, cache: RecurrentState | None) -> RecurrentInputs:  # type: ignore[override]
        """Make the inputs of `forward`. Raises ValueError for a bidirectional prefix."""
        mask = context.mask
        if isinstance(mask.prefix, Tensor) or (mask.prefix or 0) > 1:
            raise ValueError(f"{self.causal_only}: a token cannot see later ones; leave its prefix causal")
        assert cache is None or mask.documents is None
        # Backwards a row's padding comes first. Forwards it comes last, and no token sees it.
        runs_BT = context.document_runs(padding=not self.causal)
        inputs = RecurrentInputs(None, runs_BT, cache)
        if self.without_fla or not context.fla or cache is not None:
            return inputs
        both_ways = not self.causal
        return inputs._replace(fla=context.once(("borders", both_ways), lambda: borders_of(runs_BT, both_ways)))

    def new_cache(self, rows: CacheRows) -> RecurrentState:
        return RecurrentState(rows.self_lengths)

    def mix(self, streams: Streams, inputs: RecurrentInputs) -> Tensor:
        """Output of each token and head, ... x T x V. Each document starts from an empty state.

        With a cache the streams hold the prompts the first time, shorter ones padded at the end, and then one more
        token of each row.
        """
        cache = inputs.cache
        if inputs.fla is not None:
            return fused_chunkwise(streams, inputs.fla.forwards)
        if cache is None:
            return chunkwise(streams, self.chunk, inputs.runs_BT)[0]
        if cache.state_BHKV is not None:
            out_BHTV, cache.state_BHKV = recurrent(streams, cache.state_BHKV)
            return out_BHTV
        if not cache.rows.even:
            streams = without_padding(streams, cache.rows.lengths_B)
        out_BHTV, cache.state_BHKV = chunkwise(streams, self.chunk, keep_state=True)
        return out_BHTV


class TwoWayMixer(RecurrentMixer):
    """Base class of the mixers that read a row forwards and, in an encoder, backwards too:

    x ─ project ─┬─ mix forwards ──────────────────(+)─ out ─▶      (causal: forwards alone)
                 └─ turn ─ mix backwards ─ turn ───┘

    Both directions read the same projections of x, and their sum goes through the same output matrix, as in Caduceus
    (arXiv 2403.03234). Each has its own convolution and decay.
    """

    def __init__(self, config: ResolvedTwoWay, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        assert config.bidirectional != causal
        self.directions = nn.ModuleList(self.new_direction(config, widths) for _ in range(config.directions))
        self.q = Linear(widths.row, config.key_width)
        self.k = Linear(widths.row, config.key_width)
        self.v = Linear(widths.row, config.value_width)
        self.output_gate = Linear(widths.row, config.value_width)
        self.out = Linear(config.value_width, widths.row)
        self.head_scale = nn.Parameter(torch.empty(config.scale_entries))

    @abstractmethod
    def new_direction(self, config: ResolvedTwoWay, widths: Widths) -> nn.Module:
        """Module with the parameters that each direction has for itself."""

    @abstractmethod
    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """Tensors that both directions read of each token: B x T x ... each."""

    @abstractmethod
    def mix_one_way(self, direction: nn.Module, projected: Sequence[Tensor], inputs: RecurrentInputs) -> Tensor:
        """Gated output of one direction, B x T x HV."""

    def turned(self, inputs: RecurrentInputs) -> RecurrentInputs:
        """The inputs of a row that is turned around."""
        runs_BT = None if inputs.runs_BT is None else inputs.runs_BT.flip(1)
        return inputs._replace(runs_BT=runs_BT, fla=None if inputs.fla is None else inputs.fla.turned())

    def forward(self, x_BTD: Tensor, inputs: RecurrentInputs) -> Tensor:
        """B x T x D -> B x T x D."""
        projected = self.project(x_BTD)
        forwards, *backwards = self.directions
        mixed_BTV = self.mix_one_way(forwards, projected, inputs)
        for direction in backwards:
            turned_BTV = self.mix_one_way(direction, [x.flip(1) for x in projected], self.turned(inputs))
            mixed_BTV = mixed_BTV + turned_BTV.flip(1)
        out_BTD: Tensor = self.out(mixed_BTV)
        return out_BTD


class ConvolvedMixer(TwoWayMixer):
    """A mixer whose queries, keys and values go through a short convolution, in each direction another one."""

    def __init__(self, config: ResolvedConvolved, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.form = config.form

    def prepare(self, context: ForwardContext, cache: RecurrentState | None) -> RecurrentInputs:  # type: ignore[override]
        states = None if cache is None else cache.convolution
        convolution = convolution_inputs(context, self.form, self.causal, states)
        return super().prepare(context, cache)._replace(convolution=convolution)

    def turned(self, inputs: RecurrentInputs) -> RecurrentInputs:
        inputs = super().turned(inputs)
        return inputs._replace(convolution=ConvolutionInputs(neighbours_that_count(self.form, inputs.runs_BT)))


def by_head(x_BTC: Tensor, heads: int) -> Tensor:
    """B x T x C -> B x H x T x C / H."""
    return x_BTC.unflatten(-1, (heads, -1)).transpose(1, 2)


def exact(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
