"""A table of strings, and its forms for the terminal, Markdown, CSV and LaTeX. Pages take the table itself."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lit_llm.config.markup import markdown_text, spreadsheet_cell


class Link(str):
    """A cell that is a link in a page."""

    address: str

    def __new__(cls, text: str, address: str) -> Link:
        link = super().__new__(cls, text)
        link.address = address
        return link


@dataclass(frozen=True)
class Table:
    """A table with its heading and notes."""

    name: str
    """Name of its file and its anchor in a page: letters, digits and '-', as `slug` returns."""
    title: str
    """Heading; may be empty."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    first: int
    """Number of columns in the first piece where the table is too wide."""
    notes: tuple[str, ...] = ()
    left: int = 1
    """Number of columns of words, from the left; the others are numbers."""
    folded: str = ""
    """Summary that a page shows in place of the folded table; '' for an unfolded table."""
    keys: int = 1
    """Number of columns that name a row; every piece of a split table begins with them."""
    above: str = ""
    """A line between the title and the table, on all rows."""
    bold: tuple[tuple[int, int], ...] = ()
    """(row, column) of the cells in bold."""


GAP = 2
"""Spaces between two columns in a terminal."""
CONTINUED = "further columns of the same rows"
NARROW = 4
"""Largest number of columns of a LaTeX table in full font size."""
FOLD = 40
"""Largest number of rows of a table that a page does not fold."""


def folded(table: Table) -> Table:
    """The table, folded if it is long."""
    return replace(table, folded=f"{len(table.rows):,} rows") if len(table.rows) > FOLD else table


def slug(name: str) -> str:
    """A name as part of a file name or of an anchor."""
    return re.sub(r"[\W_]+", "-", name).strip("-")


def without(
    hidden: Collection[str], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows without some columns."""
    kept = [at for at, name in enumerate(head) if name not in hidden]
    return [head[at] for at in kept], [[row[at] for at in kept] for row in rows]


def rich_table(*columns: str, left: int = 1) -> RichTable:
    """A plain table whose first `left` columns are words, and the others numbers."""
    table = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table


def in_terminal(table: Table, width: int) -> Iterator[RenderableType]:
    """Heading, table and notes; a table that is too wide is split, and each piece has the columns that name rows."""
    if table.title:
        yield Text(table.title, style="bold")
    if table.above:
        yield Text(table.above, style="dim")
    pieces = _pieces(table, width)
    for at, columns in enumerate(pieces):
        if at:
            yield Text(f"{CONTINUED} ({at + 1} of {len(pieces)})", style="dim")
        left = sum(index < table.left for index in columns)
        rows = [[row[index] for index in columns] for row in table.rows]
        yield _lines([table.head[index] for index in columns], rows, left, width)
    yield from (Text(f"· {note}", style="dim") for note in table.notes)


def stacked(tables: Iterable[Table], width: int) -> Iterator[RenderableType]:
    """Tables for the terminal, one below the other, with empty lines between them."""
    for at, table in enumerate(tables):
        yield from (*[Text()] * bool(at), *in_terminal(table, width))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], left: int, width: int) -> RenderableType:
    """Aligned rows. Cells are not parsed: in a plain string rich would interpret :smiles: and [tags]."""
    widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    if sum(widths) + GAP * len(widths) > width or any("\n" in cell for row in rows for cell in row):
        table = rich_table(*head, left=left)
        for row in rows:
            table.add_row(*map(Text, row))
        return table
    # Without folding, plain lines do: a rich table of a thousand arms would take a tenth of a report's time.
    lines = [_line(cells, widths, left) for cells in (head, *rows)]
    return Text("\n").join([Text(lines[0], style="bold"), *map(Text, lines[1:])])


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    gaps = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    padded = [cell + gap if at < left else gap + cell for at, (cell, gap) in enumerate(zip(cells, gaps, strict=True))]
    return (" " * GAP).join(padded).rstrip()


def _pieces(table: Table, width: int) -> list[list[int]]:
    """Indices of the columns in each piece: all columns if they fit, else those up to `first`, then the others."""
    longest = [max(cell_len(row[index]) for row in [table.head, *table.rows]) + GAP for index in range(len(table.head))]
    if sum(longest) <= width:
        return [[*range(len(table.head))]]
    keys = [*range(table.keys)]
    pieces = [[*keys]]
    for index in range(table.keys, len(table.head)):
        full = len(pieces[-1]) > len(keys) and sum(longest[at] for at in (*pieces[-1], index)) > width
        # Words may be folded, numbers may not.
        if (index == table.first and len(pieces) == 1) or (full and index >= table.left):
            pieces.append([*keys, index])
        else:
            pieces[-1].append(index)
    return pieces


def in_markdown(table: Table) -> str:
    """The table in Markdown, with its title as a heading of the second level."""
    rule = ["---" if index < table.left else "---:" for index in range(len(table.head))]
    cells = [
        [
            f"**{markdown_text(cell)}**" if (at, column) in table.bold else markdown_text(cell)
            for column, cell in enumerate(row)
        ]
        for at, row in enumerate(table.rows)
    ]
    rows = [[markdown_text(cell) for cell in table.head], rule, *cells]
    lines = [f"## {table.title}", ""] if table.title else []
    lines += [table.above, ""] if table.above else []
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join(lines)


def in_csv(table: Table) -> str:
    """The table as CSV, with rounded numbers; comparison.csv and runs.csv have them in full."""
    out = io.StringIO()
    cells = [map(spreadsheet_cell, row) for row in (table.head, *table.rows)]
    csv.writer(out, lineterminator="\n").writerows(cells)
    return out.getvalue()


def in_latex(tables: Iterable[Table]) -> str:
    """Floating tables for a document that loads booktabs."""
    head = "% Each table needs \\usepackage{booktabs}.\n"
    return head + "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    def line(row: Sequence[str]) -> str:
        return " & ".join(map(_cell, row)) + r" \\"

    def body(at: int, row: Sequence[str]) -> str:
        cells = [rf"\textbf{{{_cell(x)}}}" if (at, column) in table.bold else _cell(x) for column, x in enumerate(row)]
        return " & ".join(cells) + r" \\"

    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    below = [*[table.above] * bool(table.above), *table.notes]
    notes = [rf"\par\footnotesize {latex('; '.join(below))}."] if below else []
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            *[r"\small\setlength{\tabcolsep}{4pt}"] * (len(table.head) > NARROW),
            rf"\caption{{{latex(table.title)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(table.head),
            r"\midrule",
            *(body(at, row) for at, row in enumerate(table.rows)),
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def _cell(text: str) -> str:
    """A cell in LaTeX; a bracket at its start must not become an argument of the line end before it."""
    escaped = latex(text)
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "÷": r"$\div$",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "–": "--",
    "…": r"\ldots{}",
    "·": r"$\cdot$",
    "†": r"\dag{}",
    "≠": r"$\neq$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "α": r"$\alpha$",
    "\n": " ",
}
_SIGNED = re.compile(r"(?<![\w.])-(?=[\d.])")
"""The minus of a number, in contrast to other hyphens."""


def latex(text: str) -> str:
    """Plain text, escaped for LaTeX."""
    return "".join(_LATEX.get(sign, sign) for sign in _SIGNED.sub("−", text))
