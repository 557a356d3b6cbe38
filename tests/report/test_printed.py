"""A factorial with labels: tables, sentences and LaTeX, judged by hand; its results are written, not trained."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.config.problems import InputError
from lit_llm.report.pages.study import write_report
from lit_llm.report.paper import paper_tables, printed_answer, printed_study, printed_tables
from lit_llm.report.summary import render_study
from lit_llm.report.tables.table import in_latex, in_markdown
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.estimates import Estimate
from lit_llm.statistics.scaling.comparison import Crossing
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.names import Names
from lit_llm.studies.plan import plan
from lit_llm.studies.runs import Run, runs_of
from tests.made_up_results import finished_runs, loss_of, study_of
from tests.pages import ReadPage

LABELS = """
  labels:
    baseline: DecLLM
    model.attention.output_norm: Output norm
    qkv_norm: QKV norm
    qkv_norm=q+k+v: all three
    test/target_nll: nats per token
    val/target_nll: validation nats per token
  margin: 0.02
"""
FACTORS = ["lr", "Output norm", "QKV norm"]
LEVELS = [[lr, out, qkv] for lr in ("0.001", "0.01") for out in ("none", "head") for qkv in ("none", "all three")]
"""Of all arms: those of one learning rate together, for each meets the baseline of its own."""
Study = tuple[Ablation, list[Run], Comparison, Store]


@pytest.fixture(scope="module")
def study(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished factorial of two norms within two learning rates."""
    folder = tmp_path_factory.mktemp("printed")
    ablation, store = study_of(folder, corpus, LABELS), Store(folder / "store")
    runs = finished_runs(ablation, store)
    return ablation, runs, comparison_of(ablation, runs), store


@pytest.fixture(scope="module")
def folder(study: Study) -> Path:
    """What its report has left."""
    ablation, runs, comparison, store = study
    write_report(plan(ablation, built=False, runs=runs), runs, comparison, store)
    return store.study("blocks")


def seen(study: Study, width: int) -> list[str]:
    """The lines of the terminal."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render_study(study[0], study[2], width, study[3]))
    return console.export_text().splitlines()


# --- a factorial is columns of its factors ----------------------------------------------------------------------------


def test_the_arms_of_a_factorial_are_rows_of_levels(study: Study) -> None:
    arms = printed_tables(study[0], study[2])[0]
    assert list(arms.head[:5]) == [*FACTORS, "n", "nats per token"]
    assert [list(row[:3]) for row in arms.rows] == LEVELS
    means = {}
    for run in study[1]:
        means.setdefault(tuple(run.arm.levels.values()), []).append(loss_of(run))
    for lr, out, qkv in LEVELS:
        mean = sum(values := means[out, qkv.replace("all three", "q+k+v"), lr]) / len(values)
        (row,) = [row for row in arms.rows if list(row[:3]) == [lr, out, qkv]]
        assert row[4].split()[0] == f"{mean:.3f}"


def test_terminal_markdown_page_and_latex_have_the_same_rows(study: Study, folder: Path) -> None:
    rows = [[cell for cell in row if cell] for row in printed_tables(study[0], study[2])[0].rows]
    bare = [[re.sub(r"[*]", "", cell) for cell in row] for row in rows]
    terminal = [re.split(r" {2,}", line.strip()) for line in seen(study, 160)]
    markdown = [line.strip("| ").replace("*", "").split(" | ") for line in in_markdown_of(folder)]
    page = [[cell for cell in row if cell] for row in ReadPage(folder / "report.html").tables[0].rows]
    assert [row for row in bare if row not in terminal] == []
    assert [row for row in bare if row not in [[cell for cell in line if cell.strip()] for line in markdown]] == []
    assert page == bare
    written = (folder / "tables.tex").read_text()
    for lr, out, qkv in LEVELS:
        assert re.search(rf"^{lr} & {out} & {qkv} & 3 & ", written, re.MULTILINE)


def in_markdown_of(folder: Path) -> list[str]:
    return [line for line in (folder / "comparison.md").read_text().splitlines() if line.startswith("| ")]


def test_nothing_that_is_read_calls_an_arm_by_its_levels_or_a_factor_by_its_key(study: Study, folder: Path) -> None:
    captions = (folder / "figures" / "figures.md").read_text()
    texts = [*seen(study, 120), *(folder / "comparison.md").read_text().splitlines(), *captions.splitlines()]
    texts += (folder / "tables.tex").read_text().splitlines()
    assert [line for line in texts if re.search(r"baseline/|qkv_norm|output_norm|optimizer\.lr|val/target", line)] == []
    sentences = printed_answer(study[0], study[2])
    assert any("DecLLM (QKV norm all three, lr 0.01)" in sentence for sentence in sentences)


def test_csv_keeps_the_names_that_commands_take(study: Study, folder: Path) -> None:
    (head, *rows) = csv.reader((folder / "tables" / "arms.csv").open())
    names = {arm.name for arm in study[0].arms}
    assert head[0] == "arm"
    assert {row[0] for row in rows} == names
    assert {row["arm"] for row in csv.DictReader((folder / "runs.csv").open())} == names
    assert {row["arm"] for row in csv.DictReader(io.StringIO(study[2].csv()))} == names


def test_what_all_arms_share_is_one_line(study: Study) -> None:
    parts = printed_tables(study[0], study[2])
    assert parts[0].above.startswith("all: decoder-only, d_model 16, 300 steps, batch 4, length 32")
    assert "lr" not in re.findall(r"\w+", parts[0].above)  # a factor
    assert [part.above for part in parts[1:]] == [""] * (len(parts) - 1)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_cuts_no_cell_and_says_which_columns_stand_below(study: Study, width: int) -> None:
    lines, arms = seen(study, width), printed_tables(study[0], study[2])[0]
    assert max(map(len, lines)) <= width
    table = lines[: next(at for at, line in enumerate(lines) if line.startswith("·"))]
    cells = Counter(cell for line in table for cell in re.split(r" {2,}", line.strip()))
    assert [head for head in arms.head if not cells[head]] == []
    assert [cell for row in arms.rows for cell in row if cell and not cells[cell]] == []
    pieces = [line for line in table if re.match(r"lr +Output norm +QKV norm", line)]
    assert sum("further columns of the same rows" in line for line in table) == len(pieces) - 1
    assert len(pieces) == (1 if width == 120 else 2)


def test_of_arms_that_are_written_one_by_one_nothing_changes(corpus: Path, tmp_path: Path) -> None:
    text = (
        "study: x\nquestion: q\nextends: redllm-tiny\narms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}\n{compare}\n"
    )
    ablation = study_of(tmp_path, corpus, "compare: {labels: {red: RedLLM}}", text)
    names = Names(ablation)
    assert [names.arm(arm.name) for arm in ablation.arms] == ["RedLLM", "dec"]
    assert names.text("red against dec") == "red against dec"  # a word may be one of the sentence


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("outptu_norm: x", r"'outptu_norm' is no arm, factor, level or metric of this study - did you mean 'output_n"),
        ("qkv_norm=q+k: x", "did you mean 'qkv_norm=q[+]k[+]v'"),
        ("val/target_nl: x", "did you mean 'val/target_nll'"),
        ("lr: ' '", "a label needs a letter"),
        ("baseline/lr=0.01: baseline", "would both be printed as 'baseline'"),
    ],
)
def test_a_label_of_nothing_is_refused_at_its_line(label: str, says: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as refused:
        study_of(tmp_path, corpus, f"  labels:\n    {label}")
    line = (tmp_path / "blocks.yaml").read_text().splitlines().index(f"    {label}") + 1
    assert f"blocks.yaml:{line}:" in str(refused.value)


def test_a_crossing_of_laws_names_both_groups_as_they_are_printed(study: Study) -> None:
    crossing = Crossing(Estimate(1e15), Estimate(3.0), "baseline", "baseline/lr=0.01", True)
    renamed = Names(study[0]).put_into(crossing)
    assert (renamed.below_at_low_x, renamed.below_at_high_x) == ("DecLLM", "DecLLM (lr 0.01)")


def test_a_comparison_is_printed_once_and_another_one_anew(study: Study) -> None:
    first = printed_study(study[0], study[2])
    assert printed_study(study[0], study[2]) is first
    other = replace(study[2], rows=study[2].rows[:1])
    assert len(printed_tables(study[0], other)[0].rows) == 1


def test_a_command_keeps_the_names_that_it_takes(study: Study) -> None:
    names = Names(study[0])
    words = "`run --only baseline/lr=0.01 -o pretrain.training.optimizer.lr=1` of baseline/lr=0.01 in test/target_nll"
    assert names.text(words) == (
        "`run --only baseline/lr=0.01 -o pretrain.training.optimizer.lr=1` of DecLLM (lr 0.01) in nats per token"
    )


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def test_the_best_mean_is_bold_where_it_is_shown_to_be_better_than_its_baseline(study: Study) -> None:
    """At each learning rate: all three others are better than its baseline, and both norms together are the best."""
    arms = paper_tables(study[0], study[2])[0]
    best = [[lr, "head", "all three"] for lr in ("0.001", "0.01")]
    assert [list(arms.rows[row][:3]) for row, _ in arms.bold] == best
    assert {arms.head[column] for _, column in arms.bold} == {"nats per token"}
    assert in_latex([arms]).count(r"\textbf{") == in_markdown(arms).count("| **") == 2


def test_where_nothing_is_shown_to_be_better_nothing_is_bold(corpus: Path, tmp_path: Path) -> None:
    """Noise alone, and one arm that is worse."""
    ablation, store = study_of(tmp_path, corpus), Store(tmp_path / "store")
    runs = finished_runs(ablation, store, lambda run: 3.0 + 0.01 * run.seed + 0.5 * (run.arm.name.count("=") == 3))
    assert printed_tables(ablation, comparison_of(ablation, runs))[0].bold == ()


def test_latex_has_the_wanted_columns_and_notes_without_a_key(corpus: Path, tmp_path: Path, study: Study) -> None:
    ablation = study_of(tmp_path, corpus, f"{LABELS}  columns: [difference, mean]")
    arms, *others = paper_tables(ablation, study[2])
    assert list(arms.head) == [*FACTORS, "difference [95%]", "nats per token"]
    notes = [note for part in (arms, *others) for note in part.notes]
    assert len(notes) > 4
    assert [note for note in notes if "`" in note or "compare." in note] == []
    assert any("compare.correction" in note for note in study[2].notes)  # what was left out


def test_the_tables_compile(folder: Path, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX here; Debian's packages texlive-latex-base and texlive-latex-recommended are enough")
    shutil.copy(folder / "tables.tex", tmp_path / "tables.tex")
    lines = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", r"\input{tables}"]
    (tmp_path / "paper.tex").write_text("\n".join([*lines, r"\end{document}", ""]))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Output written on paper.pdf" in done.stdout
    assert (tmp_path / "paper.aux").read_text().count(r"\newlabel{tab:") == len([*(folder / "tables").glob("*.csv")])


# --- a study that has hardly begun ------------------------------------------------------------------------------------


def test_a_study_without_a_result_prints_three_lines_and_leaves_an_earlier_report(study: Study, folder: Path) -> None:
    ablation, _, _, store = study
    empty = Store(store.root.parent / "empty")
    runs = runs_of(ablation, empty)
    comparison = comparison_of(ablation, runs)
    lines = seen((ablation, runs, comparison, empty), 200)
    assert lines == [
        "blocks  Where does the norm belong?",
        "Not answered yet: none of 24 runs has ended with a result.",
        f"Nothing is finished yet: `{ablation.command('run')} --store {empty.root}` runs it.",
    ]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert len(before) > 10
    assert write_report(plan(ablation, built=False, runs=runs), runs, comparison, store) == []
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
