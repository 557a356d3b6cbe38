"""Reports of stores that can only be read, in folders of one's own; and names of any script and any sign."""

from __future__ import annotations

import csv
import errno
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from lit_llm.cli import app
from lit_llm.report.figures.fonts import DEFAULT, families, spelled
from lit_llm.report.figures.inputs import Drawn
from lit_llm.report.figures.study import write_figures
from lit_llm.report.pages import study as study_report
from lit_llm.report.pages.study import markdown_of, write_report
from lit_llm.report.pages.two_studies import load_two, two_tables
from lit_llm.report.tables.table import slug
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.runs import runs_of
from tests.made_up_results import finish, finished_runs

Study = Callable[..., Path]
ARMS = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}}"
ODD = """
grid:
  factors:
    归一化/x:
      "没有": {model.attention.output_norm: none}
      "=1+1": {model.attention.output_norm: head}
      "a|b `c`": {model.attention.output_norm: concat}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("elsewhere") / "store").open()


def report(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)], env={"COLUMNS": "80"})


def test_a_store_that_can_only_be_read_shows_its_tables_and_says_what_to_do(
    write_study: Study, place: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study("only_read", ARMS, seeds=[0, 1])
    finished_runs(load_study(path), place, lambda run: 3.0 + 0.1 * run.seed + 0.2 * (run.arm.name == "b"))
    place.study("only_read").mkdir(parents=True)
    write = study_report.write_text

    def read_only(file: Path, text: str) -> Path:
        if file.is_relative_to(place.root):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return write(file, text)

    monkeypatch.setattr(study_report, "write_text", read_only)
    said = report(path, "--store", place.root)
    assert said.exit_code == 0, said.output
    assert "b " in said.output
    assert "Read-only file system; `--out DIR` writes the report elsewhere." in " ".join(said.output.split())
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "my own.txt").write_text("of the paper")
    assert report(path, "--store", place.root, "--out", out).exit_code == 0
    links = re.findall(r'href="([^"]*/stages/[^"]*)"', (out / "report.html").read_text(encoding="utf-8"))
    assert len(links) == 4
    assert all((out / unquote(link)).exists() for link in links)
    assert (out / "tables" / "arms.csv").exists()
    assert (out / "figures" / "my own.txt").read_text() == "of the paper"
    refused = report(path, "--store", place.root, "--out", place.study("only_read"))
    assert refused.exit_code != 0
    assert "cannot be written to: Read-only file system" in str(refused.exception)


def test_names_of_any_script_are_text_everywhere(write_study: Study, place: Store) -> None:
    path = write_study("names", ODD, seeds=[0, 1], extends="decllm-tiny")
    ablation = load_study(path)
    runs = finished_runs(ablation, place, lambda run: 3.0 + 0.1 * run.seed)
    comparison = comparison_of(ablation, runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(plan(ablation, built=False, runs=runs), runs, comparison, place)
    folder = place.study("names")
    for file in ("comparison.csv", "runs.csv", *(f"tables/{each.name}" for each in (folder / "tables").iterdir())):
        text = comparison.csv() if file == "comparison.csv" else (folder / file).read_text(encoding="utf-8")
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "@"))], file
    markdown = (folder / "comparison.md").read_text(encoding="utf-8")
    assert r"a\|b \`c\`" in markdown
    figures = (folder / "figures" / "figures.md").read_text(encoding="utf-8")
    assert ("code points" in figures) == (families() == (DEFAULT,))
    asked = replace(ablation, study=ablation.study.model_copy(update={"question": "Is _it_ [x](http://e)?"}))
    assert "\nIs \\_it\\_ [x\\](http://e)?\n" in markdown_of(asked, comparison)


def test_a_caption_stays_text_in_markdown(tmp_path: Path) -> None:
    write_figures([Drawn("a", "Of *b* and [x](http://e).", Figure())], tmp_path, pdf=False)
    assert "\nOf \\*b\\* and [x\\](http://e).\n" in (tmp_path / "figures.md").read_text()


def test_a_letter_without_a_font_becomes_its_code_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llm.report.figures.fonts._letters", lambda: {ord("a")})
    assert spelled("a 归") == "a [5F52]"


def test_a_table_has_a_name_that_can_be_a_files() -> None:
    assert slug("归一化/a.b_c d") == "归一化-a-b-c-d"


def test_a_study_without_results_makes_no_baseline_of_its_arms(write_study: Study, place: Store) -> None:
    first, second = (write_study(name, ARMS, seeds=seeds) for name, seeds in (("with", [0, 1]), ("without", [5, 6])))
    for run in runs_of(load_study(first), place):
        finish(run, 3.0 + 0.1 * run.seed)
    rows: dict[str, Any] = {row[0]: row for row in two_tables(load_two(str(first), str(second), (), place))[0].rows}
    assert rows["a"][3:5] == ["baseline", "baseline"]
    assert rows["b"][4] == "–"


def test_differences_that_are_too_wide_for_a_table_stand_below_each_other() -> None:
    said = CliRunner().invoke(app, ["diff", "redllm-8b", "decllm-8b"], env={"COLUMNS": "50"})
    lines = said.output.splitlines()
    assert max(map(len, lines)) <= 50
    at = lines.index("model.family")
    assert [line.split() for line in lines[at + 1 : at + 3]] == [
        ["redllm-8b", '"encoder_decoder"'],
        ["decllm-8b", '"decoder"'],
    ]
