"""Sequence warm-up: the same text in the same order, in rows that grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_llm.config.problems import InputError
from lit_llm.data.batches import Batches
from lit_llm.data.prepare import open_prepared, prepare
from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.schema import Experiment
from lit_llm.models.cost import Shape, train_flops
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.fingerprints import digest_of_data
from lit_llm.runs.kernels import lengths_vary
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_data import pretraining_data
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.training.config import SequenceWarmup, TrainingConfig
from tests.stages_in_parts import numbers, prepared_stage, stops_after, tiny_experiment

GROWING = "pretrain.training.sequence_warmup={begin: 8, steps: 5}"
LENGTHS = [8, 8, 8, 16, 16, *[32] * 9]
"""Tokens of the rows in the 14 steps: 5 steps in two halves, then the whole windows of 32."""
BOTH = (GROWING, "pretrain.training.batch_warmup={begin: 1, increment: 1, steps: 7}")
SIZES = [1, 1, 1, 2, 2, 3, 3, *[4] * 7]
"""Windows of the batches with both warm-ups."""


def batches_of(folder: Path, experiment: Experiment) -> Batches:
    data = experiment.pretrain.data
    prepare(data, folder)
    return pretraining_data(experiment, open_prepared(data, folder, digest_of_data(experiment))).batches


def test_the_text_and_its_order_are_those_of_whole_rows(tmp_path: Path, corpus: Path) -> None:
    """Every token is a target once, whatever the rows."""
    whole = batches_of(tmp_path, tiny_experiment(corpus, "decllm-tiny"))
    cut = batches_of(tmp_path, tiny_experiment(corpus, "decllm-tiny", GROWING))
    assert [tuple(cut[k].targets.shape) for k in range(14)] == [(4 * 32 // length, length) for length in LENGTHS]
    assert all(torch.equal(cut[k].targets.flatten(), whole[k].targets.flatten()) for k in range(14))
    both = batches_of(tmp_path, tiny_experiment(corpus, "decllm-tiny", *BOTH))
    read = torch.cat([both[k].targets.flatten() for k in range(14)])
    assert torch.equal(read, torch.cat([whole[k].targets.flatten() for k in range(14)])[: len(read)])
    assert len(read) == 32 * sum(SIZES)


def test_random_cuts_of_whole_rows_are_paired_and_those_of_shorter_ones_differ(tmp_path: Path, corpus: Path) -> None:
    keys = ["pretrain.objective={kind: prefix_lm, split: random}", "pretrain.data.batch_size=8"]
    whole = batches_of(tmp_path, tiny_experiment(corpus, "decllm-tiny", *keys))
    cut = batches_of(tmp_path, tiny_experiment(corpus, "decllm-tiny", *keys, GROWING))
    assert all(torch.equal(cut[k].weights, whole[k].weights) for k in range(5, 14))
    assert len({tuple(row.tolist()) for k in range(3) for row in cut[k].weights}) > 4


def test_a_run_counts_its_flops_and_resumes_in_the_middle(tmp_path: Path, corpus: Path) -> None:
    """Judge: the FLOPs of each row by its length, added up over the steps."""
    torch.set_num_threads(1)
    stages = [prepared_stage(Store(tmp_path / name), corpus, "decllm-tiny", *BOTH) for name in ("whole", "parts")]
    assert run_one(tmp_path / "parts", stages[1].fingerprint, stops_after(4)) == "interrupted"
    for name, stage in zip(("whole", "parts"), stages, strict=True):
        assert run_one(tmp_path / name, stage.fingerprint) == "done"
    assert numbers(stages[0]) == numbers(stages[1])
    experiment = tiny_experiment(corpus, "decllm-tiny", *BOTH)
    model, cost = resolve_model(experiment.model), cost_of(experiment)
    of_row = {length: train_flops(model, Shape(source=0, target=length, outputs=length)) for length in LENGTHS}
    flops = [size * 32 / length * of_row[length] for size, length in zip(SIZES, LENGTHS, strict=True)]
    assert cost.train_flops == pytest.approx(sum(flops))
    result = stages[0].result() or {}
    assert result["flops"] == pytest.approx(sum(flops))
    assert result["tokens"] == result["loss_tokens"] == cost.loss_tokens == 32 * sum(SIZES)
    for step, metrics in numbers(stages[0]):
        assert metrics["flops"] == pytest.approx(sum(flops[:step]))
        assert metrics["tokens_seen"] == 32 * sum(SIZES[:step])


def test_parts_of_a_batch_have_as_many_tokens_as_with_whole_rows(tmp_path: Path, corpus: Path) -> None:
    batches = batches_of(tmp_path, tiny_experiment(corpus, "decllm-tiny", GROWING))
    for k in (0, 4, 9):
        parts = batches[k].micro_batches(2 * batches[k].rows_of_window)
        assert [part.targets.numel() for part in parts] == [64, 64]


def test_a_training_without_a_warm_up_of_rows_has_no_further_key() -> None:
    assert "sequence_warmup" not in TrainingConfig(max_steps=5).model_dump(mode="json")


def test_rows_of_several_lengths_are_compiled_for_any(corpus: Path) -> None:
    assert lengths_vary(tiny_experiment(corpus, "decllm-tiny", GROWING), "pretrain")
    assert not lengths_vary(tiny_experiment(corpus, "decllm-tiny"), "pretrain")


def test_matched_flops_move_the_warm_up_along(write_study: Callable[..., Path]) -> None:
    arms = "arms: {whole: {}, growing: {pretrain: {training: {sequence_warmup: {begin: 8, steps: 300}}}}}\n"
    file = write_study("matched", f"{arms}match: {{by: train_flops}}\n")
    arm = load_study(file, ["pretrain.training.max_steps=600"]).arms[1]
    training = arm.experiment.pretrain.training
    assert abs(arm.residual) < 0.01
    assert training.sequence_warmup == SequenceWarmup(begin=8, steps=round(300 * training.max_steps / 600))


def test_a_shortened_arm_keeps_a_step_with_whole_rows(write_study: Callable[..., Path]) -> None:
    arms = "{whole: {}, long: {pretrain: {training: {max_steps: 600, sequence_warmup: {begin: 8, steps: 598}}}}}"
    study = load_study(write_study("short", f"arms: {arms}\nmatch: {{by: tokens}}\n"))
    training = study.arms[1].experiment.pretrain.training
    assert (training.max_steps, training.sequence_warmup) == (12, SequenceWarmup(begin=8, steps=11))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["{begin: 10, steps: 5}"], "begin: 10 does not double to sequence_length 32; take one of 16, 8, 4"),
        (["{begin: 32, steps: 5}"], "begin: 32 does not double to sequence_length 32"),
        (["{begin: 64, steps: 5}"], "begin: 64 does not double to sequence_length 32"),
        (["{begin: 4, steps: 2}"], "steps: 2 are too few for 3 lengths"),
        (["{begin: 8, steps: 15}"], "steps: 15 last beyond the end at step 14"),
        (["{begin: 8, steps: 14}"], "steps: 14 leave no step with whole windows before the end"),
        (
            ["{begin: 8, steps: 9}", "pretrain.training.schedule={kind: wsd, decay_steps: 6, branch_at: [8]}"],
            "steps: 9 last beyond the first branch at step 8",
        ),
    ],
)
def test_rows_that_cannot_grow_are_refused(corpus: Path, keys: list[str], message: str) -> None:
    warmup, *others = keys
    with pytest.raises(InputError) as refused:
        tiny_experiment(corpus, "decllm-tiny", *others, f"pretrain.training.sequence_warmup={warmup}")
    assert f"pretrain.training.sequence_warmup.{message}" in str(refused.value)


def test_objectives_that_need_whole_windows_are_refused(corpus: Path) -> None:
    with pytest.raises(InputError, match="cannot make an example of a row of 8 tokens"):
        tiny_experiment(corpus, "redllm-tiny", "pretrain.objective={kind: prefix_lm, split: 16}", GROWING)
    task = "{kind: recall, source_length: 25, questions: 3, keys: 8, values: 8}"
    keys = [f"pretrain.data.corpus={{kind: synthetic, task: {task}}}", "pretrain.objective=answers", GROWING]
    keys.append("pretrain.data.tokenizer={kind: symbols, vocabulary: 19}")
    with pytest.raises(InputError, match="a window of a synthetic task is one example, which would be cut"):
        tiny_experiment(corpus, "decllm-tiny", *keys)


def test_finetunings_have_no_warm_up_of_rows(write_two: Callable[..., Path]) -> None:
    with pytest.raises(
        InputError, match=r"finetune\.training\.sequence_warmup: only batches and rows of a pretraining"
    ):
        load_study(write_two("tuned"), ["finetune.training.sequence_warmup={begin: 1, steps: 3}"])
