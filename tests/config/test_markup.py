"""What users have named things by stays text in a spreadsheet and in Markdown."""

from __future__ import annotations

import pytest

from lit_llm.config.markup import code_span, markdown_text, spreadsheet_cell

AFTER_A_NUMBER = ["+1 (cmd|' /C calc'!A0)", "-1 [HYPERLINK(1)]", "+1 ±A1", "-2 (a)"]


@pytest.mark.parametrize(
    "name", ["=1+1", "+cmd|'/C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "=HYPERLINK(1)", *AFTER_A_NUMBER]
)
def test_a_name_is_no_formula(name: str) -> None:
    assert spreadsheet_cell(name) == f"'{name}"


INTERVALS = ["-0.1 ± 0.02", "+1e-3 (1.5%) †", "-0.1 [-inf, 2e+3]"]


@pytest.mark.parametrize(
    "number", ["-0.120 [-0.151, -0.089]", "+0.02", "-", "-1e-3", -0.5, None, "+3%", "red/=1", "", *INTERVALS]
)
def test_numbers_and_intervals_are_left(number: object) -> None:
    assert spreadsheet_cell(number) == number


def test_markdown_shows_pipes_and_backticks_as_they_are() -> None:
    assert markdown_text("a|b `c` *d* <b> 1 < 2\ne") == r"a\|b \`c\` \*d\* \<b> 1 < 2<br>e"
    assert code_span("a") == "`a`"
    assert code_span("a`b``c") == "``` a`b``c ```"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("[x](http://e/p)", r"[x\](http://e/p)"),
        ("![i](http://e/p.png)", r"![i\](http://e/p.png)"),
        ("[a [b](c)](d)", r"[a [b\](c)\](d)"),
        ("[x][y]", r"[x\][y]"),
        ("[x]: http://e", r"[x\]: http://e"),
        ("_a_", r"\_a\_"),
        ("__a__ and (_b_)", r"\_\_a\_\_ and (\_b\_)"),
        ("~~b~~ ~c~", r"\~\~b\~\~ \~c\~"),
        ("d_model a__b", "d_model a__b"),
        ("-0.120 [-0.151, -0.089] (n = 3)!", "-0.120 [-0.151, -0.089] (n = 3)!"),
    ],
)
def test_markdown_shows_links_and_emphasis_as_they_are(text: str, escaped: str) -> None:
    assert markdown_text(text) == escaped


@pytest.mark.parametrize(
    "text",
    [
        "[x](http://e/p)",
        "![i](e)",
        "[a [b](c)](d)",
        "_a_ __b__ _c",
        "~~b~~",
        "a_b_ _c_d",
        "[x][y] [x]: e",
        "*_a_*",
        "_*a*_",
    ],
)
def test_a_reader_of_markdown_sees_plain_text(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable("strikethrough").render(markdown_text(text))
    assert html == f"<p>{text}</p>\n"
