"""The report of a study: tables, figures, and a page with all of it.

```
<store>/studies/<study>/
  report.html       the page, on its own          answer.json      question and answer, for programs
  comparison.md     its tables in Markdown        comparison.csv   the arms, numbers in full
  tables.tex        ... in LaTeX                  runs.csv         the runs, numbers in full
  tables/*.csv      ... one by one                comparison.json  everything, for programs
  figures/*         as SVG, PNG and PDF, with figures.md
```
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from lit_llm.config.markup import markdown_text, spreadsheet_cell
from lit_llm.report import text
from lit_llm.report.figures.study import Drawn, figures_of, write_figures
from lit_llm.report.pages.all_studies import ANSWER, answer_json
from lit_llm.report.pages.frozen_analysis import details, summary
from lit_llm.report.pages.html import Code, Embedded, Page, Section, html
from lit_llm.report.paper import paper_tables, printed, printed_answer, printed_study, printed_tables, with_arm_names
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.report.tables.metric_noise import noise_table
from lit_llm.report.tables.plan import (
    cache_note,
    costs_table,
    design_table,
    differences_table,
    generates,
    merged_findings,
)
from lit_llm.report.tables.table import Link, Table, folded, in_csv, in_latex, in_markdown, without
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.signal_and_noise import FEWEST_ARMS, FEWEST_SEEDS
from lit_llm.store.store import Stage, Store, write_text
from lit_llm.studies.analysis_plan import Registration, registration_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.metric_noise import noise_of
from lit_llm.studies.names import Names
from lit_llm.studies.plan import Plan
from lit_llm.studies.runs import Run
from lit_llm.tracking.mlflow_links import run_addresses

RunWithResult = tuple[Run, RunResult]
"""A run with its result, which is read once because it takes several files."""
MOST_NAMED = 6
"""Largest number of arms that a sentence names."""


MOST_RUNS_WITH_PDF = 300
"""Largest number of runs for which figures are also PDFs by default, which doubles the time of drawing."""


def write_report(
    plan: Plan,
    runs: Sequence[Run],
    comparison: Comparison,
    store: Store,
    pdf: bool = False,
    out: Path | None = None,
) -> list[Path]:
    """Write the report of a study, finished or not; returns the files and folders.

    Without any result nothing is written, and the files of an earlier report stay. Reads results and training curves;
    trains nothing and uses no network.

    pdf: write figures as PDF of a large study too; out: the folder to write to, the study's in the store when None.
    """
    if not comparison.has_results:
        return []
    ablation = plan.ablation
    folder = store.study(ablation.study.study) if out is None else out
    registration = registration_of(store.study(ablation.study.study))
    seen = [(run, run.result()) for run in runs]
    drawn = figures_of(ablation, runs, comparison)
    figures, tables = folder / "figures", folder / "tables"
    for old in (figures, tables) if out is None else ():  # a folder of the user may have other files
        shutil.rmtree(old, ignore_errors=True)  # files of an earlier report
    if drawn:
        write_figures(drawn, figures, pdf or len(runs) <= MOST_RUNS_WITH_PDF)
    for table in comparison_tables(comparison):  # with the names that commands take, as in comparison.csv
        write_text(tables / f"{table.name}.csv", in_csv(table))
    files = {
        "comparison.md": markdown_of(ablation, comparison, registration),
        ANSWER: answer_json(ablation.study.study, ablation.study.question, printed_answer(ablation, comparison)),
        "tables.tex": in_latex(paper_tables(ablation, comparison)),
        "runs.csv": runs_csv(seen),
        "report.html": html(page(plan, seen, comparison, _embedded(drawn, figures), store, folder)),
    }
    for name, content in files.items():
        write_text(folder / name, content)
    return [*(folder / name for name in files), tables, *[figures] * bool(drawn)]


def _embedded(drawn: Sequence[Drawn], figures: Path) -> list[Embedded]:
    return [Embedded.of(one.name, one.caption, figures / f"{one.name}.svg", one.figure.get_figwidth()) for one in drawn]


def markdown_of(ablation: Ablation, comparison: Comparison, registration: Registration | None = None) -> str:
    """Question, answer, tables, and changes of the frozen analysis."""
    study = ablation.study
    head = "\n".join(
        [
            f"# {study.study}",
            "",
            markdown_text(study.question),
            "",
            *(f"{markdown_text(line)}\n" for line in printed_answer(ablation, comparison)),
        ]
    )
    frozen = "\n".join(["## Before and after", "", *(f"- {line}" for line in details(registration))])
    tables = map(in_markdown, printed_tables(ablation, comparison))
    return "\n\n".join([head.rstrip(), *tables, *[frozen] * (registration is not None)]) + "\n"


def runs_csv(seen: Sequence[RunWithResult]) -> str:
    """A line for each run, with all its metrics; a field without a number is empty."""
    rows = [run.row(result) for run, result in seen]
    columns = dict.fromkeys(name for row in rows for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
    writer.writerow({name: spreadsheet_cell(name) for name in columns})
    writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


# --- the page -------------------------------------------------------------------------------------------------------


def page(
    plan: Plan,
    seen: Sequence[RunWithResult],
    comparison: Comparison,
    embedded: Sequence[Embedded],
    store: Store,
    folder: Path | None = None,
) -> Page:
    """The page: question, answer, results, design, runs, commands. folder: the folder of its file."""
    study = plan.ablation.study
    registration = registration_of(store.study(study.study))
    results = Section("results", "Results", tables=printed_tables(plan.ablation, comparison))
    figures = Section("figures", "Figures", figures=embedded)
    return Page(
        study.study,
        study.question,
        printed_answer(plan.ablation, comparison),
        " ".join([_status_line(seen, comparison), *[f"{summary(registration)}."] * (registration is not None)]),
        [
            results,
            *[figures] * bool(embedded),
            *_signal_and_noise(plan.ablation, seen),
            _design(plan, comparison, registration),
            _runs(plan.ablation, seen, comparison, store, folder or store.study(study.study)),
            _reproduce(plan.ablation, seen, store),
        ],
    )


def _signal_and_noise(ablation: Ablation, seen: Sequence[RunWithResult]) -> Iterator[Section]:
    """Section on how well each metric tells the arms apart, where there are enough arms and seeds to tell."""
    if len(ablation.arms) < FEWEST_ARMS or len({run.seed for run, _ in seen}) < FEWEST_SEEDS:
        return
    report = noise_of([(ablation, seen)])
    if any(row.values.ratio is not None for row in report.rows):
        table, names = noise_table(report), Names(ablation)
        table = replace(table, rows=[[names.metric(metric), *rest] for metric, *rest in table.rows])
        yield Section("noise", "Signal and noise of the metrics", tables=[folded(table)])


def _status_line(seen: Sequence[RunWithResult], comparison: Comparison) -> str:
    count = Counter(result.state for _, result in seen)
    states = ", ".join(f"{number:,} {_state_words(state)}" for state, number in count.most_common())
    arms = text.several(len(comparison.rows), "arm")
    finished = [result.result["finished"] for _, result in seen if result.result.get("finished")]
    latest = f"; the last result is of {text.utc(max(finished))}" if finished else ""
    return f"{arms}, {text.several(len(seen), 'run')}: {states}{latest}; written {text.utc(time.time())}."


def _state_words(state: str) -> str:
    return state.replace("_", " ")


def _design(plan: Plan, comparison: Comparison, registration: Registration | None) -> Section:
    """Section on the varied factors, the controlled settings, and the costs."""
    study, texts = plan.ablation.study, []
    if len(plan.arms) > 1:
        texts.append(
            "Between an arm and its baseline only what stands below differs. With equal seeds both see the same data "
            "in the same order, and begin with equal values in every parameter that they have in common."
        )
    seeds = ", ".join(map(str, study.seeds))
    most = f"; up to {study.more_seeds.max} where nothing is decided" if study.more_seeds else ""
    paired = ", over which differences are paired" if len(study.seeds) > 1 and len(plan.arms) > 1 else ""
    texts.append(f"Seeds: {seeds}{paired}{most}.")
    if study.match.by != "none":
        texts.append(f"The arms are matched with their baselines by {study.match.by.replace('_', ' ')}.")
    if study.compare.stratify_by:
        texts.append(f"Each arm meets the baseline of its own level of {', '.join(study.compare.stratify_by)}.")
    if any(generates(planned.arm) for planned in plan.arms):
        texts.append(cache_note(plan))
    allowed = [f"allowed: {rule.key}, because {rule.because}" for rule in study.allow]
    findings = [f"{kind.replace('_', '-')}: {message}" for kind, message in merged_findings(plan.findings)]
    nothing = ["The audit had nothing to say."] if len(plan.arms) > 1 and not findings else []
    costs = costs_table(plan)
    empty = {name for at, name in enumerate(costs.head) if all(row[at] == "–" for row in costs.rows)}
    measured = Table(costs.name, "what each arm costs", *without(empty, costs.head, costs.rows), costs.first)
    design, names = design_table(plan), printed_study(plan.ablation, comparison).names
    several = [differences_table(plan)] * (len(plan.arms) > 1)
    spelled = printed(with_arm_names(measured, names), names)
    tables = [folded(table) for table in ([design] if design else []) + [spelled, *several]]
    items = [*details(registration), *allowed, *findings, *nothing]
    return Section("design", "Design, and what was controlled", texts, items, tables)


def _runs(
    ablation: Ablation, seen: Sequence[RunWithResult], comparison: Comparison, store: Store, folder: Path
) -> Section:
    """Section on missing runs and their errors, then on every run with links to its files."""
    lost, texts = _lost_rows(seen, folder), [*_missing_sentences(ablation, seen, store)]
    addresses = run_addresses(store.root / "mlflow.db", ablation.study.study)
    head = ["run", "state", comparison.metric, "steps", "stage", *["MLflow"] * bool(addresses)]
    rows = []
    for run, result in seen:
        address = addresses.get((run.arm.name, str(run.seed)))
        row = [run.name, _state_words(result.state), text.value(result.metric(comparison.metric))]
        row += [str(result.result.get("steps", "–")), _stage_link(run.last, run.last.fingerprint, folder)]
        rows.append([*row, *[Link("open", address) if address else "–"] * bool(addresses)])
    notes = [
        "stages are linked to the store that this file lies in",
        *["MLflow answers while `lit-llm ui` runs"] * bool(addresses),
    ]
    every = folded(Table("runs", "all runs", head, rows, len(head), tuple(notes), left=2))
    tables = [Table("missing", "what did not end well", ["run", "state", "why", "log"], lost, 4, left=4)] * bool(lost)
    return Section("runs", "Runs", texts or ["All runs are done."], tables=[*tables, every])


def _missing_sentences(ablation: Ablation, seen: Sequence[RunWithResult], store: Store) -> Iterator[str]:
    """Sentences on runs that have not ended, with the command that runs them."""
    command = ablation.command("run", store)
    pending = Counter(run.arm.name for run, result in seen if result.state == "pending")
    states = {result.state for _, result in seen}
    if count := pending.total():
        names = ", ".join(f"{arm} {number}" for arm, number in list(pending.items())[:MOST_NAMED])
        more = f" and {len(pending) - MOST_NAMED} further arms" if len(pending) > MOST_NAMED else ""
        has = "has" if count == 1 else "have"
        yield f"{text.several(count, 'run')} {has} not begun ({names}{more}); `{command}` runs what is missing."
    if states & {"running", "interrupted"}:
        yield f"Some are not at their end; `{command}` goes on with those that were interrupted."
    if states & {"failed", "out_of_memory"}:
        yield f"`{command} --rerun failed` tries those that failed again."


def _lost_rows(seen: Sequence[RunWithResult], folder: Path) -> list[list[str]]:
    """Rows of runs that ended without a value, with the last line of the error and a link to the log."""
    rows = []
    for run, result in seen:
        if result.state in ("done", "pending", "running"):
            continue
        step = run.current()
        why = (step.status().get("error") or "").strip().splitlines() or ["–"]
        log = _stage_link(step.stage, step.stage.log_file.name, folder) if step.stage.log_file.exists() else "–"
        rows.append([run.name, _state_words(result.state), why[-1], log])
    return rows


def _stage_link(stage: Stage, file: str, folder: Path) -> Link:
    """Link to a stage's file, relative to the page's folder, so that a store can be moved."""
    inside = "" if file == stage.fingerprint else file
    return Link(file, f"{quote(os.path.relpath(stage.folder, folder.absolute()))}/{inside}")


PROVENANCE = (
    *("version", "code", "torch", "python", "device", "precision", "kernels", "threads", "devices", "strategy"),
    "trainer",
)


def _reproduce(ablation: Ablation, seen: Sequence[RunWithResult], store: Store) -> Section:
    """Section with the commands, the versions of the results, and the study's file."""
    commands = [ablation.command(name, store) for name in ("plan", "run", "report")]
    tables = [Table("versions", "what the results are of", ["", "value"], list(_versions(ablation, seen)), 2, left=2)]
    codes = [Code("commands", "\n".join(commands))]
    if ablation.file:
        codes.append(Code(Path(ablation.source).name, ablation.file.rstrip()))
    return Section("reproduce", "Reproduce", tables=tables, codes=codes)


def _versions(ablation: Ablation, seen: Sequence[RunWithResult]) -> Iterator[list[str]]:
    """Rows of the results' provenance; a row has several values where results differ."""
    values: dict[str, dict[str, None]] = {}
    for _, result in seen:
        for origin in result.result.get("origins", ()):
            for key in PROVENANCE:
                if origin.get(key) is not None:
                    values.setdefault(key, {})[str(origin[key])] = None
    for key in PROVENANCE:
        if key in values:
            yield [{"version": "lit-llm", "code": "digest of its code"}.get(key, key), ", ".join(values[key])]
    digests = dict.fromkeys(identity_of_data(arm.experiment).digest for arm in ablation.arms)
    yield ["digest of the text", ", ".join(digests)]
