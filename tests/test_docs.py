"""What the README and the pages in `docs/` show is what the tool does."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from instructions import write_instructions
from typer.testing import CliRunner

import lit_llm
from lit_llm.cli import app
from lit_llm.components.attention.config import AttentionConfig, ResolvedAttention
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.sweeps.sweep import is_sweep, load_sweep

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = "\n".join(path.read_text() for path in (ROOT / "lit_llm").rglob("*.py"))


def snippets(language: str) -> list[object]:
    found = [
        (page.stem, text) for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)
    ]
    return [pytest.param(text, id=f"{page}-{number}") for number, (page, text) in enumerate(found)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped studies, and the text that the pages speak of."""
    for name in ("ablations", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name)
    data = tmp_path / "ablations" / "data"  # files are named from where the study lies
    data.mkdir()
    with gzip.open(data / "part.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"{n} words", "red_pajama_subset": "arxiv"}) + "\n" for n in range(100))
    (data / "train").mkdir()
    asked = [{"question": f"{n}?", "answer": f"{n}", "topic": "count"} for n in range(100)]
    with gzip.open(data / "train" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in asked)
    for name in ("validation", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    write_instructions(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ablations"


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_every_study_and_sweep_on_the_pages_is_planned_and_fair(snippet: str, folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_text(snippet)
    found = plan(load_sweep(path).ablation if is_sweep(str(path)) else load_study(path))
    assert len(found.arms) > 1
    assert not [finding for finding in found.findings if finding.kind in ("refused", "no_op", "confound")]


@pytest.mark.parametrize("snippet", snippets("python"))
def test_code_on_the_pages_stands_in_the_library(snippet: str) -> None:
    """An excerpt word for word; what a user would write, by its imports and its names."""
    imported = re.findall(r"^from (\S+) import (.+)$", snippet, re.M)
    if not imported:
        assert snippet.strip() in CODE
    for module, names in imported:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), name
    compile(snippet, "snippet", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_there_is_one_version() -> None:
    (declared,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    printed = CliRunner().invoke(app, ["--version"]).stdout
    assert lit_llm.__version__ == declared == cited
    assert printed == f"lit-llm {declared}\n"


def test_an_attention_resolves_every_key_that_can_be_written() -> None:
    """A key that is left out of the resolved form would be outside a run's identity."""
    assert AttentionConfig.model_fields.keys() <= ResolvedAttention.model_fields.keys()
