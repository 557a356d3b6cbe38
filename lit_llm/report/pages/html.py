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
"""A figure is shown at most this large; a printed page's text is 6.9 inches wide."""
LEAST_PER_INCH = 88
"""And at least so large: its smallest letters, of 6.5 points, are 8 pixels high."""


@dataclass(frozen=True)
class Embedded:
    """A figure in a page."""

    name: str
    caption: str
    address: str
    """A data: address that holds all of it."""
    width: int
    """At most, in CSS pixels."""
    least: int
    """Of pixels that it can be read at."""

    @classmethod
    def of(cls, name: str, caption: str, file: Path, inches: float) -> Embedded:
        """file: an .svg or a .png; inches: how wide it was drawn."""
        kind = {".svg": "svg+xml", ".png": "png"}[file.suffix]
        held = base64.b64encode(file.read_bytes()).decode()
        return cls(
            name,
            caption,
            f"data:image/{kind};base64,{held}",
            round(inches * PIXELS_PER_INCH),
            round(inches * LEAST_PER_INCH),
        )


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page; what it holds comes in this order."""

    name: str
    """Of its place: `page.html#name`."""
    title: str
    texts: Sequence[str] = ()
    items: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Embedded] = ()
    codes: Sequence[Code] = ()


@dataclass(frozen=True)
class Page:
    """What is on it."""

    title: str
    question: str
    answer: Sequence[str]
    """Sentences, the first of which is the answer."""
    status: str
    """How far it is and when it was made, in a line."""
    sections: Sequence[Section]


def html(page: Page) -> str:
    """The page; whatever its texts hold is text there, never markup."""
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
    """Escaped, with what stands between backticks as code."""
    from markupsafe import Markup

    parts = text.split("`")
    if len(parts) % 2 == 0:  # one without its second
        return Markup("{}").format(text)
    return Markup("").join(
        Markup("<code>{}</code>" if at % 2 else "{}").format(piece) for at, piece in enumerate(parts)
    )
