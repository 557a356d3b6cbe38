"""Tables of factors with more than two levels."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lit_llm.report import text
from lit_llm.report.tables.table import Table, slug, without
from lit_llm.statistics.anova import Anova, Term
from lit_llm.studies.design.factors import short_names


def anova_tables(table: Anova, metric: str, named: bool, hidden: Collection[str] = ()) -> Iterator[Table]:
    """F tests of all terms, then each level against the first.

    named: whether titles name the group; hidden: columns of the levels to leave out.
    """
    where = f" in {table.group}" if named else ""
    short = short_names(list(dict.fromkeys(name for term in table.terms for name in term.factors)))
    rows = [
        [
            " × ".join(short[name] for name in term.factors),
            _f(term),
            text.p_value(term.p) or "–",
            f"{term.share:.0%}",
        ]
        for term in table.terms
    ]
    title = f"factors of {metric}{where}: {table.arms} arms, {text.several(len(table.seeds), 'seed')}"
    which = f"-{slug(table.group)}" if named else ""
    yield Table(f"factors{which}", title, ["factor", "F (degrees)", "p", "share"], rows, 4, table.notes)
    if table.levels:
        head = ["factor", "level", "difference [95%]", "p", "verdict"]
        levels = [
            [
                short[x.factor],
                " → ".join(x.levels),
                text.difference(x.difference),
                text.p_value(x.p),
                x.verdict or "",
            ]
            for x in table.levels
        ]
        title = f"levels{where}, over all others"
        yield Table(f"levels{which}", title, *without(hidden, head, levels), len(head))


def _f(term: Term) -> str:
    """`5.12 (1.6, 6.4)`: F and its degrees of freedom after Greenhouse's and Geisser's correction."""
    if term.f is None:
        return "–"
    degrees = [f"{term.sphericity * count:.3g}" for count in (term.degrees, term.error_degrees)]
    return f"{term.f:.3g} ({', '.join(degrees)})"
