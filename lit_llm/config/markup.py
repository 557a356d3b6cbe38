"""Escapes users' names for spreadsheets and Markdown, so that they stay plain text."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

_NUMBER = re.compile(
    r"[+-]?(\d[\d.,]*|\.\d+|inf|nan)(e[+-]?\d+)?%?(\s[\[(±†](inf|nan|[\d.,±†%e\[\]() +-])*)?", re.IGNORECASE
)
"""A number, perhaps with an interval, a standard error or a sign; no name and no call of a function."""


def spreadsheet_cell(value: T) -> T | str:
    """A cell that no spreadsheet takes for a formula: `=1+1` gets an apostrophe. Numbers and intervals stay."""
    formula = (
        isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not _NUMBER.fullmatch(value) and value != "-"
    )
    return f"'{value}" if formula else value


def markdown_text(text: str) -> str:
    """Plain text in Markdown, also inside a cell of a table.

    Brackets of an interval and underscores inside a name are no markup, and stay as they are.
    """
    # A link or an image ends in `](`, `][` or, in a definition of its address, `]:`.
    escaped = re.sub(r"([\\|`*~]|\](?=[(\[:])|<(?=[A-Za-z/!?]))", r"\\\1", text)
    # CommonMark: a run of underscores between letters or digits emphasises nothing.
    escaped = re.sub(r"(?<![^\W_])(?<!_)_+|_+(?!_)(?![^\W_])", lambda run: r"\_" * len(run[0]), escaped)
    return escaped.replace("\r", "").replace("\n", "<br>")


def code_span(text: str) -> str:
    """Text as code within a line of Markdown, whatever backticks it has."""
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    gap = " " if "`" in text else ""
    return f"{fence}{gap}{' '.join(text.splitlines())}{gap}{fence}"
