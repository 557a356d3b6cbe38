"""A study's page as a reader's browser draws it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imread

from lit_llm.report.pages.study import write_report
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.xdist_group("browser")

LEGIBLE = 8.0
"""Pixels below which the letters of a figure cannot be read; the smallest are of 6.5 points where it is drawn."""


@pytest.fixture(scope="module")
def report(corpus: Path, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study with figures of most kinds."""
    folder = tmp_path_factory.mktemp("browsed")
    path = folder / "browsed.yaml"
    path.write_text(
        f"""
study: browsed
question: Is it legible on a telephone, too?
extends: redllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training:
      {{max_steps: 6, schedule: {{warmup_steps: 2}}, execution: {{log_every: 2}}, stability: {{logit_every: 2}}}}
    validation: {{times: 3, sequences: 8}}
  evaluate:
    extrapolation: {{lengths: [1, 2], prefixes: [1, half], sequences: 4}}
    attention: {{sequences: 2, sensitivity_sequences: 1, buckets: 4}}
arms:
  red: {{}}
  dec: {{extends: decllm-tiny, pretrain: {{objective: prefix_lm}}}}
grid:
  design: factorial
  factors:
    model.attention.output_norm: [head, none]
    pretrain.training.optimizer.lr: [1e-3, 1e-2]
seeds: [0, 1]
allow: [{{key: budget, because: small arms cost what they cost}}]
"""
    )
    finished = run_study(
        load_study(path), Store(folder / "store"), observer=Observer(), max_parallel=2, report=write_report
    )
    assert finished.exit_code == 0
    return finished.folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_figure_is_visible_and_labelled_and_the_console_is_silent(
    report: Path, page: tuple[Page, list[str]], width: int, scheme: Any
) -> None:
    shown, errors = page
    asked: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.emulate_media(color_scheme=scheme)
    shown.set_viewport_size({"width": width, "height": 800})
    shown.goto(report.as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width  # the page itself never scrolls sideways
    figures = shown.locator("figure")
    names = {file.stem for file in (report.parent / "figures").glob("*.svg")}
    assert {figures.nth(at).get_attribute("id") for at in range(figures.count())} == {
        f"figure-{name}" for name in names
    }
    assert len(names) > 8
    for at in range(figures.count()):
        figure = figures.nth(at)
        figure.scroll_into_view_if_needed()
        image, caption = figure.locator("img"), figure.locator("figcaption")
        assert image.is_visible()
        assert caption.is_visible()
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        assert image.get_attribute("alt") in caption.inner_text()
        box, frame = image.bounding_box(), figure.locator(".scroll").bounding_box()
        assert box is not None
        assert frame is not None
        drawn = image.evaluate("image => image.naturalWidth")  # at 96 pixels an inch, so a point is 4/3 of one
        assert box["width"] / drawn * 6.5 * 4 / 3 >= LEGIBLE - 0.1
        assert box["height"] > 100
        assert 0 <= frame["x"] < frame["x"] + frame["width"] <= width  # it is the frame that scrolls
    assert errors == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}


@pytest.mark.parametrize("width", [1280, 400])
def test_every_table_is_reached_to_its_last_column(report: Path, page: tuple[Page, list[str]], width: int) -> None:
    """Wider than the screen, it is scrolled in its own frame, with a finger or by the arrow keys."""
    shown, errors = page
    shown.set_viewport_size({"width": width, "height": 800})
    shown.goto(report.as_uri())
    for fold in shown.locator("details > summary").all():
        fold.click()
    tables, titled = shown.locator("table"), shown.locator("h3[id^='table-']")
    names = {(title.get_attribute("id") or "").removeprefix("table-") for title in titled.all()}
    written = {file.stem for file in (report.parent / "tables").glob("*.csv")}
    assert len(written) > 1
    assert len(written - names) <= 1  # the first stands under its section's title
    assert tables.count() == len(names | written | {"noise"})  # as does the one on the noise, which is in no file
    wider = 0
    for table in tables.all():
        frame = table.locator("xpath=..")
        frame.scroll_into_view_if_needed()
        last = table.locator("th").last
        box = frame.bounding_box()
        assert box is not None
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
        if frame.evaluate("frame => frame.scrollWidth > frame.clientWidth"):
            wider += 1
            assert frame.get_attribute("tabindex") == "0"  # Chromium's keys reach it without, Safari's do not
            frame.press("ArrowRight")
            shown.wait_for_function("frame => frame.scrollLeft > 0", arg=frame.element_handle(), timeout=5000)
            frame.evaluate("frame => frame.scrollTo({left: frame.scrollWidth, behavior: 'instant'})")
        end = last.bounding_box()
        assert end is not None
        assert end["width"] > 0
        assert 0 <= end["x"] + end["width"] <= box["x"] + box["width"] + 1  # a part of a pixel is rounded
    if width == 400:
        assert wider > 3
    assert errors == []


SHADE = 8
"""Pixels at the edge of a frame that are looked at."""


def edges(frame: Locator) -> tuple[float, float]:
    """How much the left and the right edge of a frame differ from what is 40 pixels further inside, from 0 to 255; of
    the rows that are alike inside, so that letters and lines are not counted."""
    pixels = 255 * imread(io.BytesIO(frame.screenshot()))[:, :, :3].mean(axis=2)
    sides = []
    for side in (pixels, pixels[:, ::-1]):
        edge, inside = side[:, 2:SHADE].mean(axis=1), side[:, 60:90].mean(axis=1)
        calm = np.ptp(side[:, 2:90], axis=1) < 120
        sides.append(float(np.median(np.abs(edge - inside)[calm])) if calm.any() else 0.0)
    return sides[0], sides[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_cut_has_a_shade_at_that_edge_and_what_is_whole_has_none(
    report: Path, page: tuple[Page, list[str]], scheme: Any
) -> None:
    """Of tables and of figures, on a telephone: at the right until the end is reached, then at the left."""
    shown, _ = page
    shown.emulate_media(color_scheme=scheme)
    shown.set_viewport_size({"width": 400, "height": 2000})
    shown.goto(report.as_uri())
    cut = {"table": 0, "figure": 0}
    for kind, frame in [
        *(("table", one) for one in shown.locator("#results .scroll").all()),
        *(("figure", one) for one in shown.locator("figure .scroll").all()),
    ]:
        frame.scroll_into_view_if_needed()
        left, right = edges(frame)
        if frame.evaluate("frame => frame.scrollWidth <= frame.clientWidth + 1"):
            assert left < 6
            assert right < 6
            continue
        cut[kind] += 1
        assert left < 6 < 12 < right, kind
        frame.evaluate("frame => frame.scrollTo({left: frame.scrollWidth, behavior: 'instant'})")
        left, right = edges(frame)
        assert right < 6 < 12 < left, kind
    assert min(cut.values()) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(report: Path, page: tuple[Page, list[str]], scheme: Any) -> None:
    """WCAG's contrast of 4.5 for every text."""
    shown, _ = page
    shown.emulate_media(color_scheme=scheme)
    shown.goto(report.as_uri())
    contrasts = shown.evaluate(
        """() => {
          const light = colour => {
            const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
              .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const behind = element => {
            while (element) {
              const colour = getComputedStyle(element).backgroundColor;
              if (!/, 0\\)$/.test(colour)) return colour;
              element = element.parentElement;
            }
            return 'rgb(255, 255, 255)';
          };
          return [...document.querySelectorAll('h1, h2, h3, p, li, td, th, a, figcaption, code')].map(element => {
            const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
            return [element.tagName, (pair[0] + 0.05) / (pair[1] + 0.05)];
          });
        }"""
    )
    assert len(contrasts) > 100
    assert [found for found in contrasts if found[1] < 4.5] == []


def test_it_prints_with_all_its_figures_inside_the_paper(
    report: Path, page: tuple[Page, list[str]], tmp_path: Path
) -> None:
    shown, errors = page
    shown.goto(report.as_uri())
    shown.emulate_media(media="print")
    shown.set_viewport_size({"width": 680, "height": 960})  # an A4 page within its margins
    images = shown.locator("figure img")
    for at in range(images.count()):
        box = images.nth(at).bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 680
    assert not shown.locator("nav").is_visible()
    shown.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert errors == []


def test_a_link_leads_to_its_stage_and_the_contents_to_their_sections(
    report: Path, page: tuple[Page, list[str]]
) -> None:
    shown, _ = page
    shown.goto(report.as_uri())
    for link in shown.locator("nav a").all():
        link.click()
        anchor = (link.get_attribute("href") or "").removeprefix("#")
        assert shown.locator(f"section[id='{anchor}'] h2").is_visible()
    stage = shown.locator("#runs a").first
    name = stage.inner_text()
    stage.click()
    assert f"/stages/{name}/" in shown.url
    assert shown.get_by_text("result.json").is_visible()
