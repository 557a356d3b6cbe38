"""Style of all figures: width of a printed page at most, legible, colour-blind safe, reproducible.

Colours, line styles and markers are those of `palette`. Files have no dates and no random names: the same data give the
same bytes.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from lit_llm.report import text
from lit_llm.report.figures.fonts import families, no_font_warnings, spell_out
from lit_llm.studies.palette import (
    BLACK,
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    MARKERS,
    VERMILION,
    LineStyle,
    line_styles,
)

__all__ = ["BLACK", "BLUE", "COLOURS", "DASHES", "GREEN", "GREY", "MARKERS", "VERMILION", "LineStyle", "line_styles"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, PAGE = 3.3, 6.9
"""Width of a figure in inches: one column or two columns of a printed page."""
ROW = 0.17
"""Height of a line of text, in inches."""

STYLE: Any = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "figure.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "lines.markeredgewidth": 0.7,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "svg.hashsalt": "lit-llm",
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "text.hinting": "none",
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
}

P = ParamSpec("P")


@contextmanager
def in_style() -> Iterator[None]:
    """Context in which matplotlib has this style and the installed fonts."""
    from matplotlib import rc_context

    with rc_context({**STYLE, "font.family": list(families())}), no_font_warnings():
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: draw in this style, whatever matplotlib is set to."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with in_style():
            return draw(*args, **kwargs)

    return drawn


def short(name: str, most: int = 60) -> str:
    """A name, without its middle if it is too long."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}…{name[len(name) - (most - 1 - most // 2) :]}"


def panels(
    title: str,
    count: int,
    height: float = 2.1,
    columns: int | None = None,
    named: Collection[str] = (),
    wide: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, and their axes. Raises ValueError for none.

    columns: number of columns of panels, two or three when None; named: entries of the legend below them; wide: whether
    one panel is as wide as two.
    """
    from matplotlib.figure import Figure

    if count < 1:
        raise ValueError(f"{title}: there is nothing to draw")
    across = min(count, columns or (3 if count == 3 else 2))
    down = math.ceil(count / across)
    long = any(_entry(name) > PANEL for name in named)
    width = PAGE if across > 1 or wide or long or len(named) > 8 else PANEL
    _, rows = _legend_shape(named, width)
    figure = Figure(figsize=(width, down * height + ROW * rows + 0.35), layout="constrained")
    retitle(figure, title)
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def retitle(figure: Figure, title: str) -> None:
    """Set the title, wrapped to the figure's width."""
    with in_style():
        figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() / 0.075)))


def _legend_shape(names: Collection[str], width: float) -> tuple[int, int]:
    """(columns, rows) of a legend without overlapping names."""
    if not names:
        return 1, 0
    columns = max(1, min(len(names), int(width / max(map(_entry, names)))))
    return columns, math.ceil(len(names) / columns)


def _entry(name: str) -> float:
    """Width of a legend entry, in inches."""
    return 0.65 + 0.06 * len(short(name))


def legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Draw the legend below the panels, one entry for each name."""
    if handles:
        columns, _ = _legend_shape(handles, figure.get_figwidth())
        names = [short(name) for name in handles]
        figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns)


def scale(axes: Axes, which: Literal["x", "y"], values: Sequence[float], logarithmic: bool) -> None:
    """Set short tick labels as 20k or 1.5M; logarithmic only for positive values that differ threefold."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    finite = [value for value in values if math.isfinite(value)]
    if logarithmic and finite and min(finite) > 0 and max(finite) / min(finite) >= 3:
        getattr(axes, f"set_{which}scale")("log")
        decades = math.log10(max(finite) / min(finite))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text.short(value).replace("-", "−")))


def save(figure: Figure, path: Path, pdf: bool = True) -> list[Path]:
    """Write `<path>.png`, `<path>.svg` and optionally `<path>.pdf`, with reproducible bytes; returns the files.

    The PDF is for a paper: without the title, which the caption has, and with TrueType letters. Subsetting the font
    takes as long as both other files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg", *["pdf"] * pdf)]
    with in_style():
        spell_out(figure)
        # Laid out once: a remaining layout engine would draw the figure again before each file.
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine(None)
        quickly = {"compress_level": 3}  # 5% larger files in half the time
        figure.savefig(files[0], metadata={"Software": None}, pil_kwargs=quickly)
        figure.savefig(files[1], metadata={"Date": None, "Creator": None})
        if not pdf:
            return files
        nothing = {"CreationDate": None, "Creator": None, "Producer": None}
        figure.savefig(files[2], metadata=nothing, bbox_inches=_below_title(figure))
    return files


def _below_title(figure: Figure) -> Any:
    """Hide the title; returns the bounding box of the figure without it, in inches."""
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    title = figure._suptitle  # type: ignore[attr-defined]  # matplotlib has no public access to it
    if title is None:
        return Bbox.from_extents(0, 0, width, height)
    lower = title.get_window_extent().y0 / figure.dpi
    title.set_visible(False)
    return Bbox.from_extents(0, 0, width, lower)
