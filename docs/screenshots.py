"""Pictures of a finished study for the README: its report and MLflow's UI, as Chromium draws them.

    make screenshots        python docs/screenshots.py --store mlruns quickstart

Writes report.png, mlflow-runs.png and mlflow-charts.png to docs/images/, each below 150 kB.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
SIZE = {"width": 1280, "height": 800}
MOST_BYTES = 150_000
WAIT = 60_000
"""Milliseconds that MLflow's UI may take to draw."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="quickstart", help="the name of a finished study")
    parser.add_argument("--store", type=Path, default=Path("mlruns"))
    wanted = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium here: apt install chromium")
    report = wanted.store / "studies" / wanted.study / "report.html"
    if not report.exists():
        sys.exit(f"{report} is not there: `lit-llm run` writes it")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as driver, served(wanted.store, wanted.study) as address:
        # Root, as in a container, gets no sandbox; what is opened is ours.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(report.resolve().as_uri())
        save(page, "report.png")
        page.goto(address)
        page.locator(".ag-row").first.wait_for(timeout=WAIT)
        tidy(page)
        save(page, "mlflow-runs.png")
        page.goto("about:blank")  # an address that differs behind its # alone is not loaded again
        page.goto(f"{address}&compareRunsMode=CHART")
        page.locator("svg .scatterlayer path.js-line").first.wait_for(state="attached", timeout=WAIT)
        tidy(page)
        save(page, "mlflow-charts.png")
        browser.close()


@contextmanager
def served(store: Path, study: str) -> Iterator[str]:
    """The address at which `lit-llm ui` shows the study, while it does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "lit_llm",
        "ui",
        study,
        "--store",
        str(store),
        "--port",
        str(port),
        "--no-open",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        told = [server.stdout.readline() for _ in range(2)]
        found = re.search(r"^\S+: (http\S+)$", "".join(told), re.MULTILINE)
        if found is None:
            sys.exit(f"`lit-llm ui` told no address: {''.join(told)}")
        for _ in range(120):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield found[1]
    finally:
        server.terminate()
        server.wait(30)


def tidy(page: Page) -> None:
    """Without the assistant that MLflow opens beside a study on a first visit."""
    for close in page.get_by_role("button", name=re.compile("^close", re.IGNORECASE)).all():
        if close.is_visible():
            close.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(2500)  # the charts grow into the place that is free


def save(page: Page, name: str) -> None:
    """A window's worth of it, in 256 colours."""
    picture = (
        Image.open(io.BytesIO(page.screenshot()))
        .convert("RGB")
        .quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    )
    picture.save(IMAGES / name, optimize=True)
    size = (IMAGES / name).stat().st_size
    print(f"docs/images/{name}: {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        sys.exit(f"{name} is above {MOST_BYTES / 1000:.0f} kB")


if __name__ == "__main__":
    main()
