"""The decoder-decoder family (YOCO, arXiv 2405.05254): decoder-only, with keys and values made once for many layers."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.components.attention.module import SharedKeyValues, rotation_of
from lit_llm.components.forward_context import CacheRows, ForwardContext
from lit_llm.components.kv_cache import KeyValues, StackCache
from lit_llm.models.families import DecoderOnly
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.stacks import Stack


class SharingStack(Stack):
    """Stack of a self-decoder and a cross-decoder, whose layers share keys and values made once:

    x ─ self-decoder's layers ─┬─ cross-decoder's layers ─ norm ─▶
                               └─ norm ─ shared_kv ─▲ (each of them)

    All layers are in `layers`, the cross-decoder's last: their names, and so their initial values, are those of a
    decoder-only model.
    """

    def __init__(self, model: ResolvedModel, side: str) -> None:
        super().__init__(model, side)
        assert model.shared_kv is not None
        self.self_layers = model.self_layers
        """Number of layers before the shared keys and values."""
        self.shared_kv_norm = self._norm_after(model, side)
        self.shared_kv = SharedKeyValues(model.shared_kv, model.width(side))

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """B x T x D -> B x T x D; for prompts B x 1 x D, since the cross-decoder runs for the last token alone."""
        x_BTD = self._run(x_BTD, context, 0, self.self_layers)
        normed_BTD = x_BTD if self.shared_kv_norm is None else self.shared_kv_norm(x_BTD)
        keys_values = self.shared_kv(normed_BTD, rotation_of(context, "self", self.shared_kv.config))
        if context.cache is not None and (shared := context.cache.shared_kv) is not None:
            reads_prompts, lengths = not shared.filled, shared.rows
            keys_values = shared.add(*keys_values)
            if reads_prompts:
                x_BTD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), lengths.lengths_B - 1][:, None]
                positions = {"self": lengths.next_positions() - 1}
                context = ForwardContext(x_BTD, lengths.mask(), positions, cache=context.cache)
        context.shared_kv = keys_values
        return self._apply_final_norm(self._run(x_BTD, context, self.self_layers, len(self.layers)))

    def new_cache(self, rows: CacheRows) -> StackCache:
        """An empty cache for the self-decoder's layers and the shared keys and values."""
        return StackCache(super().new_cache(rows).layers, KeyValues(rows.self_lengths))


class DecoderDecoder(DecoderOnly):
    """YOCO: embedding ─ drop ─ self-decoder ─▶ shared keys and values ─▶ cross-decoder ─ unembedding"""

    stack = SharingStack
    decoder: SharingStack
