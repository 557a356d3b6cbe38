"""Line style of each arm, in all figures and in MLflow: one colour, one dash, one marker.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color) without their yellow, which vanishes on white. In a
factorial the colour is the level of one factor, the dash that of a second, the marker that of all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lit_llm.studies.load import Ablation, Arm

BLACK, GREY = "#000000", "#8c8c8c"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
COLOURS = (BLACK, BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
MARKERS = "osD^vPX<>"

MOST_TOGETHER = 8
"""Most lines of one panel; a larger factorial has a panel for each level of its first factor."""


@dataclass(frozen=True)
class LineStyle:
    """Colour, dashes and marker of one name in all panels."""

    colour: str
    dashes: Any
    marker: str


def line_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """{name: its style}, in order: the first, the baseline's, is black and solid. 28 lines are distinct.

    A `Series` keeps its style.
    """
    return {
        name: getattr(name, "style", None)
        or LineStyle(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


class Series(str):
    """The printed name of a line or a mark, with its style."""

    style: LineStyle

    def __new__(cls, text: str, style: LineStyle) -> Series:
        name = super().__new__(cls, text)
        name.style = style
        return name


def panel_factors(ablation: Ablation) -> list[str]:
    """The factors whose levels are panels: those of `compare.stratify_by`, else the first of a large factorial."""
    grid = ablation.study.grid
    if grid is None or grid.design != "factorial":
        return []
    strata = [name for name in ablation.study.compare.stratify_by if name in ablation.factors]
    if strata or len(ablation.arms) <= MOST_TOGETHER or len(ablation.factors) < 2:
        return strata
    return list(ablation.factors)[:1]


@dataclass(frozen=True)
class Scale:
    """A factor that colours or dashes distinguish."""

    factor: str
    """Key of the factor; empty for the named arms."""
    levels: tuple[str, ...]

    def level(self, arm: Arm) -> str:
        return arm.levels[self.factor] if self.factor else arm.group

    def place(self, arm: Arm) -> int:
        return self.levels.index(self.level(arm))


def arm_styles(ablation: Ablation) -> dict[str, LineStyle]:
    """{arm: its style}; arms that differ only in the factors of the panels differ only in the marker."""
    crossed = [arm for arm in ablation.arms if arm.levels]
    others = [arm.name for arm in ablation.arms if not arm.levels]
    grid = ablation.study.grid
    if grid is None or grid.design != "factorial":
        return line_styles(arm.name for arm in ablation.arms)
    groups, apart = list(dict.fromkeys(arm.group for arm in crossed)), panel_factors(ablation)
    scales = [Scale("", tuple(groups))] if len(groups) > 1 else []
    scales += [Scale(name, tuple(labels)) for name, labels in ablation.factors.items() if name not in apart]
    first, second = [*scales[:2], None, None][:2]
    if (first and len(first.levels) > len(COLOURS)) or (second and len(second.levels) > len(DASHES)):
        kept = {arm.name: tuple(scale.level(arm) for scale in scales) for arm in crossed}
        by_levels = line_styles(map(str, kept.values()))
        styles = {name: by_levels[str(levels)] for name, levels in kept.items()}
    else:
        rest = {arm.name: _rest(arm, scales[2:], apart) for arm in crossed}
        markers = {levels: MARKERS[i % len(MARKERS)] for i, levels in enumerate(dict.fromkeys(rest.values()))}
        styles = {
            arm.name: LineStyle(
                COLOURS[first.place(arm)] if first else BLACK,
                DASHES[second.place(arm)] if second else DASHES[0],
                markers[rest[arm.name]],
            )
            for arm in crossed
        }
    # Arms outside the grid take the colours that its levels leave.
    free = [colour for colour in COLOURS if colour not in {style.colour for style in styles.values()}] or list(COLOURS)
    for place, name in enumerate(others):
        styles[name] = LineStyle(
            free[place % len(free)], DASHES[place // len(free) % len(DASHES)], MARKERS[-1 - place % 4]
        )
    return styles


def _rest(arm: Arm, scales: Iterable[Scale], apart: Iterable[str]) -> tuple[str, ...]:
    """Levels that neither colour nor dash distinguishes."""
    return (*(scale.level(arm) for scale in scales), *(arm.levels[name] for name in apart))
