"""What users have named things by stays text in a spreadsheet and in Markdown."""

from __future__ import annotations

import pytest

from lit_llm.config.markup import code_span, markdown_text, spreadsheet_cell


@pytest.mark.parametrize("name", ["=1+1", "+cmd|'/C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "=HYPERLINK(1)"])
def test_a_name_is_no_formula(name: str) -> None:
    assert spreadsheet_cell(name) == f"'{name}"


@pytest.mark.parametrize("number", ["-0.120 [-0.151, -0.089]", "+0.02", "-", "-1e-3", -0.5, None, "+3%", "red/=1", ""])
def test_numbers_and_intervals_are_left(number: object) -> None:
    assert spreadsheet_cell(number) == number


def test_markdown_shows_pipes_and_backticks_as_they_are() -> None:
    assert markdown_text("a|b `c` *d* <b> 1 < 2\ne") == r"a\|b \`c\` \*d\* \<b> 1 < 2<br>e"
    assert code_span("a") == "`a`"
    assert code_span("a`b``c") == "``` a`b``c ```"
