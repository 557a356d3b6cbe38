"""Parametrization: how initial values, learning rates and multipliers follow a model's width and depth.

standard: none of them does, beyond the initial values. mup: maximal update parametrization (Tensor Programs V, arXiv
2203.03466, table 8; for Muon's orthogonal updates the spectral condition, arXiv 2310.17813). completep: mup, and
residual branches divided by the depth (arXiv 2505.01618, table 1 with alpha 1). `docs/scaling.md` has the rules in a
table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Section, config_error

BASE_HEAD_DIM = 64


class Parametrization(Section):
    """Rules relative to a base model, whose learning rate serves larger models too."""

    kind: Literal["standard", "mup", "completep"] = "standard"
    """standard: one learning rate for all parameters. mup: learning rates, initial values, logits and attention scores
    follow the width. completep: mup, and residual branches follow the depth."""
    base_width: int | None = Field(None, gt=0)
    """d_model of the base model, in each stack. A model of this width is that of `standard`."""
    base_depth: int | None = Field(None, gt=0)
    """Layers of a stack of the base model, for completep. mup ignores it, so that a study may switch `kind` alone."""
    base_head_dim: int = Field(BASE_HEAD_DIM, gt=0)
    """head_dim of the base model's attention. Scores are QKᵀ sqrt(base_head_dim) / head_dim: at this size those of
    `standard`. Mixers with a state have no such factor: they keep their head_dim."""

    @model_validator(mode="after")
    def _fits(self) -> Parametrization:
        if problems := [*self._problems()]:
            raise config_error(*problems)
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.kind == "standard":
            for key in ("base_width", "base_depth"):
                if getattr(self, key) is not None:
                    yield key, "has no effect with kind standard; write `kind: mup` or `kind: completep`"
            if self.base_head_dim != BASE_HEAD_DIM:
                yield "base_head_dim", "has no effect with kind standard; write `kind: mup` or `kind: completep`"
            return
        if self.base_width is None:
            yield "base_width", f"{self.kind} needs the d_model of the model whose learning rate it carries over"
        if self.kind == "completep" and self.base_depth is None:
            yield "base_depth", "completep needs the layers of a stack of the model whose learning rate it carries over"

    def width_multiplier(self, width: int) -> float:
        """A width over the base model's; 1 with kind standard."""
        return 1.0 if self.base_width is None else width / self.base_width

    def depth_multiplier(self, layers: int) -> float:
        """A stack's layers over the base model's; 1 unless the kind is completep."""
        return layers / self.base_depth if self.kind == "completep" and self.base_depth else 1.0

    def resolved(self, widths: set[int], depths: set[int]) -> Parametrization:
        """The same rules for a model of these widths and depths, in canonical form: equal rules compare equal.

        Attention scores are not among them: their factor is the attention's `scale`.
        """
        flat = all(self.depth_multiplier(layers) == 1 for layers in depths)
        if flat and all(self.width_multiplier(width) == 1 for width in widths):
            return Parametrization()
        return Parametrization(
            kind="mup" if flat else self.kind, base_width=self.base_width, base_depth=None if flat else self.base_depth
        )
