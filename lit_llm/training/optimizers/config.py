"""Settings of the optimisers. Weight decay applies to matrices, not to scales."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Items, OneOf, Section, config_error

Factors = dict[str, Annotated[float, Field(ge=0)]]
"""{group of parameters: factor}."""


class GroupFactors(Section):
    """Factors for groups of parameters; `lit_llm/models/parameter_groups.py` says what is in which."""

    lr_groups: Factors = Field({}, exclude_if=lambda value: not value)
    """Factors of the learning rate by group, as in `{embeddings: 0.1, cross_attention: 2}`. Groups: embeddings, output,
    norms, residual, attention, feed_forward, or one part of the layers by its key, which goes before the last two. At 0
    a group stays as it begins. Weight decay is multiplied by the learning rate, so it changes alike."""
    weight_decay_groups: Factors = Field({}, exclude_if=lambda value: not value)
    """Factors of the weight decay by group, `{embeddings: 0}`. Scales and biases have no decay."""


class AdamW(GroupFactors):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps both moments in 8 bits, in blocks of 256 (bitsandbytes, arXiv 2110.02861)."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: Items[Annotated[float, Field(ge=0, lt=1)]] = Field((0.9, 0.95), min_length=2, max_length=2)
    """Decay of the first and the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices per step, times the learning rate."""

    def state_bytes(self, rows: int, columns: int, inside: bool) -> float:
        """Bytes kept for a parameter, inside a layer or in an embedding; a vector is one row."""
        entries = rows * columns
        # bitsandbytes keeps small tensors in float32; a block of 256 entries has a float32 scale.
        eight_bit = self.kind == "adamw_8bit" and entries >= 4096
        return 2 * entries * (1 + 4 / 256) if eight_bit else 8 * entries


class Adafactor(GroupFactors):
    """Adafactor (arXiv 1804.04235) without factorisation, as RedLLM's authors used it (arXiv 2510.26622).

    v <- b v + (1 - b)(g² + 1e-30) with b = 1 - t^-decay; u = g / sqrt(v), divided by max(1, RMS(u) / clip_threshold);
    the step is lr x u, times max(eps, RMS(parameter)) where the parameter's scale counts. RMS(parameter) is taken
    before weight decay. No first moment.
    """

    kind: Literal["adafactor"] = "adafactor"
    """Adafactor, one second moment per entry."""
    lr: float = Field(1e-2, gt=0)
    """Peak learning rate; with parameter_scale relative to the parameter's size."""
    decay: float = Field(0.8, gt=0)
    """Exponent of the second moment's decay."""
    clip_threshold: float = Field(1.0, gt=0)
    """Largest root mean square of an update before the learning rate."""
    parameter_scale: bool = True
    """Multiply by the parameter's root mean square. The paper does not tell whether it did."""
    eps: float = Field(1e-3, gt=0)
    """Smallest root mean square of a parameter that counts."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices per step, times the learning rate."""

    def state_bytes(self, rows: int, columns: int, inside: bool) -> float:
        """Bytes kept for a parameter, inside a layer or in an embedding; a vector is one row."""
        return 4 * rows * columns


class FactoredAdafactor(GroupFactors):
    """Adafactor with the second moment of a matrix as one row and one column, as torch's.

    With r and c the moments of a matrix's rows and columns, v = r c / mean(r). The rest is as in Adafactor, the
    parameter's scale always on. Equal to torch's with eps (1e-15, eps), but for gradients below 1e-7: torch has a floor
    under mean(r), the paper adds 1e-30 to squared gradients.
    """

    kind: Literal["adafactor_factored"] = "adafactor_factored"
    """Adafactor, factored."""
    lr: float = Field(1e-2, gt=0)
    """Peak learning rate, relative to the parameter's size; in step t at most 1 / sqrt(t)."""
    decay: float = Field(0.8, gt=0)
    """Exponent of the second moment's decay."""
    clip_threshold: float = Field(1.0, gt=0)
    """Largest root mean square of an update before the learning rate."""
    eps: float = Field(1e-3, gt=0)
    """Smallest root mean square of a parameter that counts."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices per step, times the learning rate."""

    def state_bytes(self, rows: int, columns: int, inside: bool) -> float:
        """Bytes kept for a parameter, inside a layer or in an embedding; a vector is one row."""
        return 4 * (rows + columns if rows > 1 else columns)


def shape_factor(scaling: str, rows: float, columns: float) -> float:
    """Factor of Muon's learning rate for a matrix of this shape."""
    return 0.2 * math.sqrt(max(rows, columns)) if scaling == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


class Muon(GroupFactors):
    """Momentum orthogonalised by Newton-Schulz for the matrices inside layers, AdamW for embeddings and scales.

    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scaling by shape: "Muon is
    scalable for LLM training", arXiv 2502.16982.
    """

    kind: Literal["muon"] = "muon"
    """Muon with AdamW."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate of the matrices."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead by one step of momentum."""
    scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scaling of the learning rate by a matrix's shape. match_rms_adamw: 0.2 sqrt(max(rows, columns)), for AdamW's
    rates; original: sqrt(max(1, rows / columns))."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices per step, times the learning rate."""
    adamw: AdamW = AdamW()
    """AdamW for embeddings, the output matrix, tables of relative biases and scales."""

    @model_validator(mode="after")
    def _fits(self) -> Muon:
        message = "stands beside `adamw`: `optimizer.%s` holds for all parameters of muon and of adamw"
        keys = [key for key in GroupFactors.model_fields if getattr(self.adamw, key)]
        if keys:
            raise config_error(*((f"adamw.{key}", message % key) for key in keys))
        return self

    def state_bytes(self, rows: int, columns: int, inside: bool) -> float:
        """Bytes kept for a parameter, inside a layer or in an embedding; a vector is one row."""
        return 4 * rows * columns if inside and rows > 1 else self.adamw.state_bytes(rows, columns, inside)


Optimizer = Annotated[AdamW | Adafactor | FactoredAdafactor | Muon, OneOf(default=AdamW)]
