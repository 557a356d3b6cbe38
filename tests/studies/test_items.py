"""`lit-llm diff A B --items`: the records of two arms' finished runs, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.evaluation.unit_losses import UnitLosses, write_losses
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.runs import Run
from tests.commands import lit_llm
from tests.studies.chosen_results import NLL, finish

VALUES = {"a": [3.0, 3.1, 3.05], "b": [2.9, 2.98, 2.96], "c": [3.0, 3.0, 3.0]}
"""Of c no losses of documents are kept."""


@pytest.fixture
def study(write_study: Callable[..., Path], tmp_path: Path) -> tuple[str, list[str]]:
    arms = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {model: {attention: {qkv_norm: []}}}}"
    path, store = write_study("pair", arms, seeds=[0, 1, 2]), Store(tmp_path / "store").open()
    ablation = load_study(path)
    for arm in ablation.arms[:2]:
        for seed, value in enumerate(VALUES[arm.name]):
            stage = Run.of(arm, seed, store).last
            stage.folder.mkdir(parents=True)
            # The first document of 30 tokens makes the difference; the others have the mean.
            nats = [30 * (value + 0.9 * (arm.name == "b")), *[10 * (value - 0.3 * (arm.name == "b"))] * 9]
            losses = UnitLosses("", [*range(10)], nats, [30, *[10] * 9], None, split="test")
            write_losses(stage.losses_file, [losses])
    finish(ablation, store, VALUES)
    return str(path), ["--store", str(store.root)]


def test_the_document_that_makes_the_difference_comes_first(study: tuple[str, list[str]]) -> None:
    path, store = study
    pair = [f"{path}:a", f"{path}:b", "--items"]
    shown = lit_llm("diff", *pair, "--top", 3, *store)
    assert shown.returncode == 0, shown.stderr
    assert f"{NLL}, {path}:b minus {path}:a" in " ".join(shown.stdout.split())
    assert "7 more" in shown.stdout
    found = json.loads(lit_llm("diff", *pair, "--json", *store).stdout)
    assert (found["metric"], found["seeds"], len(found["items"])) == (NLL, [0, 1, 2], 10)
    first = found["items"][0]
    assert first["item"] == "0"
    assert first["share"] == pytest.approx(30 / 120)
    assert first["difference"]["mean"] == pytest.approx(0.9 - 0.31 / 3)
    assert sum(row["part"] for row in found["items"]) == pytest.approx(found["whole"]["mean"])
    assert found["whole"]["mean"] == pytest.approx(-0.31 / 3)


def test_what_cannot_be_compared_is_refused_with_the_next_step(study: tuple[str, list[str]]) -> None:
    path, store = study
    for arguments, message in (
        ([f"{path}:a", f"{path}:c", "--items"], "is not kept item by item"),
        ([f"{path}:a", f"{path}:b", "--items", "--metric", "test/target_nl"], "did you mean 'test/target_nll'?"),
        ([path, f"{path}:b", "--items"], "has several arms; name one"),
        ([f"{path}:a", f"{path}:b", "--metric", NLL], "--metric: is the metric of --items"),
    ):
        refused = lit_llm("diff", *arguments, *store)
        assert refused.returncode == 2, refused.stdout
        assert message in refused.stderr
