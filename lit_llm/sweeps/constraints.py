"""Constraints of a sweep: `parameters <= 2e7`, `model.d_model == 32 * model.attention.heads`.

    constraint   sum (<= | < | >= | > | ==) sum
    sum          numbers, figures of the cost and keys of the experiment, with + - * / and parentheses

Python's parser reads them; nothing is executed, and everything outside of this grammar is refused.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llm.config.problems import did_you_mean
from lit_llm.experiment.cost import COST_FIGURES

_LONGEST = 300
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# Distance of a comparison from holding; 0 where it holds.
_EXCESS: dict[type[ast.cmpop], Callable[[float, float], float]] = {
    ast.LtE: lambda left, right: max(0.0, left - right),
    ast.GtE: lambda left, right: max(0.0, right - left),
    ast.Lt: lambda left, right: 0.0 if left < right else max(left - right, 1e-12),
    ast.Gt: lambda left, right: 0.0 if left > right else max(right - left, 1e-12),
    ast.Eq: lambda left, right: abs(left - right),
}


class NotAConstraint(ValueError):
    """The text is not in the grammar; the message gives the reason."""


@dataclass(frozen=True)
class Constraint:
    """One inequality."""

    text: str
    _compare: ast.Compare

    @property
    def names(self) -> tuple[str, ...]:
        """Figures and keys in the constraint."""
        return tuple(dict.fromkeys(_names_in(self._compare)))

    def excess(self, values: Mapping[str, Any]) -> float:
        """Distance from holding, relative to the right side; 0 where the constraint holds.

        values: {name: value}. Raises ValueError for a value that is no number, or a division by zero.
        """
        left, right = (_evaluate(side, values) for side in (self._compare.left, self._compare.comparators[0]))
        if not (math.isfinite(left) and math.isfinite(right)):
            raise ValueError(f"{self.text}: a side is not a finite number")
        return _EXCESS[type(self._compare.ops[0])](left, right) / (abs(right) or 1.0)


def parse(text: str) -> Constraint:
    """Parse a constraint. Raises NotAConstraint."""
    if len(text) > _LONGEST:
        raise NotAConstraint(f"is longer than {_LONGEST} characters")
    try:
        comparison = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotAConstraint(f"{text!r} is no constraint; write for example `parameters <= 2e7`") from None
    if not isinstance(comparison, ast.Compare) or len(comparison.ops) != 1 or type(comparison.ops[0]) not in _EXCESS:
        raise NotAConstraint(f"{text!r} compares no two sides by one of <=, <, >=, >, ==")
    for side in (comparison.left, comparison.comparators[0]):
        _check_grammar(side)
    return Constraint(text, comparison)


def unknown(name: str, keys: Mapping[str, Any]) -> str | None:
    """Error message for a name that is neither a figure nor a key of the experiment; None for a valid one."""
    if name in COST_FIGURES or name in keys:
        return None
    return f"{name!r} is neither a figure nor a key with a number{did_you_mean(name, [*COST_FIGURES, *keys])}"


def _check_grammar(node: ast.AST) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        _check_grammar(node.left)
        _check_grammar(node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check_grammar(node.operand)
    elif not _is_number(node) and _dotted_name(node) is None:
        raise NotAConstraint(f"{ast.unparse(node)!r} is not possible; numbers, keys, figures and + - * / are")


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _dotted_name(node: ast.AST) -> str | None:
    """The dotted name `a.b.c` of a node; None for any other node."""
    if isinstance(node, ast.Attribute):
        before = _dotted_name(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _names_in(node: ast.AST) -> Iterator[str]:
    name = _dotted_name(node)
    if name is not None:
        yield name
    else:
        for child in ast.iter_child_nodes(node):
            yield from _names_in(child)


def _evaluate(node: ast.AST, values: Mapping[str, Any]) -> float:
    if isinstance(node, ast.BinOp):
        try:
            return _ARITHMETIC[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"{ast.unparse(node)}: {error}") from None
    if isinstance(node, ast.UnaryOp):
        return -_evaluate(node.operand, values)
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int | float)
        try:
            return float(node.value)
        except OverflowError:
            raise ValueError("a number is too large") from None
    name = _dotted_name(node)
    assert name is not None
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is no number: {value!r}")
    return float(value)
