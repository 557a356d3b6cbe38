"""What a study leaves to be read: tables, figures, and a page that holds all of it.

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
from pathlib import Path
from urllib.parse import quote

from lit_llm.config.markup import markdown_text, spreadsheet_cell
from lit_llm.report import text
from lit_llm.report.figures.study import Drawn, figures_of, write_figures
from lit_llm.report.pages.all_studies import ANSWER, answer_json
from lit_llm.report.pages.frozen_analysis import details, summary
from lit_llm.report.pages.html import Code, Embedded, Page, Section, html
from lit_llm.report.paper import paper_tables, printed, printed_answer, printed_study, printed_tables, with_names
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.report.tables.plan import cache_note, costs_table, design_table, differences_table, generates, told
from lit_llm.report.tables.table import Link, Table, folded, in_csv, in_latex, in_markdown, without
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.statistics.comparison import Comparison, RunResult
from lit_llm.store.store import Stage, Store, write_text
from lit_llm.studies.analysis_plan import Registration, registration_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.plan import Plan
from lit_llm.studies.runs import Run
from lit_llm.tracking.mlflow_links import run_addresses

Seen = tuple[Run, RunResult]
"""A run with what the store knew of it when it was looked at: reading it takes several files."""
MOST_NAMED = 6
"""Arms that a sentence names."""


MOST_RUNS_WITH_PDF = 300
"""Runs of a study up to which its figures are PDFs too, without being asked for: they double the time of drawing."""


def write_report(
    plan: Plan,
    runs: Sequence[Run],
    comparison: Comparison,
    store: Store,
    pdf: bool = False,
    out: Path | None = None,
) -> list[Path]:
    """Write everything that is to be read, of an unfinished study too; returns the files and folders.

    Of a study without any result nothing is written, and what an earlier report has left stays. Reads results and
    courses; trains nothing and asks no network.

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
    for old in (figures, tables) if out is None else ():  # a folder of the user's may hold others
        shutil.rmtree(old, ignore_errors=True)  # what an earlier look had and this one has not
    if drawn:
        write_figures(drawn, figures, pdf or len(runs) <= MOST_RUNS_WITH_PDF)
    for table in comparison_tables(comparison):  # with the names that commands take, as in comparison.csv
        write_text(tables / f"{table.name}.csv", in_csv(table))
    files = {
        "comparison.md": markdown_of(ablation, comparison, registration),
        ANSWER: answer_json(ablation.study.study, ablation.study.question, printed_answer(ablation, comparison)),
        "tables.tex": in_latex(paper_tables(ablation, comparison)),
        "runs.csv": runs_csv(seen),
        "report.html": html(page(plan, seen, comparison, _shown(drawn, figures), store, folder)),
    }
    for name, content in files.items():
        write_text(folder / name, content)
    return [*(folder / name for name in files), tables, *[figures] * bool(drawn)]


def _shown(drawn: Sequence[Drawn], figures: Path) -> list[Embedded]:
    return [Embedded.of(one.name, one.caption, figures / f"{one.name}.svg", one.figure.get_figwidth()) for one in drawn]


def markdown_of(ablation: Ablation, comparison: Comparison, registration: Registration | None = None) -> str:
    """Question, answer, tables, and what became of the frozen analysis."""
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


def runs_csv(seen: Sequence[Seen]) -> str:
    """A line for each run, with all its metrics; empty where there is no number."""
    rows = []
    for run, result in seen:
        head = {"arm": run.arm.name, "baseline": run.arm.baseline, "seed": run.seed, **run.arm.levels}
        costs = {key: result.result.get(key) for key in ("parameters", "tokens", "flops")}
        rows.append({**head, "state": result.state, **costs, **result.result.get("metrics", {})})
    columns = dict.fromkeys(name for row in rows for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
    writer.writerow({name: spreadsheet_cell(name) for name in columns})
    writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


# --- the page -------------------------------------------------------------------------------------------------------


def page(
    plan: Plan,
    seen: Sequence[Seen],
    comparison: Comparison,
    shown: Sequence[Embedded],
    store: Store,
    folder: Path | None = None,
) -> Page:
    """Question, answer, results, design, runs, and how to reproduce them. folder: where it will lie."""
    study = plan.ablation.study
    registration = registration_of(store.study(study.study))
    results = Section("results", "Results", tables=printed_tables(plan.ablation, comparison))
    figures = Section("figures", "Figures", figures=shown)
    return Page(
        study.study,
        study.question,
        printed_answer(plan.ablation, comparison),
        " ".join([_how_far(seen, comparison), *[f"{summary(registration)}."] * (registration is not None)]),
        [
            results,
            *[figures] * bool(shown),
            _design(plan, comparison, registration),
            _runs(plan.ablation, seen, comparison, store, folder or store.study(study.study)),
            _reproduce(plan.ablation, seen, store),
        ],
    )


def _how_far(seen: Sequence[Seen], comparison: Comparison) -> str:
    count = Counter(result.state for _, result in seen)
    states = ", ".join(f"{number:,} {_word(state)}" for state, number in count.most_common())
    arms = text.several(len(comparison.rows), "arm")
    finished = [result.result["finished"] for _, result in seen if result.result.get("finished")]
    latest = f"; the last result is of {text.utc(max(finished))}" if finished else ""
    return f"{arms}, {text.several(len(seen), 'run')}: {states}{latest}; written {text.utc(time.time())}."


def _word(state: str) -> str:
    return state.replace("_", " ")


def _design(plan: Plan, comparison: Comparison, registration: Registration | None) -> Section:
    """What was varied, what was held equal, and what that cost."""
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
    findings = [f"{kind.replace('_', '-')}: {message}" for kind, message in told(plan.findings)]
    nothing = ["The audit had nothing to say."] if len(plan.arms) > 1 and not findings else []
    costs = costs_table(plan)
    empty = {name for at, name in enumerate(costs.head) if all(row[at] == "–" for row in costs.rows)}
    measured = Table(costs.name, "what each arm costs", *without(empty, costs.head, costs.rows), costs.first)
    design, names = design_table(plan), printed_study(plan.ablation, comparison).names
    several = [differences_table(plan)] * (len(plan.arms) > 1)
    spelled = printed(with_names(measured, names), names)
    tables = [folded(table) for table in ([design] if design else []) + [spelled, *several]]
    items = [*details(registration), *allowed, *findings, *nothing]
    return Section("design", "Design, and what was controlled", texts, items, tables)


def _runs(ablation: Ablation, seen: Sequence[Seen], comparison: Comparison, store: Store, folder: Path) -> Section:
    """What is missing and why; then every run with where it lies."""
    lost, texts = _lost(seen, folder), [*_lacking(ablation, seen, store)]
    known = run_addresses(store.root / "mlflow.db", ablation.study.study)
    head = ["run", "state", comparison.metric, "steps", "stage", *["MLflow"] * bool(known)]
    rows = []
    for run, result in seen:
        address = known.get((run.arm.name, str(run.seed)))
        row = [run.name, _word(result.state), text.value(result.metric(comparison.metric))]
        row += [str(result.result.get("steps", "–")), _in_store(run.last, run.last.fingerprint, folder)]
        rows.append([*row, *[Link("open", address) if address else "–"] * bool(known)])
    notes = [
        "stages are linked to the store that this file lies in",
        *["MLflow answers while `lit-llm ui` runs"] * bool(known),
    ]
    every = folded(Table("runs", "all runs", head, rows, len(head), tuple(notes), left=2))
    tables = [Table("missing", "what did not end well", ["run", "state", "why", "log"], lost, 4, left=4)] * bool(lost)
    return Section("runs", "Runs", texts or ["All runs are done."], tables=[*tables, every])


def _lacking(ablation: Ablation, seen: Sequence[Seen], store: Store) -> Iterator[str]:
    """What has not been run, and the command that would."""
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


def _lost(seen: Sequence[Seen], folder: Path) -> list[list[str]]:
    """Runs that ended without a value, the last line of what went wrong, and where their log is."""
    rows = []
    for run, result in seen:
        if result.state in ("done", "pending", "running"):
            continue
        step = run.current()
        why = (step.status().get("error") or "").strip().splitlines() or ["–"]
        log = _in_store(step.stage, step.stage.log_file.name, folder) if step.stage.log_file.exists() else "–"
        rows.append([run.name, _word(result.state), why[-1], log])
    return rows


def _in_store(stage: Stage, file: str, folder: Path) -> Link:
    """As seen from the page's folder; of a page in the store it works wherever the store is moved."""
    inside = "" if file == stage.fingerprint else file
    return Link(file, f"{quote(os.path.relpath(stage.folder, folder.absolute()))}/{inside}")


ORIGIN = ("version", "code", "torch", "python", "device", "precision", "kernels", "threads")


def _reproduce(ablation: Ablation, seen: Sequence[Seen], store: Store) -> Section:
    """Commands, the versions that the results are of, and the study's file."""
    commands = [ablation.command(name, store) for name in ("plan", "run", "report")]
    tables = [Table("versions", "what the results are of", ["", "value"], list(_versions(ablation, seen)), 2, left=2)]
    codes = [Code("commands", "\n".join(commands))]
    if ablation.file:
        codes.append(Code(Path(ablation.source).name, ablation.file.rstrip()))
    return Section("reproduce", "Reproduce", tables=tables, codes=codes)


def _versions(ablation: Ablation, seen: Sequence[Seen]) -> Iterator[list[str]]:
    """Each value that any finished result has; more than one says that results of several origins are there."""
    found: dict[str, dict[str, None]] = {}
    for _, result in seen:
        for origin in result.result.get("origins", ()):
            for key in ORIGIN:
                if origin.get(key) is not None:
                    found.setdefault(key, {})[str(origin[key])] = None
    for key in ORIGIN:
        if key in found:
            yield [{"version": "lit-llm", "code": "digest of its code"}.get(key, key), ", ".join(found[key])]
    digests = dict.fromkeys(identity_of_data(arm.experiment).digest for arm in ablation.arms)
    yield ["digest of the text", ", ".join(digests)]
