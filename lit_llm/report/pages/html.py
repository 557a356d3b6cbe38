"""A self-contained HTML page: no network, no script, light and dark, printable."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.report.tables.table import Table

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

PIXELS_PER_INCH = 150
"""Largest scale of a figure; the text of a printed page is 6.9 inches wide."""
LEAST_PER_INCH = 88
"""Smallest scale of a figure: its smallest letters, of 6.5 points, are 8 pixels high."""


@dataclass(frozen=True)
class Embedded:
    """A figure in a page."""

    name: str
    caption: str
    address: str
    """A data: URL with the whole figure."""
    width: int
    """Largest width, in CSS pixels."""
    least: int
    """Smallest legible width, in CSS pixels."""

    @classmethod
    def of(cls, name: str, caption: str, file: Path, inches: float) -> Embedded:
        """The figure of a file. file: an .svg or a .png; inches: width at which it was drawn."""
        kind = {".svg": "svg+xml", ".png": "png"}[file.suffix]
        data = base64.b64encode(file.read_bytes()).decode()
        return cls(
            name,
            caption,
            f"data:image/{kind};base64,{data}",
            round(inches * PIXELS_PER_INCH),
            round(inches * LEAST_PER_INCH),
        )


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page, with its content in the order of the fields."""

    name: str
    """Anchor: `page.html#name`."""
    title: str
    texts: Sequence[str] = ()
    items: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Embedded] = ()
    codes: Sequence[Code] = ()


@dataclass(frozen=True)
class Page:
    """Content of a page."""

    title: str
    question: str
    answer: Sequence[str]
    """Sentences, the first of which is the answer."""
    status: str
    """Progress and date, in one line."""
    sections: Sequence[Section]


def html(page: Page) -> str:
    """The page as HTML; its texts are escaped."""
    return _template().render(page=page)


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("lit_llm.report", "pages")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["marked"] = marked
    return environment.get_template("page.html")


def marked(text: str) -> Markup:
    """The text, escaped, with backticked parts as code."""
    from markupsafe import Markup

    parts = text.split("`")
    if len(parts) % 2 == 0:  # one without its second
        return Markup("{}").format(text)
    return Markup("").join(
        Markup("<code>{}</code>" if at % 2 else "{}").format(piece) for at, piece in enumerate(parts)
    )
