"""The report of a sweep: figures, tables, and a page with both."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from lit_llm.config.markup import markdown_text
from lit_llm.report import text
from lit_llm.report.figures.sweep import write_figures
from lit_llm.report.pages.html import Code, Embedded, Page, Section, html
from lit_llm.report.tables.sweep import names_of, setting, sweep_tables, trials_table
from lit_llm.report.tables.table import Link, Table, folded, in_csv, in_markdown
from lit_llm.store.store import Store, write_text
from lit_llm.sweeps.confirmation import Summary, confirmation_name
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial
from lit_llm.sweeps.trials import Trials

WIDE = 7.0
"""Width of Optuna's figures in the page, in inches."""


def write_sweep_report(
    search: Search,
    storage: Trials,
    trials: Sequence[Trial],
    summaries: Sequence[Summary],
    store: Store,
    out: Path | None = None,
) -> Path:
    """Write figures, tables and the page into `out`, or the sweep's folder; returns the page."""
    folder = out or storage.folder
    tables = [*sweep_tables(search, summaries), trials_table(search, trials)]
    for table in tables:
        write_text(folder / "tables" / f"{table.name}.csv", in_csv(table))
    sentences = sweep_answer(search, summaries)
    head = "\n\n".join([f"# {search.name}", *map(markdown_text, (search.sweep.question, *sentences))])
    write_text(folder / "sweep.md", "\n\n".join([head, *map(in_markdown, tables)]) + "\n")
    drawn = write_figures(search, storage, folder / "figures")
    figures = [Embedded.of(path.stem, caption, path, WIDE) for path, caption in drawn.items()]
    winners = store.study(confirmation_name(search)) / "report.html"
    *results, every = tables
    confirmation = Table(
        "winners",
        "",
        ["study of the winners"],
        [[Link(winners.parent.name, quote(os.path.relpath(winners, folder)))]],
        1,
    )
    commands = [search.ablation.command(name, store) for name in ("sweep", "report")]
    page = Page(
        search.name,
        search.sweep.question,
        sentences,
        f"{text.several(len(trials), 'trial')}; written {text.utc(time.time())}.",
        [
            Section("results", "Results", tables=results),
            *[Section("winners", "Over fresh seeds", tables=[confirmation])] * winners.exists(),
            *[Section("figures", "Figures", figures=figures)] * bool(figures),
            Section("trials", "Trials", tables=[folded(every)]),
            Section("reproduce", "Reproduce", codes=[Code("commands", "\n".join(commands))]),
        ],
    )
    return write_text(folder / "report.html", html(page))


def sweep_answer(search: Search, summaries: Sequence[Summary]) -> list[str]:
    """Sentences on the best trials, and their limits."""
    return [*_answer(search, summaries)]


def _answer(search: Search, summaries: Sequence[Summary]) -> Iterator[str]:
    goal, names = search.goals[0], names_of(search)
    finished = [(each, each.best) for each in summaries if each.best is not None and each.best.values]
    if not finished:
        yield "Nothing is found yet: no trial is done."
        return
    clauses = []
    for each, best in finished:
        assert best.values is not None
        default = (
            f" ({text.value(each.default.values[0])} at its default setting)"
            if each.default and each.default.values
            else ""
        )
        clauses.append(f"{each.arm} {text.value(best.values[0])} with {setting(best.point, names)}{default}")
    yield f"Best {goal}: {'; '.join(clauses)}."
    yield (
        "The best of many trials is partly the luckiest: what settings are worth is said by the study of the winners, "
        "over seeds that the search has not seen."
    )
