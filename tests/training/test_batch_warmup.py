"""Batch warm-up: batches of growing sizes over the same text, in the same order, counted truly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_llm.config.problems import InputError
from lit_llm.data.prepare import open_prepared, prepare
from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import digest_of_data
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_data import pretraining_data
from lit_llm.runs.time_estimate import seconds_of
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.training.config import BatchWarmup, ExecutionConfig, TrainingConfig
from tests.stages_in_parts import numbers, prepared_stage, stops_after, tiny_experiment

GROWING = "pretrain.training.batch_warmup={begin: 1, increment: 1, steps: 7}"
SIZES = [1, 1, 1, 2, 2, 3, 3, *[4] * 7]
"""Batches of the 14 steps: 7 steps in three thirds, then the whole batches of 4."""


@pytest.mark.parametrize(
    ("warmup", "batch_size", "sizes"),
    [
        (BatchWarmup(begin=1, increment=1, steps=7), 4, SIZES),
        (BatchWarmup(begin=2, increment=6, steps=3), 8, [2, 2, 2, 8, 8]),
        (BatchWarmup(begin=8, increment=8, steps=6), 32, [8, 8, 16, 16, 24, 24, 32]),
    ],
)
def test_each_size_lasts_for_equally_many_steps(warmup: BatchWarmup, batch_size: int, sizes: list[int]) -> None:
    before = [warmup.sequences(steps, batch_size) for steps in range(len(sizes) + 1)]
    assert before == [sum(sizes[:steps]) for steps in range(len(sizes) + 1)]


def growing_and_equal(corpus: Path) -> tuple[Experiment, Experiment]:
    return tiny_experiment(corpus, "decllm-tiny", GROWING), tiny_experiment(corpus, "decllm-tiny")


def test_the_text_and_its_order_are_those_of_equal_batches(tmp_path: Path, corpus: Path) -> None:
    """On any number of devices: their shares of a batch are its rows, and copies without a target."""
    read = []
    for experiment in growing_and_equal(corpus):
        data = experiment.pretrain.data
        prepare(data, tmp_path)
        batches = pretraining_data(experiment, open_prepared(data, tmp_path, digest_of_data(experiment))).batches
        read.append(torch.cat([batches[k].targets for k in range(14)]))
        if experiment.pretrain.training.batch_warmup:
            assert [len(batches[k]) for k in range(14)] == SIZES
            whole, batches.ranks = batches[1], 2
            shares = []
            for rank in range(2):
                batches.rank = rank
                shares.append(batches[1])
            assert sum(int((share.weights > 0).sum()) for share in shares) == int((whole.weights > 0).sum())
    assert torch.equal(read[0], read[1][: sum(SIZES)])


def test_a_run_counts_the_tokens_that_it_reads_and_resumes_in_the_middle(tmp_path: Path, corpus: Path) -> None:
    """Judge: targets counted in the batches themselves, and the sizes above."""
    torch.set_num_threads(1)
    stages = [prepared_stage(Store(tmp_path / name), corpus, "decllm-tiny", GROWING) for name in ("whole", "parts")]
    assert run_one(tmp_path / "parts", stages[1].fingerprint, stops_after(5)) == "interrupted"
    for name, stage in zip(("whole", "parts"), stages, strict=True):
        assert run_one(tmp_path / name, stage.fingerprint) == "done"
    assert numbers(stages[0]) == numbers(stages[1])
    result, cost = stages[0].result() or {}, cost_of(growing_and_equal(corpus)[0])
    assert result["tokens"] == result["loss_tokens"] == cost.tokens == cost.loss_tokens == 32 * sum(SIZES)
    assert result["flops"] == pytest.approx(cost.train_flops)
    seen = {step: metrics["tokens_seen"] for step, metrics in numbers(stages[0])}
    assert seen == {step: 32 * sum(SIZES[:step]) for step in seen}


def test_plan_counts_smaller_batches(corpus: Path) -> None:
    """14 steps with 40 of 56 sequences take the time and the FLOPs of 10 whole batches."""
    growing, equal = growing_and_equal(corpus)
    assert cost_of(growing).train_flops == pytest.approx(cost_of(equal).train_flops * sum(SIZES) / 56)
    timed = {"pretrain": 1.0}
    assert seconds_of(equal, timed).run - seconds_of(growing, timed).run == pytest.approx(14 - sum(SIZES) / 4)


def test_arms_that_read_less_by_a_warm_up_are_refused_and_may_be_matched(write_study: Callable[..., Path]) -> None:
    arms = "arms: {equal: {}, growing: {pretrain: {training: {max_steps: 600, batch_warmup: %s}}}}\nmatch: {by: %s}\n"
    warmup, steps = "{begin: 1, increment: 1, steps: 300}", ["pretrain.training.max_steps=600"]
    base = write_study("unequal", arms % (warmup, "none"), allow_budgets=False)
    keys = {finding.key for finding in plan(load_study(base, steps), built=False).refused}
    assert keys == {"budget.tokens", *(f"pretrain.training.batch_warmup.{key}" for key in BatchWarmup.model_fields)}
    found = load_study(write_study("equal", arms % (warmup, "tokens")), steps).arms[1]
    assert abs(found.residual) < 0.01
    training = found.experiment.pretrain.training
    assert training.batch_warmup is not None
    assert training.batch_warmup.steps == round(300 * training.max_steps / 600)


def test_a_training_without_a_warm_up_of_batches_has_no_further_key() -> None:
    assert "batch_warmup" not in TrainingConfig(max_steps=5).model_dump(mode="json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("begin: 4, increment: 1, steps: 5", "begin: 4 does not grow to batch_size 4"),
        ("begin: 1, increment: 2, steps: 5", "increment: batch_size 4 is not 1 and a multiple of 2"),
        ("begin: 1, increment: 1, steps: 2", "steps: 2 are too few for 3 sizes"),
        ("begin: 1, increment: 1, steps: 15", "steps: 15 last beyond the end at step 14"),
    ],
)
def test_batches_that_cannot_grow_are_refused(corpus: Path, keys: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        tiny_experiment(corpus, "decllm-tiny", f"pretrain.training.batch_warmup={{{keys}}}")
    assert f"pretrain.training.batch_warmup.{message}" in str(refused.value)


def test_devices_and_compiled_kernels_need_parts_of_equal_sizes() -> None:
    warmup = BatchWarmup(begin=4, increment=4, steps=10)
    assert (warmup.problem(16, ExecutionConfig(devices=8)) or ("",))[0] == "begin"
    compiled = ExecutionConfig(kernels="compiled")
    assert (warmup.problem(16, compiled) or ("",))[0] == "increment"
    assert warmup.problem(16, compiled.model_copy(update={"micro_batch_size": 2, "devices": 2})) is None


def test_finetunings_and_pruning_by_tokens_take_no_growing_batches(
    write_two: Callable[..., Path], write_sweep: Callable[..., Path]
) -> None:
    with pytest.raises(
        InputError, match=r"finetune\.training\.batch_warmup: only batches and rows of a pretraining grow"
    ):
        load_study(write_two("tuned"), ["finetune.training.batch_warmup={begin: 1, increment: 1, steps: 3}"])
    rest = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-2]}}\n"
    rest += "optimize: [{metric: val/target_nll, direction: minimize}]\npruner: {kind: median, by: tokens}"
    with pytest.raises(InputError, match=r"pruner\.by: .* its batches grow, so equal steps are no equal tokens"):
        load_sweep(write_sweep("rates", rest), ["pretrain.training.batch_warmup={begin: 1, increment: 1, steps: 7}"])
    searched = (
        "space: {pretrain.training.batch_warmup.steps: {choice: [3, 6], when: {pretrain.training.optimizer.lr: 1}}}\n"
    )
    with pytest.raises(InputError, match="with batches that grow, equal steps are no equal tokens"):
        load_sweep(write_sweep("steps", rest.replace(rest.split("\n")[0] + "\n", searched)))
