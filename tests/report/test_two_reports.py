"""`lit-llm report A B`: what is shown, written and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.config.problems import InputError
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study
from tests.pages import ReadPage

ARMS = "arms: {red: {}, bare: {model: {attention: {output_norm: none}}}, dec: {extends: decllm-tiny}}"
NLL = "test/target_nll"


def report(store: Store, *paths: Path, options: tuple[str, ...] = ()) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, paths), "--store", str(store.root), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def written(write_study: Callable[..., Path]) -> tuple[Path, Path]:
    """The second trains half as long, and has one arm less and one more."""
    first = write_study("two-long", ARMS, seeds=[0, 1, 2])
    second = write_study(
        "two-short", ARMS.replace("dec: {extends: decllm-tiny}", "dec2: {extends: decllm-tiny}"), seeds=[0, 1, 2]
    )
    second.write_text(second.read_text().replace("max_steps: 12", "max_steps: 6"))
    return first, second


def test_two_studies_are_shown_side_by_side(written: tuple[Path, Path], store: Store) -> None:
    finished = [run_study(load_study(path), store, observer=Observer(), max_parallel=2) for path in written]
    means = [{row.arm: row.mean for row in study.comparison.rows} for study in finished]
    output = re.sub(r"\s+", " ", report(store, *written))
    for arm in ("red", "bare"):
        assert f"{arm} {means[0][arm]:.3f} {means[1][arm]:.3f}" in output
    assert "in two-long alone: dec" in output
    page = ReadPage(store.study("two-long") / "beside-two-short.html")
    assert page.texts["h1"] == ["two-long and two-short"]
    arms, differs = page.tables[:2]
    assert arms.column("two-long") == {arm: f"{means[0][arm]:.3f}" for arm in ("red", "bare")}
    assert differs.rows == [["all", "pretrain.training.max_steps", "12", "6"]]
    assert f"lit-llm report {written[0]} {written[1]} --store {store.root}" in page.texts["pre"]
    found = json.loads(report(store, *written, options=("--json",)))
    assert found["names"] == ["two-long", "two-short"]
    assert [row["arm"] for row in found["arms"]["rows"]] == ["red", "bare"]


def test_before_anything_is_finished_that_is_said(written: tuple[Path, Path], tmp_path: Path) -> None:
    output = re.sub(r"\s+", " ", report(Store(tmp_path / "empty"), *written))
    assert "Nothing can be said yet: two-long and two-short have no arm that is compared in both." in output


@pytest.mark.parametrize(
    ("rest", "name", "why"),
    [
        (ARMS, "two-long", "both are called two-long"),
        ("arms: {rad: {}}", "other", "they have no arm in common: 'red' is none of the second's - did you mean 'rad'?"),
        (
            f"{ARMS}\ncompare: {{metric: val/perplexity}}",
            "other",
            "they compare different metrics, test/target_nll and val/perplexity",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    rest: str, name: str, why: str, written: tuple[Path, Path], write_study: Callable[..., Path], store: Store
) -> None:
    first = written[0].rename(written[0].with_name("first.yaml"))
    second = write_study(name, rest)
    with pytest.raises(InputError, match=re.escape(why)):
        CliRunner().invoke(app, ["report", str(first), str(second), "--store", str(store.root)], catch_exceptions=False)
