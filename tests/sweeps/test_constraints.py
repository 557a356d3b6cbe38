"""The grammar of constraints: what Python's own arithmetic says of it, and what is refused unread."""

from __future__ import annotations

import ast
import math
import random
import warnings
from types import SimpleNamespace

import pytest

from lit_llm.experiment.cost import COST_FIGURES
from lit_llm.sweeps.constraints import NotAConstraint, parse, unknown

VALUES = {"parameters": 3.0, "tokens": 4, "model.d_model": 2, "model.attention.heads": 0.5}
SCOPE = {
    "parameters": 3.0,
    "tokens": 4,
    "model": SimpleNamespace(d_model=2, attention=SimpleNamespace(heads=0.5)),
}
"""The same values as Python finds them behind `model.attention.heads`."""


def by_python(text):
    return eval(text, {"__builtins__": {}}, SCOPE)


def some_sum(draw: random.Random, depth: int) -> str:
    """A random sum of the grammar, of small numbers, so that two sides often are equal."""
    kind = draw.randrange(7) if depth else draw.randrange(2)
    if kind == 0:
        return draw.choice(["0", "1", "2", "3", "0.5", "1e1", "2.5E-1", "7"])
    if kind == 1:
        return draw.choice(list(VALUES))
    if kind == 2:
        return f"-{some_sum(draw, depth - 1)}"
    if kind == 3:
        return f"({some_sum(draw, depth - 1)})"
    return f"{some_sum(draw, depth - 1)} {draw.choice('+-*/')} {some_sum(draw, depth - 1)}"


def random_comparisons(operators, count=3000):
    """(left side, operator, right side) as text."""
    draw = random.Random(0)
    found = [(some_sum(draw, 3), draw.choice(operators), some_sum(draw, 3)) for _ in range(count)]
    return [comparison for comparison in found if len(" ".join(comparison)) <= 300]


def broken_by(text):
    return parse(text).excess(VALUES)


# --- against Python ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["<=", "<", ">=", ">", "=="])
def test_the_excess_is_zero_exactly_where_python_says_that_the_comparison_holds(operator):
    """Of thousands of random comparisons, and both answers are among them."""
    told = set()
    for comparison in random_comparisons([operator]):
        text = " ".join(comparison)
        try:
            holds = by_python(text)
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="division by zero"):
                broken_by(text)
            holds = None
        else:
            excess = broken_by(text)
            assert (excess == 0) is holds, text
            assert excess >= 0
        told.add(holds)
    assert told == {True, False, None}


@pytest.mark.parametrize("operator", ["<=", ">=", "=="])
def test_the_excess_is_how_far_the_sides_are_apart_relative_to_the_right_one(operator):
    broken = 0
    for left, _, right in random_comparisons([operator]):
        try:
            a, b, holds = by_python(left), by_python(right), by_python(f"{left} {operator} {right}")
        except ZeroDivisionError:
            continue
        if not holds:
            broken += 1
            expected = abs(a - b) / (abs(b) if b else 1)
            assert broken_by(f"{left} {operator} {right}") == pytest.approx(expected, rel=1e-12)
    assert broken > 500


@pytest.mark.parametrize("text", ["parameters < 3", "3 > parameters", "tokens - 4 > 0", "0 < 0"])
def test_equal_sides_break_a_strict_comparison(text):
    assert broken_by(text) > 0


def test_a_constraint_names_what_it_speaks_of_once_each():
    text = "parameters / model.d_model <= 2 * model.attention.heads + parameters"
    assert parse(text).names == ("parameters", "model.d_model", "model.attention.heads")
    assert parse("1 < 2").names == ()


@pytest.mark.parametrize("value", [None, True, "4", [4]])
def test_a_key_that_holds_no_number_is_told_with_its_value(value):
    with pytest.raises(ValueError, match=r"model\.d_model is no number"):
        parse("model.d_model <= 4").excess({"model.d_model": value})


@pytest.mark.parametrize(
    "text",
    [
        "parameters >= 1e999",
        "1e999 - 1e999 < 1",
        "1e200 * 1e200 - 1e200 * 1e200 >= parameters",
        "-1e999 > parameters",
        pytest.param(f"parameters <= 0x{'f' * 280}", id="a whole number beyond every float"),
    ],
)
def test_a_side_that_is_no_finite_number_never_fulfils_a_constraint(text):
    """No trial can be judged by it: it is an error, else an excess above 0, which is what makes a trial infeasible."""
    try:
        excess = broken_by(text)
    except ValueError:
        return
    assert (excess > 0) is not by_python(text)


# --- what is no constraint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "parameters()",
        "abs(parameters) <= 3",
        "max(parameters, 2) <= 3",
        "open('x') <= 3",
        "__import__('os').system('true') <= 0",
        "abs(parameters).real <= 3",
        "(1).real <= 3",
        "(1 + 2).real <= 3",
        "().__class__ <= 3",
        "model['d_model'] <= 3",
        "model.layers[0] <= 3",
        "parameters <= 'x'",
        "parameters <= f'{tokens}'",
        "parameters <= b'x'",
        "parameters <= None",
        "parameters <= True",
        "parameters <= 1j",
        "parameters <= ...",
        "[x for x in ()] <= 3",
        "sum(x for x in model) <= 3",
        "{x: 1 for x in ()} <= 3",
        "(lambda: 1) <= 3",
        "(parameters := 3) <= 3",
        "(1 if parameters else 2) <= 3",
        "(1, 2) <= (3, 4)",
        "parameters ** 2 <= 3",
        "parameters // 2 <= 3",
        "parameters % 2 == 0",
        "parameters @ 2 <= 3",
        "parameters << 2 <= 3",
        "parameters | 2 <= 3",
        "~parameters <= 3",
        "+parameters <= 3",
        "1 < parameters < 3",
        "parameters <= 3 <= tokens",
        "parameters != 3",
        "parameters in model",
        "parameters is tokens",
        "not parameters <= 3",
        "parameters <= 3 and tokens <= 3",
        "parameters <= 3 or tokens <= 3",
        "(parameters <= 3) <= 3",
        "parameters",
        "3",
        "",
        "   ",
        "parameters <=",
        "<= 3",
        "parameters = 3",
        "parameters <= 3; tokens <= 3",
        "import os",
        "parameters <= 3\ntokens <= 3",
        "parameters ≤ 3",
        "parameters <= \0",
        "parameters <= 3 4",
        "parameters <= *tokens",
        "(parameters <= 3",
    ],
)
def test_what_is_outside_of_the_grammar_is_refused(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        with pytest.raises(NotAConstraint):
            parse(text)


def test_a_refusal_quotes_the_part_that_is_to_blame():
    with pytest.raises(NotAConstraint, match=r"open\('x'\)"):
        parse("parameters + 2 * open('x') <= 3")
    with pytest.raises(NotAConstraint, match="parameters \\*\\* 2"):
        parse("tokens >= parameters ** 2")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path('here').touch() <= 0",
        "open('here', 'w') <= 0",
        "[open('here', 'w') for _ in (1,)] <= 0",
        "(lambda: open('here', 'w'))() <= 0",
        "0 <= f'{open(\"here\", chr(119))}'",
    ],
)
def test_nothing_of_a_constraint_is_executed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expression = compile(ast.parse(text, mode="eval"), "", "eval")  # Python could run it, and would leave a file
    assert expression
    with pytest.raises(NotAConstraint):
        parse(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["__import__ <= 3", "parameters.__class__ <= 3", "model.__dict__.x <= 3"])
def test_a_name_of_pythons_is_only_an_unknown_key(text):
    constraint = parse(text)
    (name,) = constraint.names
    assert "neither a figure nor a key" in unknown(name, VALUES)
    with pytest.raises(ValueError, match="is no number: None"):
        constraint.excess(VALUES)


def test_figures_and_keys_with_numbers_are_known_and_a_near_one_is_proposed():
    assert [unknown(name, VALUES) for name in [*COST_FIGURES, *VALUES]] == [None] * (len(COST_FIGURES) + len(VALUES))
    assert unknown("paramters", VALUES).endswith("did you mean 'parameters'?")
    assert unknown("model.dmodel", VALUES).endswith("did you mean 'model.d_model'?")


# --- long and deep -------------------------------------------------------------------------------------------------


def test_a_constraint_of_300_characters_is_read_and_one_more_is_too_long():
    longest = "1+" * 142 + "1" + " <= " + "1" * 11
    assert len(longest) == 300
    assert broken_by(longest) == 0
    with pytest.raises(NotAConstraint, match="longer than 300"):
        parse(longest + "1")
    with pytest.raises(NotAConstraint, match="longer than 300"):
        parse("(" * 1_000_000)


@pytest.mark.parametrize("signs", [1, 2, 145, 146, 289, 290])
def test_as_many_minus_signs_as_there_is_room_for_are_read(signs):
    assert (broken_by("-" * signs + "2 < 0") == 0) is (signs % 2 == 1)


@pytest.mark.parametrize("depth", [1, 10, 50, 90, 120, 140])
def test_deep_parentheses_are_read_or_refused_and_never_a_crash(depth):
    text = "(" * depth + "1" + ")" * depth + " <= 0.5"
    try:
        excess = broken_by(text)
    except NotAConstraint:
        assert depth > 90
    else:
        assert excess == pytest.approx((1 - 0.5) / 0.5)


def test_a_name_of_many_parts_is_one_name():
    name = ".".join("a" * 140)
    assert parse(f"{name} <= 3").names == (name,)
    assert math.isclose(parse(f"{name} <= 3").excess({name: 6}), 1.0)
