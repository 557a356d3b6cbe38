"""Findings in a terminal."""

from lit_llm.report.tables.plan import _findings
from lit_llm.studies.audit.findings import Finding


def test_what_is_said_of_several_arms_is_said_once() -> None:
    same = [Finding("confound", arm, "model.attention.head_dim", "16 → 32") for arm in ("a", "b", "c", "d")]
    other = [Finding("note", "a", "", "only of this one"), Finding("note", "b", "", "and another of that")]
    assert [line.plain for line in _findings([*same[:3], *other, same[3]])] == [
        "≠ a, b and 2 more: model.attention.head_dim: 16 → 32",
        "· a: only of this one",
        "· b: and another of that",
    ]
