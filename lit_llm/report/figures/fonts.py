"""Fonts for letters that matplotlib's default font lacks: Chinese, Japanese, Korean and others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = "DejaVu Sans"
"""Default font, which comes with matplotlib and so is the same everywhere."""
OTHERS = (
    *(f"{family} {place}" for family in ("Noto Sans CJK", "Source Han Sans") for place in ("SC", "JP", "KR", "TC")),
    *(
        "Noto Sans SC",
        "Noto Sans JP",
        "Noto Sans KR",
        "WenQuanYi Zen Hei",
        "WenQuanYi Micro Hei",
        "Droid Sans Fallback",
    ),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Heiti SC"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Bengali", "Noto Sans Tamil", "Arial Unicode MS", "FreeSans"),
    *("Unifont", "Noto Sans Symbols 2"),
)
"""Families with further letters, the likeliest first; those installed serve as fallbacks of the default."""


@cache
def families() -> tuple[str, ...]:
    """The default font, and the installed fonts with further letters."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return (DEFAULT, *(name for name in OTHERS if name in installed))


@cache
def _letters() -> frozenset[int]:
    """Code points that the families have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters: set[int] = set()
    for family in families():
        letters |= get_font(findfont(FontProperties(family=family))).get_charmap().keys()
    return frozenset(letters)


def without_letters(names: Sequence[str]) -> set[str]:
    """Letters that no installed font has."""
    return {sign for name in names for sign in name if not sign.isspace() and ord(sign) not in _letters()}


def spelled(name: str) -> str:
    """A name with code points in place of letters that no installed font has: `[5F52]`."""
    missing = without_letters([name])
    return "".join(f"[{ord(sign):X}]" if sign in missing else sign for sign in name)


def spell_out(figure: Figure) -> set[str]:
    """Replace letters that no installed font has, which would be empty boxes, by code points. Returns the letters."""
    from matplotlib.text import Text

    missing: set[str] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            names = [label.get_text() for label in axis.get_ticklabels()]
            if lost := without_letters(names):
                missing |= lost
                axis.set_ticks(axis.get_ticklocs(), [spelled(name) for name in names])
    for text in figure.findobj(Text):
        if isinstance(text, Text) and (lost := without_letters([text.get_text()])):
            missing |= lost
            text.set_text(spelled(text.get_text()))
    return missing


@contextmanager
def no_font_warnings() -> Iterator[None]:
    """Silence matplotlib's warnings on missing letters, which are spelt out anyway, and on missing bold faces."""
    logger = logging.getLogger("matplotlib.font_manager")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
            yield
    finally:
        logger.setLevel(before)
