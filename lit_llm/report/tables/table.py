"""A table in words, and the forms it is shown in: terminal, Markdown, CSV, LaTeX. The page takes it as it is."""

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
    """A cell that leads somewhere, where it is shown in a page."""

    address: str

    def __new__(cls, text: str, address: str) -> Link:
        link = super().__new__(cls, text)
        link.address = address
        return link


@dataclass(frozen=True)
class Table:
    """A table with its heading and its notes."""

    name: str
    """Of its file and its place in a page: letters, digits and '-', as `slug` makes it."""
    title: str
    """Empty where it needs none."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    first: int
    """Columns of the upper half where the table is too wide."""
    notes: tuple[str, ...] = ()
    left: int = 1
    """Columns of words; the others are numbers."""
    folded: str = ""
    """What a page says in place of the table until it is asked for; '' shows it."""
    keys: int = 1
    """Columns that name a row: every piece of a table that is cut begins with them."""
    above: str = ""
    """A line between the title and the table, of what holds for all rows."""
    bold: tuple[tuple[int, int], ...] = ()
    """(row, column) of the cells in bold."""


GAP = 2
"""Columns of a terminal between two of a table."""
CONTINUED = "further columns of the same rows"
NARROW = 4
"""Columns of a table in LaTeX that stand in letters of full size."""
FOLD = 40
"""Rows from which on a page folds a table."""


def folded(table: Table) -> Table:
    """Closed at first, where it is long."""
    return replace(table, folded=f"{len(table.rows):,} rows") if len(table.rows) > FOLD else table


def slug(name: str) -> str:
    """A name as a part of a file's name or of a place in a page."""
    return re.sub(r"[\W_]+", "-", name).strip("-")


def without(
    hidden: Collection[str], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows without some columns."""
    shown = [at for at, name in enumerate(head) if name not in hidden]
    return [head[at] for at in shown], [[row[at] for at in shown] for row in rows]


def rich_table(*columns: str, left: int = 1) -> RichTable:
    """A plain table whose first `left` columns are words, and the others numbers."""
    table = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table


def in_terminal(table: Table, width: int) -> Iterator[RenderableType]:
    """Heading, table and notes; one that is too wide is cut into several, each with the columns that name its rows."""
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
    """Several tables for the terminal, with empty lines between them."""
    for at, table in enumerate(tables):
        yield from (*[Text()] * bool(at), *in_terminal(table, width))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], left: int, width: int) -> RenderableType:
    """Aligned, cells as they are written: to rich a plain string may hold :smiles: and [tags]."""
    widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    if sum(widths) + GAP * len(widths) > width or any("\n" in cell for row in rows for cell in row):
        table = rich_table(*head, left=left)
        for row in rows:
            table.add_row(*map(Text, row))
        return table
    # Nothing is folded, so no table is laid out: of a thousand arms that would take a tenth of a report's time.
    lines = [_line(cells, widths, left) for cells in (head, *rows)]
    return Text("\n").join([Text(lines[0], style="bold"), *map(Text, lines[1:])])


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    gaps = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    padded = [cell + gap if at < left else gap + cell for at, (cell, gap) in enumerate(zip(cells, gaps, strict=True))]
    return (" " * GAP).join(padded).rstrip()


def _pieces(table: Table, width: int) -> list[list[int]]:
    """Which columns stand together: all where there is room; else those up to `first` and the others, each piece as
    far as there is room."""
    longest = [max(cell_len(row[index]) for row in [table.head, *table.rows]) + GAP for index in range(len(table.head))]
    if sum(longest) <= width:
        return [[*range(len(table.head))]]
    keys = [*range(table.keys)]
    pieces = [[*keys]]
    for index in range(table.keys, len(table.head)):
        full = len(pieces[-1]) > len(keys) and sum(longest[at] for at in (*pieces[-1], index)) > width
        # Words are folded where they must be, numbers are not.
        if (index == table.first and len(pieces) == 1) or (full and index >= table.left):
            pieces.append([*keys, index])
        else:
            pieces[-1].append(index)
    return pieces


def in_markdown(table: Table) -> str:
    """With a heading of the second level, where it has a title."""
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
    """As it is read, so with rounded numbers; for others see comparison.csv and runs.csv."""
    out = io.StringIO()
    cells = [map(spreadsheet_cell, row) for row in (table.head, *table.rows)]
    csv.writer(out, lineterminator="\n").writerows(cells)
    return out.getvalue()


def in_latex(tables: Iterable[Table]) -> str:
    """Floating tables for a document that loads booktabs, one after the other."""
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
    """A cell; one that begins with a bracket would else be an argument of the line's end before it."""
    shown = latex(text)
    return f"{{}}{shown}" if shown.startswith(("[", "*")) else shown


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
"""The minus of a number; other hyphens stay what they are."""


def latex(text: str) -> str:
    """Plain text as LaTeX shows it."""
    return "".join(_LATEX.get(sign, sign) for sign in _SIGNED.sub("−", text))
