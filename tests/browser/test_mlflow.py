"""What MLflow's UI shows of a study, opened by `lit-llm ui`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from lit_llm.report.pages.study import write_report
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study
from lit_llm.tracking.mlflow_links import run_addresses

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.xdist_group("browser")

WAIT = 60_000
"""Milliseconds that the UI may take to draw."""


@pytest.fixture
def served(browser: Browser, write_study: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[str, Store]]:
    """The address that `lit-llm ui` prints for the study that was run last, while it serves; and the store."""
    path, store = write_study("shown", "arms: {red: {}, dec: {extends: decllm-tiny}}", (0, 1)), Store(tmp_path / "s")
    finished = run_study(load_study(path), store, observer=Observer(), max_parallel=2, report=write_report)
    assert finished.exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "ui.log"
    command = [sys.executable, "-m", "lit_llm", "ui", "--store", str(store.root), "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server)
        found = re.search(r"^shown: (\S+)$", log.read_text(), re.MULTILINE)
        assert found, log.read_text()
        yield found[1], store
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(90):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"{address} does not answer")


@pytest.mark.slow
def test_the_ui_opens_on_the_study_with_its_runs_its_charts_and_two_arms_compared(
    served: tuple[str, Store], page: tuple[Page, list[str]]
) -> None:
    (address, store), (shown, errors) = served, page
    missing: list[str] = []
    shown.on("response", lambda answer: missing.append(answer.url) if answer.status >= 400 else None)
    shown.set_viewport_size({"width": 1600, "height": 1000})
    names = [f"{arm}/seed 00{seed}" for arm in ("red", "dec") for seed in (0, 1)]

    shown.goto(address)
    for name in names:
        shown.get_by_role("link", name=name, exact=True).wait_for(timeout=WAIT)
    assert "Does it hold?" in shown.locator("body").inner_text()
    for column, values in (("arm", {"red", "dec"}), ("seed", {"0", "1"})):
        cells = shown.locator(f".ag-row [col-id='tags.`{column}`']").all_inner_texts()
        assert {cell.strip() for cell in cells} - {"", "-"} == values
    assert shown.get_by_text("test/target_nll").first.is_visible()

    shown.goto("about:blank")
    shown.goto(f"{address}&compareRunsMode=CHART")
    card = shown.get_by_test_id("experiment-view-compare-runs-card").filter(has_text="val/target_nll").first
    card.locator("svg .scatterlayer path.js-line").first.wait_for(state="attached", timeout=WAIT)
    assert card.is_visible()
    # The arms' own colours, of the figures of their report; and no axis that begins at zero, far below the losses.
    strokes = card.locator("svg .scatterlayer path.js-line").evaluate_all(
        "lines => lines.map(line => line.style.stroke)"
    )
    assert set(strokes) == {"rgb(0, 0, 0)", "rgb(0, 114, 178)"}
    last = shown.get_by_test_id("experiment-view-compare-runs-card").filter(has_text="flops vs. test/target_nll").first
    last.scroll_into_view_if_needed()
    last.locator("svg .scatterlayer path.point").first.wait_for(state="attached", timeout=WAIT)
    for chart in (card, last):
        ticks = [float(text) for text in chart.locator("svg .yaxislayer-above text").all_text_contents()]
        assert min(ticks) > 1

    runs = [run_addresses(store.root / "mlflow.db", "shown")[arm, "0"] for arm in ("red", "dec")]
    experiment = runs[0].split("/experiments/")[1].split("/")[0]
    ids = quote(json.dumps([run.rsplit("/", 1)[1] for run in runs]))
    shown.goto("about:blank")
    shown.goto(f"{address.split('#')[0]}#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}")
    shown.get_by_text("Comparing 2 Runs from 1 Experiment").first.wait_for(timeout=WAIT)
    compared = shown.locator("body").inner_text()
    assert "red/seed 000" in compared
    assert "dec/seed 000" in compared

    # A server without accounts has no current user; MLflow's UI asks all the same.
    assert {url.split("/ajax-api/")[-1] for url in missing} <= {"2.0/mlflow/users/current"}
    theirs = ("Failed to load resource", "null ResizeObserver loop")  # the line above; a table drawn a frame later
    assert [error for error in errors if not error.startswith(theirs)] == []
