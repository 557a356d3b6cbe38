"""What is known of a machine: kept, found again, and never taken for another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_ceilings import USUAL

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.runs import machine_benchmark
from lit_llm.runs.machine_benchmark import Setting, cache_file, cached, keep, measure, setting_of

SETTING = Setting("cpu", "fp32", 1, 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_kept_is_found_again() -> None:
    assert cached(SETTING) is None
    keep(SETTING, USUAL)
    assert cached(SETTING) == USUAL


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"threads": 2}, {"at_once": 2}, {"device": "cuda"}])
def test_another_setting_is_another_measurement(change: dict[str, object]) -> None:
    keep(SETTING, USUAL)
    assert cached(replace(SETTING, **change)) is None


def test_a_cache_that_came_from_another_machine_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(SETTING, USUAL)
    file = cache_file(SETTING)
    monkeypatch.setattr(machine_benchmark.platform, "node", lambda: "elsewhere")
    assert cached(SETTING) is None
    file.rename(cache_file(SETTING))  # a home directory that was copied: the right name, the wrong content
    assert cached(SETTING) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": {}}', '{"ceilings": {}}'])
def test_a_corrupt_cache_is_no_measurement(content: str) -> None:
    keep(SETTING, USUAL)
    cache_file(SETTING).write_text(content)
    assert cached(SETTING) is None


@pytest.mark.parametrize("name", ["layer", "logits", "update"])
def test_a_measurement_of_another_form_is_none(name: str) -> None:
    keep(SETTING, USUAL)
    content = json.loads(cache_file(SETTING).read_text())
    content["ceilings"][name] = "fast"
    cache_file(SETTING).write_text(json.dumps(content))
    assert cached(SETTING) is None


def test_a_cache_that_cannot_be_written_is_no_error(own_cache: Path) -> None:
    (own_cache / "lit-llm").write_text("a file where the directory would be")
    keep(SETTING, USUAL)
    assert cached(SETTING) is None


def test_as_many_are_timed_together_as_run_on_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_benchmark, "cores", lambda: 4)
    experiment = load_experiment("redllm-tiny", ["pretrain.training.execution.threads=2"])
    found = {slots: setting_of(experiment.pretrain.training, slots).at_once for slots in (1, 2, 3, 64)}
    assert found == {1: 1, 2: 2, 3: 2, 64: 2}


def test_a_timing_that_fails_says_why() -> None:
    with pytest.raises(InputError, match="could not be timed"):
        measure(replace(SETTING, device="abacus"))
    assert cached(SETTING) is None


def test_measuring_finds_positive_figures_and_keeps_them() -> None:
    found = measure(SETTING)
    rates = [*found.layer.values(), *found.scores[128].values(), *found.logits.values()]
    assert min(rates) > 0
    assert found.layer_seconds > 0
    assert min(for_each for for_each, _ in found.update.values()) > 0
    assert found.resident_bytes > 10_000_000
    assert cached(SETTING) == found


@pytest.mark.gpu
def test_a_gpu_is_measured_by_its_own_clock_and_has_memory_of_its_own() -> None:
    found = measure(Setting("cuda", "bf16", 1, 1))
    assert found.device != "cpu"
    assert found.device_bytes is not None
    assert min(found.layer.values()) > 0
