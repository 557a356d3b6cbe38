"""Means of a measure along positions or steps, gathered batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Name and places of the values of a curve."""

    name: str | None
    places: Sequence[int]
    bucketed: bool = True


class Curve:
    """Sums of one measure along an axis by layer; the layer is None for a measure of the whole model."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.sums: dict[int | None, np.ndarray] = {}
        """{layer: 2 x N, sums of the values and their counts}."""

    def add(self, layer: int | None, values_BN: Tensor, counted_BN: Tensor | None = None) -> None:
        values = values_BN.double().cpu().numpy()
        counted = np.ones(values.shape, dtype=bool) if counted_BN is None else counted_BN.cpu().numpy()
        new = np.stack([np.where(counted, values, 0.0).sum(0), counted.sum(0)])
        self.sums[layer] = self.sums[layer] + new if layer in self.sums else new

    @property
    def pooled(self) -> np.ndarray:
        """2 x N: sums and counts over all layers."""
        return np.sum(list(self.sums.values()), axis=0)

    def means(self) -> np.ndarray:
        """N means over all layers; NaN where nothing was counted."""
        total, count = self.pooled
        return np.divide(total, count, out=np.full(len(total), math.nan), where=count > 0)

    def rows(self, measure: str, buckets: int) -> Iterator[dict[str, Any]]:
        """Records of the mean in each bucket of places, over all layers and in each."""
        count = len(self.axis.places)
        parts = np.array_split(np.arange(count), min(buckets, count) if self.axis.bucketed else count)
        for layer, sums in {None: self.pooled, **self.sums}.items():
            for part in parts:
                total, counted = sums[:, part].sum(1)
                if counted:
                    first, last = (self.axis.places[end] if self.axis.name else None for end in (part[0], part[-1]))
                    place = {"axis": self.axis.name, "first": first, "last": last, "layer": layer}
                    yield {"measure": measure, **place, "value": float(total / counted)}


class Curves(dict[tuple[str, str | None], Curve]):
    """Curves by (measure, name of the axis)."""

    def add(
        self, measure: str, axis: Axis, layer: int | None, values_BN: Tensor, counted_BN: Tensor | None = None
    ) -> None:
        """Add values at each place of the axis; `counted_BN` masks out those that do not count."""
        self.setdefault((measure, axis.name), Curve(axis)).add(layer, values_BN, counted_BN)


def log_slope(places: Sequence[int] | np.ndarray, values: np.ndarray) -> float:
    """Least-squares slope of log(value) against log(place) over positive values; NaN for fewer than two."""
    x, y = np.asarray(places, dtype=float), np.asarray(values)
    kept = (y > 0) & np.isfinite(y)
    if kept.sum() < 2:
        return math.nan
    return float(np.polyfit(np.log(x[kept]), np.log(y[kept]), 1)[0])
