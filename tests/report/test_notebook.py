"""The notebook of the pages, and the live view in a notebook."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lit_llm.report.progress.terminal import Progressing
from lit_llm.studies.runs import Run

DOCS = Path(__file__).parents[2] / "docs"
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_notebook", DOCS / "make_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_has_the_cells_of_its_script_executed_in_order(maker: Any) -> None:
    kept = nbformat.read(DOCS / "notebook.ipynb", 4)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == maker.CELLS
    numbers = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    outputs = [output for cell in kept.cells for output in cell.get("outputs", ())]
    assert "error" not in {output.output_type for output in outputs}
    assert (DOCS / "notebook.ipynb").stat().st_size < 60_000
    assert "/tmp" not in (DOCS / "notebook.ipynb").read_text()


@pytest.mark.slow
def test_the_notebook_runs(maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    short = "max_steps: 4, schedule: {warmup_steps: 1}"
    cells = [(kind, text.replace("max_steps: 60", short)) for kind, text in maker.CELLS]
    assert cells != maker.CELLS
    monkeypatch.setattr(maker, "CELLS", cells)
    messages: list[tuple[str, dict[str, Any]]] = []

    class Listening(maker.NotebookClient):
        def process_message(self, msg: Any, *args: Any) -> Any:
            messages.append((msg["msg_type"], msg["content"]))
            return super().process_message(msg, *args)

    monkeypatch.setattr(maker, "NotebookClient", Listening)
    made = maker.executed(tmp_path)
    tables = ["".join(o.get("data", {}).get("text/html", "") for o in cell.get("outputs", ())) for cell in made.cells]
    assert any("verdict" in table for table in tables)
    assert (tmp_path / "mlruns" / "studies" / "qkv_norm" / "report.html").exists()
    view = [(kind, content) for kind, content in messages if content.get("transient", {}).get("display_id")]
    assert [kind for kind, _ in view] == ["display_data", *["update_display_data"] * (len(view) - 1)]
    assert len({content["transient"]["display_id"] for _, content in view}) == 1
    texts = [re.sub("<[^>]*>", "", content["data"]["text/html"]).strip() for _, content in view]
    assert any("seed 0" in text for text in texts[1:])
    assert texts[-1] == ""


class Shown:
    """What stands in a notebook's output: `display` puts it there, its handle replaces it."""

    def __init__(self) -> None:
        self.now: list[str] = []

    def display(self, content: str, display_id: bool) -> Shown:
        assert display_id
        self.update(content)
        return self

    def update(self, content: str) -> None:
        self.now.append(content)


def test_a_notebook_shows_the_live_view_in_one_place_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown()
    module = types.ModuleType("IPython.display")
    vars(module).update(display=shown.display, HTML=lambda html: html)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    progress = Progressing(Console(force_jupyter=True, quiet=True))
    runs: list[Run] = []
    progress.launching(runs, runs, 1)
    assert shown.now == []  # nothing to do
    table = Table("run", "step")
    table.add_row("red & dec", "4/8")
    monkeypatch.setattr(progress, "_view", lambda: table)
    progress._start_live()
    progress.poll()
    progress.finished()
    first, second, last = shown.now
    assert first == second
    assert "red &amp; dec" in first
    assert first.startswith("<pre")
    assert "red" not in last
