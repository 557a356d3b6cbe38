"""Slopes of activations by width or depth, for the coordinate check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lit_llm.runs.coordinates import Coordinate

RESIDUAL_STREAM = "residual stream"
"""End of the name of a stack's last state before its norm."""
ROUTER = "router"
"""End of the name of the logits of a layer's router."""
ROUTER_UPDATE = "router update"
"""End of the name of what a router's moved matrix adds to its logits: (W - W_0) x."""
UNALIGNED = -0.5
"""Slope of a sum over m inputs of random sign, whose entries move by 1/m."""
CLEAR = 0.25
"""Slope beyond which a part breaks: a factor of 1.4 for four times the size."""


@dataclass(frozen=True)
class Slope:
    """Least-squares slope of a logarithm over the logarithm of the size."""

    value: float
    half: float | None
    """Half of its 95% interval; None for two models, which have none."""

    @property
    def rises(self) -> bool:
        """True for a slope clearly above 0."""
        return self.value > max(CLEAR, self.half or 0.0)

    def falls(self, below: float = 0.0) -> bool:
        """True for a slope clearly below a number."""
        return self.value < below - max(CLEAR, self.half or 0.0)


@dataclass(frozen=True)
class PartSlopes:
    """Slopes of one part."""

    axis: str
    part: str
    first: Slope | None
    """Of the activations before training; None where they are zero."""
    last: Slope | None
    """Of the activations after the last step."""
    change: Slope | None
    """Of their change in training."""

    @property
    def verdict(self) -> Literal["", "grows", "vanishes"]:
        """Direction in which the part breaks with the size, or ''.

        Activations may fall with the size, as logits at the start do in mup: their changes may not. By depth the change
        of the residual stream may: it is the sum of more branches, divided by their number, and begins at random. That
        of a router's logits may too: much of it is what the initial matrix makes of moved inputs. The update of its
        matrix may fall as a sum over inputs that do not line up with it, but no faster.
        """
        if any(slope.rises for slope in (self.last, self.change) if slope is not None):
            return "grows"
        may_fall = (self.axis == "depth" and self.part.endswith(RESIDUAL_STREAM)) or self.part.endswith(ROUTER)
        below = UNALIGNED if self.axis == "width" and self.part.endswith(ROUTER_UPDATE) else 0.0
        return "vanishes" if self.change is not None and self.change.falls(below) and not may_fall else ""


def part_slopes(measured: Sequence[Coordinate]) -> list[PartSlopes]:
    """The slopes of each part along each axis, in the order of measurement."""
    steps = max(one.step for one in measured)
    slopes = []
    for axis, part in dict.fromkeys((one.axis, one.part) for one in measured):
        of_part = [one for one in measured if (one.axis, one.part) == (axis, part)]
        start, end = ([one for one in of_part if one.step == step] for step in (0, steps))
        first, last = (_slope([(one.size, one.scale) for one in ones]) for ones in (start, end))
        slopes.append(PartSlopes(axis, part, first, last, _slope([(one.size, one.change) for one in end])))
    return slopes


def _slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """The slope of these (size, value); None where a value is zero or not finite."""
    import numpy as np
    from scipy.special import stdtrit

    if any(not (math.isfinite(value) and value > 0) for _, value in points):
        return None
    x, y = np.log(np.array(points, float)).T
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    left, degrees = y - y.mean() - slope * x, len(points) - 2
    error = math.sqrt(left @ left / degrees / (x @ x)) if degrees else None
    return Slope(slope, None if error is None else float(stdtrit(degrees, 0.975)) * error)
