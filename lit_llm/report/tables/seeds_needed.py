"""The seeds that a study needs, as a table of the plan."""

from __future__ import annotations

from lit_llm.report import text
from lit_llm.report.tables.table import Table
from lit_llm.studies.seeds_needed import PowerPlan, SeedsNeeded


def power_table(plan: PowerPlan) -> Table:
    """A row for each arm that is compared with a baseline."""
    head = ["arm", "sd from", "sd", f"seeds for {plan.difference:g}", "cautious", f"{plan.planned} seeds show"]
    title = f"seeds that show a difference of {plan.difference:g} in {plan.metric} with {plan.power:.0%} power"
    return Table("power", title, head, [_row(row) for row in plan.rows], len(head), plan.notes, 2)


def _row(row: SeedsNeeded) -> list[str]:
    numbers = [text.short(row.sd), *("–" if n is None else f"{n:,}" for n in (row.seeds, row.cautious_seeds))]
    return [row.arm, row.source, *numbers, text.short(row.detectable)]
