"""The decoder-decoder family (YOCO, arXiv 2405.05254): decoder-only, with keys and values made once for many layers."""

from __future__ import annotations

from torch import Tensor

from lit_llm.components.attention.masks import AttentionMask
from lit_llm.components.attention.module import SharedKeyValues
from lit_llm.components.attention.rope import Rotations
from lit_llm.models.families import DecoderOnly
from lit_llm.models.resolve import ResolvedModel
from lit_llm.models.stacks import Stack, rotation_of


class SharingStack(Stack):
    """
    x ─ self-decoder's layers ─┬─ cross-decoder's layers ─ norm ─▶
                               └─ norm ─ shared_kv ─▲ (each of them)

    All layers are in `layers`, the cross-decoder's after the others: they have the names, and so the first values, of
    a decoder-only model's.
    """

    def __init__(self, model: ResolvedModel, side: str) -> None:
        super().__init__(model, side)
        assert model.shared_kv is not None
        self.shared_kv_norm = self._norm_after(model, side)
        self.shared_kv = SharedKeyValues(model.shared_kv, model.width(side))

    def finish(self, x_BTD: Tensor, visible: AttentionMask, rotations: Rotations) -> Tensor:
        """The cross-decoder, over keys and values of all tokens of the self-decoder's output."""
        return self.answer(x_BTD, self.keys_values(x_BTD, rotations), visible, rotations)

    def keys_values(self, x_BTD: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor]:
        """The shared keys and values of what the self-decoder has read: B x H x T x K each."""
        normed_BTD = x_BTD if self.shared_kv_norm is None else self.shared_kv_norm(x_BTD)
        made: tuple[Tensor, Tensor] = self.shared_kv(normed_BTD, rotation_of(rotations, "self", self.shared_kv.config))
        return made

    def answer(
        self, x_BTD: Tensor, shared_kv: tuple[Tensor, Tensor], visible: AttentionMask, rotations: Rotations
    ) -> Tensor:
        """The cross-decoder for the tokens of x_BTD, which may be a few of those whose keys and values there are."""
        for layer in list(self.layers)[self.own_layers :]:
            x_BTD = self._run(layer, x_BTD, visible, rotations, None, None, None, 0, None, *shared_kv)
        return super().finish(x_BTD, visible, rotations)


class DecoderDecoder(DecoderOnly):
    """embedding ─ drop ─ self-decoder ─▶ shared keys and values ─▶ cross-decoder ─ unembedding"""

    stack = SharingStack
    decoder: SharingStack
