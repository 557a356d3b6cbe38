"""The switch of a study reaches training and validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study


def test_separate_documents_are_read_otherwise_in_training_and_in_validation(
    write_study: Callable[..., Path], store: Store, tmp_path: Path
) -> None:
    """With a learning rate of nearly nothing the weights are those of the start in both arms: a loss that differs is
    that of another mask. Documents of about ten bytes, so that every window holds some."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number:03}.txt").write_text(f"{number * number % 1009} words")
    data = f"{{corpus: {{kind: text, files: ['{texts}/*.txt']}}}}"
    body = f"""
arms:
  red: {{pretrain: {{data: {data}, training: {{optimizer: {{lr: 1e-20}}}}}}}}
  dec: {{extends: decllm-tiny, pretrain: {{data: {data}, training: {{optimizer: {{lr: 1e-20}}}}}}}}
  dec_open: {{extends: decllm-tiny, pretrain: {{data: {data}, training: {{optimizer: {{lr: 1e-20}}}},
    objective: {{kind: prefix_lm, split: random}}, masks: {{prefix: bidirectional}}}}}}
grid: {{factors: {{pretrain.masks.intra_document: [false, true]}}}}
"""
    finished = run_study(load_study(write_study("documents", body)), store, observer=Observer(), max_parallel=2)
    assert finished.exit_code == 0
    found = {run.name.split("/seed")[0]: run.last.result()["metrics"] for run in finished.runs}
    assert len(found) == 6
    for arm in ("red", "dec", "dec_open"):
        joined, separate = found[arm], found[f"{arm}/intra_document=true"]
        for name in ("train/loss", "val/target_nll", "val/objective_loss"):
            assert joined[name] != separate[name], (arm, name)
            assert joined[name] == pytest.approx(separate[name], abs=0.5), "both of a model that knows nothing"
