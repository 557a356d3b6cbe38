"""Which kernels a stage is computed with, from its configuration and the machine alone."""

from __future__ import annotations

import pytest

from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.kernels import kernels_of, lengths_vary
from lit_llm.runs.provenance import provenance, same_provenance

FINETUNE = (
    "finetune={data: {examples: {kind: jsonl, files: [a]}, input_length: 8, target_length: 4, batch_size: 4}, "
    "training: {max_steps: 2, schedule: constant, execution: {kernels: compiled}}}"
)


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a compiler."""
    monkeypatch.setattr("lit_llm.runs.kernels._no_compiler", lambda gpu: "")


def compiled(preset: str, *overrides: str) -> Experiment:
    kernels = "pretrain.training.execution.kernels=compiled"
    return load_experiment(preset, [kernels, "model.vocabulary=1060", *overrides])


@pytest.mark.parametrize(
    ("preset", "objective", "vary"),
    [
        ("decllm-tiny", "causal_lm", False),
        ("decllm-tiny", "{kind: prefix_lm, split: half}", False),
        ("redllm-tiny", "{kind: prefix_lm, split: random}", True),
        ("redllm-tiny", "span_corruption", False),
        ("ul2-tiny", "", True),
        ("modernbert-tiny", "", False),
    ],
)
def test_lengths_vary_where_an_objective_draws_them(preset: str, objective: str, vary: bool) -> None:
    experiment = compiled(preset, *[f"pretrain.objective={objective}"] * bool(objective))
    assert lengths_vary(experiment, "pretrain") is vary


def test_retention_is_compiled_in_pretraining_and_not_in_finetuning() -> None:
    """Windows have one length, examples have any."""
    experiment = compiled("yoco-tiny", "model.self_decoder.retention={}", FINETUNE)
    assert kernels_of(experiment, "pretrain") == ("compiled", "")
    kernels, obstacle = kernels_of(experiment, "finetune")
    assert kernels == "auto"
    assert "retention" in obstacle
    plain = compiled("decllm-tiny", FINETUNE)
    assert [kernels_of(plain, stage).name for stage in plain.trained] == ["compiled"] * 2


def test_only_what_was_asked_for_can_have_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llm.runs.kernels._no_compiler", lambda gpu: "no compiler")
    for kernels in ("auto", "reference"):
        experiment = load_experiment("decllm-tiny", [f"pretrain.training.execution.kernels={kernels}"])
        assert kernels_of(experiment, "pretrain") == (kernels, "")
    assert kernels_of(compiled("decllm-tiny"), "pretrain") == ("auto", "no compiler")


def test_results_of_compiled_blocks_are_stale_for_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = provenance(load_experiment("decllm-tiny"))
    assert not same_provenance(provenance(compiled("decllm-tiny")), eager)
    monkeypatch.setattr("lit_llm.runs.kernels._no_compiler", lambda gpu: "no compiler")
    assert same_provenance(provenance(compiled("decllm-tiny")), eager)
