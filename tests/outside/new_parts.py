"""A sequence mixer and a feed-forward network that lit-llm does not have, by its protocol alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.forward_context import CacheRows, ForwardContext
from lit_llm.components.kv_cache import CacheLengths
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.part import CacheBytes, Part, TensorShape, Widths


class MovingAverage(Part):
    """y_t = g y_{t-1} + (1 - g) W_in x_t, then W_out: one learned g for each channel."""

    module: ClassVar[str] = "tests.outside.new_parts:MovingAverageModule"
    causal_only: ClassVar[str] = "a moving average is causal"

    channels: int

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        return {
            "gate": (self.channels,),
            "inward.weight": (self.channels, widths.row),
            "out.weight": (widths.row, self.channels),
        }

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        return CacheBytes(states=entry * self.channels)


class AverageState:
    """The last average of each row."""

    def __init__(self, rows: CacheLengths) -> None:
        self.rows = rows
        self.state_BC: Tensor | None = None

    def keep(self, rows: Sequence[int]) -> None:
        assert self.state_BC is not None
        self.state_BC = self.state_BC[rows]

    def replace(self, rows: Sequence[int], other: AverageState) -> None:
        assert self.state_BC is not None
        assert other.state_BC is not None
        self.state_BC[rows] = other.state_BC

    def bytes(self) -> list[int]:
        assert self.state_BC is not None
        return [row.nbytes for row in self.state_BC]


class MovingAverageModule(LayerPart):
    def __init__(self, config: MovingAverage, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.gate = nn.Parameter(torch.ones(config.channels))
        self.inward = nn.Linear(widths.row, config.channels, bias=False)
        self.out = nn.Linear(config.channels, widths.row, bias=False)

    def prepare(self, context: ForwardContext, cache: Any) -> tuple[Tensor | None, AverageState | None]:
        documents = context.mask.documents
        return None if documents is None else documents[0], cache

    def forward(self, x_BTD: Tensor, inputs: tuple[Tensor | None, AverageState | None]) -> Tensor:
        documents_BT, cache = inputs
        gate_C, added_BTC = torch.sigmoid(self.gate), self.inward(x_BTD)
        state_BC = None if cache is None else cache.state_BC
        outs = []
        for t in range(x_BTD.shape[1]):
            before_BC = torch.zeros_like(added_BTC[:, 0]) if state_BC is None else state_BC
            if documents_BT is not None and t:
                before_BC = before_BC * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None]
            state_BC = gate_C * before_BC + (1 - gate_C) * added_BTC[:, t]
            outs.append(state_BC)
        y_BTC = torch.stack(outs, dim=1)
        if cache is not None:
            last_B = cache.rows.lengths_B - 1 if cache.state_BC is None else torch.zeros_like(cache.rows.lengths_B)
            cache.state_BC = y_BTC[torch.arange(len(y_BTC)), last_B]
        return self.out(y_BTC)

    def new_cache(self, rows: CacheRows) -> AverageState:
        return AverageState(rows.self_lengths)


class LowRankFeedForward(Part):
    """down(gelu(up (narrow x))): the inner matrix in two factors."""

    module: ClassVar[str] = "tests.outside.new_parts:LowRankModule"

    d_ff: int
    rank: int

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        return {
            "narrow.weight": (self.rank, widths.row),
            "up.weight": (self.d_ff, self.rank),
            "down.weight": (widths.row, self.d_ff),
        }


class LowRankModule(LayerPart):
    def __init__(self, config: LowRankFeedForward, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.narrow = nn.Linear(widths.row, config.rank, bias=False)
        self.up = nn.Linear(config.rank, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, widths.row, bias=False)

    def forward(self, x_BTD: Tensor, inputs: None) -> Tensor:
        return self.down(F.gelu(self.up(self.narrow(x_BTD))))
