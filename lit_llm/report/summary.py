"""A study in the terminal: question, tables and answer; three lines while no run is finished."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.text import Text

from lit_llm.report import text
from lit_llm.report.answer import total_runs
from lit_llm.report.paper import printed_answer, printed_tables
from lit_llm.report.tables.table import stacked
from lit_llm.statistics.comparison import Comparison
from lit_llm.store.store import Store
from lit_llm.studies.load import Ablation


def render_study(ablation: Ablation, comparison: Comparison, width: int, store: Store) -> RenderableType:
    """Question, tables and answer of a study for the terminal; without results the next command."""
    study = ablation.study
    head = Text(study.study, style="bold") + Text(f"  {study.question}", style="not bold")
    first, *further = printed_answer(ablation, comparison)
    if not comparison.has_results:
        missing = f"Not answered yet: none of {text.several(total_runs(comparison), 'run')} has ended with a result."
        return Group(
            head, Text(" ".join([missing, *further])), Text(next_step(ablation, comparison, store), style="yellow")
        )
    sentences = [Text(first, style="bold"), *(Text(sentence) for sentence in further)]
    return Group(head, *stacked(printed_tables(ablation, comparison), width), Text(), *sentences)


def next_step(ablation: Ablation, comparison: Comparison, store: Store) -> str:
    """Sentence with the command to run next, where there is no result."""
    states = sum((Counter(row.states) for row in comparison.rows), Counter[str]())
    command, open_ = ablation.command("run", store), states["pending"] + states["interrupted"]
    if states["running"] and not open_:
        return f"Nothing is finished yet: `{ablation.command('status', store)}` says how far it is."
    if states["failed"] + states["out_of_memory"] and not open_:
        return f"Nothing is finished yet: `{command} --rerun failed` tries again what failed."
    return f"Nothing is finished yet: `{command}` runs it."
