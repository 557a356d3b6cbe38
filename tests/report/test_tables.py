"""One table, in every form the same."""

from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console, Group

from lit_llm.report.pages.html import Page, Section, html, marked
from lit_llm.report.tables.table import Link, Table, in_csv, in_latex, in_markdown, in_terminal, latex, rich_table

PART = Table(
    "arms",
    "loss | of arms",
    ["arm", "loss_nll", "difference [95%]"],
    [["a|b", "1.5 ± 0.1", "baseline"], ["c=[q, k]", "1.4", "-0.100 [-0.200, +0.000]"]],
    2,
    ("50% of {true} zeros & more",),
)


def test_csv_gives_back_every_cell() -> None:
    assert [*csv.reader(in_csv(PART).splitlines())] == [PART.head, *PART.rows]


def test_markdown_has_as_many_columns_in_every_row_whatever_stands_in_a_cell() -> None:
    rows = [line for line in in_markdown(PART).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(PART.head) + 1}
    assert rows[1] == "| --- | ---: | ---: |"
    assert "| a\\|b |" in in_markdown(PART)


def test_latex_leaves_no_sign_that_it_would_read_as_its_own() -> None:
    """What is left of a table's text once our own commands are taken out."""
    written = in_latex([PART])
    assert (written.count(r"\begin{"), written.count(r"\end{")) == (2, 2)
    rows = written[written.index(r"\toprule") : written.index(r"\bottomrule")].splitlines()[1:]
    assert [row.count(" & ") for row in rows if row != r"\midrule"] == [2, 2, 2]
    assert r"50\% of \{true\} zeros \& more" in written
    assert r"\caption{loss $|$ of arms}" in written
    assert "$-$0.100 [$-$0.200, +0.000]" in written


@pytest.mark.parametrize("sign", "&%$#_{}~^\\<>|±×→−–…·†≠≤≥")
def test_every_sign_of_a_table_is_escaped_once(sign: str) -> None:
    found = latex(f"a{sign}b")
    assert found != f"a{sign}b"
    assert re.fullmatch(r"a(\\[&%$#_{}]|\\[a-z]+\{\}|\$(\\[a-z]+|[<>|-])\$|--)b", found), found


def test_a_hyphen_in_a_name_is_no_minus() -> None:
    assert latex("redllm-tiny -0.5 decllm-2") == "redllm-tiny $-$0.5 decllm-2"


def test_the_terminal_cuts_a_wide_table_in_two_and_keeps_its_cells() -> None:
    def shown(width: int) -> list[str]:
        console = Console(width=width, record=True, markup=False, file=io.StringIO())
        console.print(Group(*in_terminal(PART, width)))
        return console.export_text().splitlines()

    wide, narrow = shown(100), shown(40)
    assert len(narrow) > len(wide)
    for lines in (wide, narrow):
        assert all(any(cell in line for line in lines) for row in PART.rows for cell in row)


def test_the_terminal_shows_a_cell_as_it_is_written() -> None:
    output = io.StringIO()
    console = Console(file=output, width=80)
    for line in in_terminal(Table("arms", "", ["arm", "loss"], [["norm=[bold]", ":warning:"]], 2), 80):
        console.print(line)
    assert "norm=[bold]" in output.getvalue()
    assert ":warning:" in output.getvalue()


@pytest.mark.parametrize("width", [80, 30])
def test_a_table_that_fits_is_aligned_as_rich_aligns_it(width: int) -> None:
    rows = [["x", "some words", "1", "2.5"], ["日本語", "", "10", "-1"]]
    part, table = (
        Table("wide", "", ["arm", "words", "n", "損失"], rows, 4, left=2),
        rich_table("arm", "words", "n", "損失", left=2),
    )
    for row in rows:
        table.add_row(*row)
    files = io.StringIO(), io.StringIO()
    consoles = [Console(file=file, width=width) for file in files]
    consoles[0].print(Group(*in_terminal(part, width)))
    consoles[1].print(table)
    ours, rich = ([line.rstrip() for line in file.getvalue().splitlines()] for file in files)
    assert ours == rich


def test_a_table_is_cut_as_often_as_it_must_be_and_each_piece_names_its_rows() -> None:
    head = ["arm", *(f"column-{number:02}" for number in range(9))]
    part = Table("wide", "", head, [["first", *"123456789"], ["second", *"987654321"]], 5)
    console = Console(width=40, record=True, markup=False, file=io.StringIO())
    console.print(Group(*in_terminal(part, 40)))
    lines = console.export_text().splitlines()
    heads = [line.split() for line in lines if line.startswith("arm")]
    assert [name for names in heads for name in names[1:]] == head[1:]
    assert max(map(len, lines)) <= 40
    assert len([line for line in lines if line.startswith("second")]) == len(heads) > 2


def test_whatever_a_study_is_called_is_text_in_the_page(tmp_path) -> None:
    from tests.pages import ReadPage

    evil = '<script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" {{ 7 * 7 }}'
    part = Table(evil, evil, [evil], [[evil], [Link(evil, '../a?b=1&c="><b>')]], 1, (evil,))
    (tmp_path / "page.html").write_text(
        html(Page(evil, evil, [evil], evil, [Section(evil, evil, [evil], [evil], [part])]))
    )
    page = ReadPage(tmp_path / "page.html")
    assert not {"script", "img", "b"} & page.tags
    assert page.texts["h1"] == [evil]
    assert page.tables[0].rows == [[evil], [evil]]
    assert '../a?b=1&c="><b>' in page.links


def test_words_between_backticks_are_code_and_a_lone_backtick_is_itself() -> None:
    assert marked("run `lit-llm <x>` now") == "run <code>lit-llm &lt;x&gt;</code> now"
    assert marked("a ` b & c") == "a ` b &amp; c"
