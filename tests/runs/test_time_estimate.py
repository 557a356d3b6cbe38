"""Seconds of a run, by hand, from those of one step."""

from __future__ import annotations

from typing import Any

import pytest

from lit_llm.experiment.load import load_experiment
from lit_llm.runs.time_estimate import ATTENTION_PASSES, BY_DIRECTION, START_SECONDS, PaddedBatch, makespan, seconds_of

T, B, STEP = 32, 6, 6.0
SMALL = [
    "model.d_model=16", "model.vocabulary=300", "model.attention.heads=2", "model.feed_forward.d_ff=32",
    "pretrain.data.tokenizer=bytes", f"pretrain.data.sequence_length={T}", f"pretrain.data.batch_size={B}",
    "pretrain.training.max_steps=10", "pretrain.training.schedule.warmup_steps=2",
]  # fmt: skip
WINDOW = STEP / B / 3
"""Seconds of a forward pass over one window."""
TOKEN = WINDOW / T


def test_a_run_is_its_start_its_steps_and_a_third_of_a_pass_for_each_validated_window() -> None:
    overrides = [*SMALL, "pretrain.validation.times=3", "pretrain.validation.sequences=12"]
    red = seconds_of(load_experiment("redllm-tiny", overrides), {"pretrain": STEP})
    assert red.validation == pytest.approx(12 * WINDOW)  # the objective's cut is the primary metric's
    # One before the first step and two of three at intervals; the last one reads eight times as many of both splits.
    assert red.final == pytest.approx(2 * 8 * 12 * WINDOW)
    assert red.run == pytest.approx(START_SECONDS + 10 * STEP + 3 * red.validation + red.final)
    dec = seconds_of(load_experiment("decllm-tiny", overrides), {"pretrain": STEP})
    assert dec.validation == pytest.approx(2 * 12 * WINDOW)  # once for the primary metric, once for its own loss
    assert dec.final == pytest.approx(2 * (8 * 12 + 12) * WINDOW)
    half = load_experiment("decllm-tiny", [*overrides, "pretrain.data.test_fraction=0.025"])
    small = seconds_of(half, {"pretrain": STEP}, held_out={"": 90 * T})
    assert small.final == pytest.approx((90 + 12 + 45 + 12) * WINDOW), "half as much text for the test"


@pytest.mark.parametrize(
    ("seconds", "max_parallel", "end"),
    [([3, 3, 3], 1, 9), ([3, 3, 3], 2, 6), ([1, 1, 5], 2, 6), ([5, 1, 1], 2, 5), ([], 2, 0), ([2], 8, 2)],
)
def test_runs_start_in_order_as_soon_as_a_slot_is_free(seconds: list[float], max_parallel: int, end: float) -> None:
    assert makespan(seconds, max_parallel) == end


def evaluated(section: str, stage: str = "pretrain", **options: Any) -> float:
    experiment = load_experiment("decllm-tiny", [*SMALL, *options.pop("more", ()), f"evaluate={{{section}}}"])
    found = seconds_of(experiment, {"pretrain": STEP, "finetune": STEP}, **options).evaluations
    return found[f"{section.partition(':')[0]} after {stage}"] - START_SECONDS


@pytest.mark.parametrize(
    ("section", "tokens"),
    [
        ("likelihood: {documents: 10, length: 24, prefix_length: 8}", 10 * 24),
        ("extrapolation: {lengths: [1, 3], prefixes: [1, half], sequences: 5}", 5 * 2 * 3 * T),
        # Two readings and a look at each window; of one, two readings, and derivatives at the steps 1, 2, 4, 8, 16.
        ("attention: {sequences: 4, sensitivity_sequences: 0}", 4 * (2 + ATTENTION_PASSES["decoder"]) * T),
        (
            "attention: {sequences: 4, sensitivity_sequences: 1, draws: 10}",
            (4 * (2 + ATTENTION_PASSES["decoder"]) + 2 + 5 * (1 + 10 * BY_DIRECTION["decoder"])) * T,
        ),
    ],
)
def test_an_evaluation_is_a_forward_pass_over_what_it_reads(section: str, tokens: int) -> None:
    assert evaluated(section) == pytest.approx(tokens * TOKEN)


def test_no_more_is_scored_than_is_held_out() -> None:
    documents, beyond = "likelihood: {documents: 1000}", "extrapolation: {lengths: [2], prefixes: [half], sequences: 9}"
    assert evaluated(documents, held_out={"": 500}) == pytest.approx(500 * TOKEN)
    assert evaluated(beyond, held_out={"": 4 * 2 * T + 5}) == pytest.approx(4 * 2 * T * TOKEN)
    assert evaluated(beyond, held_out={"": 10**9}) == pytest.approx(9 * 2 * T * TOKEN)


TUNED = """finetune={data: {examples: {kind: jsonl, files: [x]}, input_length: 12, target_length: 4, batch_size: 2},
training: {max_steps: 4, schedule: constant}}"""


def test_examples_are_as_long_as_in_a_batch_where_that_is_known() -> None:
    section = "examples: {examples: 7}"
    assert evaluated(section, more=[TUNED]) == pytest.approx(7 * 16 * TOKEN)
    padded = PaddedBatch(2, 6.0, 3.0)
    assert evaluated(section, stage="finetune", more=[TUNED], padded=padded) == pytest.approx(7 * 9 * TOKEN)


def test_a_finetuning_takes_less_where_rows_are_shorter_and_where_examples_share_them() -> None:
    """TimedStep with two rows of 12 and 4 tokens; of batches of 6 and 3 tokens, three in four are one row."""
    experiment, steps = load_experiment("decllm-tiny", [*SMALL, TUNED]), {"pretrain": STEP, "finetune": 4.0}
    tuned = experiment.finetune
    assert tuned is not None
    read = min(tuned.validation.times, 4) * tuned.validation.examples
    read += (1 + tuned.data.has_test) * tuned.validation.most_examples
    batches = {None: 1.0, PaddedBatch(2, 6.0, 3.0): 9 / 16, PaddedBatch(1.25, 6.0, 3.0): 1.25 * 9 / 32}
    for padded, share in batches.items():
        step = 4.0 * share
        found = seconds_of(experiment, steps, padded).finetune
        assert found == pytest.approx(START_SECONDS + 4 * step + read * step / 2 / 3)


def test_a_teachers_forward_pass_is_paid_for_by_its_flops() -> None:
    """A teacher like the model itself: a third more."""
    source = "{extends: decllm-tiny, pretrain: {training: {max_steps: 5, schedule: constant}}}"
    adapted = load_experiment("decllm-tiny", [f"adapt={{from: {source}, distill: {{}}}}"])
    assert seconds_of(adapted, {"pretrain": STEP}).step == pytest.approx(STEP * 4 / 3)


def test_a_whole_run_is_its_training_and_its_evaluations_but_for_the_tasks() -> None:
    sections = "evaluate={tasks: {names: [boolq]}, likelihood: {documents: 10}, extrapolation: {sequences: 2}}"
    found = seconds_of(load_experiment("decllm-tiny", [*SMALL, sections]), {"pretrain": STEP})
    assert found.evaluations.keys() == {"likelihood after pretrain", "extrapolation after pretrain"}
    assert found.total == pytest.approx(found.run + sum(found.evaluations.values()))
