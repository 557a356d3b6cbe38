"""Timing real steps: what they are kept by, and that they are those of the code that trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.runs import step_timing
from lit_llm.runs.step_timing import RandomBatches, Setting, StepTiming, TimedStep, cached, keep, measure, setting_of

SMALL = ["model.d_model=16", "model.attention.heads=2", "model.feed_forward.d_ff=32", "model.vocabulary=1100"]
SMALL += ["pretrain.data.sequence_length=32", "pretrain.data.batch_size=4"]
HERE = Setting("cpu", 1, 1)
ONE = StepTiming(0.25, 3, None, 0.0, "2026-01-01")


def experiment(*overrides: str, preset: str = "redllm-tiny") -> Experiment:
    return load_experiment(preset, [*SMALL, *overrides])


def timed(*overrides: str, setting: Setting = HERE) -> TimedStep:
    return TimedStep(experiment(*overrides), "pretrain", setting)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_kept_is_found_again() -> None:
    assert cached(timed()) is None
    keep(timed(), ONE)
    assert cached(timed()) == ONE


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("seed=3", True),
        ("pretrain.training.max_steps=77", True),
        ("pretrain.training.optimizer.lr=0.1", True),
        ("pretrain.training.schedule=linear", True),
        ("pretrain.validation.times=9", True),
        ("pretrain.training.optimizer.kind=muon", False),
        ("pretrain.training.dropout=0.1", False),
        ("pretrain.training.precision=bf16", False),
        ("pretrain.training.execution.micro_batch_size=2", False),
        ("pretrain.data.batch_size=8", False),
        ("pretrain.data.sequence_length=64", False),
        ("model.attention.output_norm=none", False),
    ],
)
def test_a_step_is_known_by_what_decides_its_time(override: str, same: bool) -> None:
    keep(timed(), ONE)
    assert (cached(timed(override)) == ONE) == same


@pytest.mark.parametrize("change", [{"threads": 2}, {"at_once": 2}, {"device": "cuda"}])
def test_another_setting_is_another_timing(change: dict[str, object]) -> None:
    keep(timed(), ONE)
    assert cached(timed(setting=replace(HERE, **change))) is None


def test_a_timing_of_another_machine_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(timed(), ONE)
    monkeypatch.setattr(step_timing, "machine", lambda: {"host": "another"})
    assert cached(timed()) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"seconds": "long"}', "null"])
def test_a_damaged_cache_is_no_timing(content: str, own_cache: Path) -> None:
    keep(timed(), ONE)
    (file,) = own_cache.rglob("*.json")
    file.write_text(content)
    assert cached(timed()) is None


def test_a_cache_that_cannot_be_written_is_no_error(own_cache: Path) -> None:
    (own_cache / "lit-llm").write_text("a file where a folder should be")
    keep(timed(), ONE)
    assert cached(timed()) is None


def test_as_many_are_timed_together_as_run_on_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "cores", lambda: 8)
    training = experiment("pretrain.training.execution.threads=3").pretrain.training
    assert [setting_of(training, max_parallel).at_once for max_parallel in (1, 2, 5)] == [1, 2, 2]


@pytest.mark.slow
def test_steps_are_timed_in_processes_of_their_own_and_kept() -> None:
    """A wider model takes longer; two processes go through both."""
    steps = [timed(setting=Setting("cpu", 1, 2))]
    steps.append(timed("model.d_model=256", "model.feed_forward.d_ff=2048", setting=Setting("cpu", 1, 2)))
    counted: list[tuple[int, int]] = []
    found = dict(zip("ab", (timing for _, timing in measure(steps, lambda *done: counted.append(done))), strict=True))
    assert counted == [(1, 2), (2, 2)]
    assert 0 < found["a"].seconds < found["b"].seconds
    assert found["a"].resident_bytes > 50_000_000
    assert found["a"].device_bytes is None
    assert [cached(step) for step in steps] == [found["a"], found["b"]]


@pytest.mark.slow
def test_a_step_that_cannot_be_timed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experiment, "model_dump", lambda self, **_: {"model": "no model"})
    with pytest.raises(InputError, match="--measure: a step could not be timed"):
        list(measure([timed()]))


@pytest.mark.parametrize("preset", ["redllm-tiny", "decllm-tiny", "modernbert-tiny", "ul2-tiny"])
def test_random_batches_have_the_shape_that_training_has(preset: str) -> None:
    of = load_experiment(preset, ["pretrain.data.batch_size=3", "pretrain.data.sequence_length=48"])
    batch = RandomBatches(of, "pretrain")[0]
    assert batch.targets.shape[0] == 3
    assert int(batch.targets.max()) < of.model.vocabulary


def test_a_batch_of_the_finetuning_is_as_long_as_its_examples_may_be() -> None:
    examples = "{examples: {kind: jsonl, files: [x]}, input_length: 9, target_length: 5, batch_size: 2}"
    tuned = f"finetune={{data: {examples}, training: {{max_steps: 1, schedule: constant}}}}"
    batch = RandomBatches(experiment(tuned), "finetune")[0]
    assert tuple(batch.inputs["source_BS"].shape) == (2, 9)
    assert batch.targets.shape[0] == 2
    assert int(batch.weights.sum()) == 10


@pytest.mark.gpu
def test_a_gpu_has_a_clock_and_memory_of_its_own() -> None:
    ((_, found),) = measure([TimedStep(experiment(), "pretrain", Setting("cuda", 1, 1))])
    assert found.seconds > 0
    assert found.device_bytes is not None
    assert found.device_bytes > 1_000_000_000
