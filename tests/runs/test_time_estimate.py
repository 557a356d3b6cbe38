"""Seconds by hand, on made-up machines that charge for one thing each."""

from __future__ import annotations

from typing import Any

import pytest
from made_up_ceilings import NOTHING, USUAL, only

from lit_llm.components.loss import config as loss_config
from lit_llm.experiment.load import load_experiment
from lit_llm.runs import time_estimate
from lit_llm.runs.machine_benchmark import Ceilings, interpolated
from lit_llm.runs.time_estimate import (
    BY_DIRECTION,
    LOOKING,
    START_SECONDS,
    TRAINER_LAYERS,
    PaddedBatch,
    makespan,
    seconds_of,
)

D, FF, V, T, B = 16, 32, 300, 32, 6
LAYERS = 4
SMALL = [
    f"model.d_model={D}", f"model.vocabulary={V}", "model.attention.heads=2", f"model.feed_forward.d_ff={FF}",
    "pretrain.data.tokenizer=bytes", f"pretrain.data.sequence_length={T}", f"pretrain.data.batch_size={B}",
    "pretrain.training.max_steps=10", "pretrain.training.schedule.warmup_steps=2",
    "pretrain.training.stability.logit_every=0", "model.norm.scale=false",
]  # fmt: skip


def step(preset: str, ceilings: Ceilings, *overrides: str) -> float:
    return seconds_of(load_experiment(preset, [*SMALL, *overrides]), ceilings).step


MATRICES = 4 * D * D + 3 * D * FF
"""Entries of Q, K, V, O and of SwiGLU's three matrices."""


def test_products_take_six_flops_per_parameter_and_token_at_the_rate_of_their_width() -> None:
    assert step("decllm-tiny", only(layer={D: 1e6})) == pytest.approx(6 * MATRICES * LAYERS * B * T / 1e6)


def test_blocks_that_are_computed_again_take_eight_flops() -> None:
    on = "pretrain.training.execution.activation_checkpointing=true"
    assert step("decllm-tiny", only(layer={D: 1e6}), on) == pytest.approx(8 * MATRICES * LAYERS * B * T / 1e6)


def test_half_of_a_window_goes_through_each_side_of_an_encoder_decoder() -> None:
    # Cross-attention: Q and O of the target, K and V of the source, both T / 2 long.
    each_side = 2 * MATRICES * B * T / 2
    cross = 2 * 4 * D * D * B * T / 2
    assert step("redllm-tiny", only(layer={D: 1e6})) == pytest.approx(6 * (2 * each_side + cross) / 1e6)


def test_rows_of_a_mixture_are_padded_to_the_longest() -> None:
    """Two prefix LMs, of a quarter and of three: each side of each row takes three quarters, and the logits a half."""
    mix = "[{mode: s, corruption: 0.25}, {mode: s, corruption: 0.75}]"
    objective = f"pretrain.objective={{kind: ul2, mode_tokens: false, mix: {mix}}}"
    each_side = 2 * MATRICES * B * 3 * T / 4
    cross = 2 * 4 * D * D * B * 3 * T / 4
    found = step("redllm-tiny", only(layer={D: 1e6}), objective)
    assert found == pytest.approx(6 * (2 * each_side + cross) / 1e6)
    assert step("redllm-tiny", only(logits={1: 1e6}), objective) == pytest.approx(B * T / 2 * V / 1e6)


PALM = ["model.decoder.partial_attention=palm", "pretrain.objective=prefix_lm"]


def test_partial_attention_reads_half_of_a_window_and_the_start_before_it() -> None:
    # Q and O of every token; K, V, A1 and A2 of the source. Each query sees each source token.
    source = T // 2 + 1
    products = MATRICES * T + 2 * D * D * T + 4 * D * D * source
    assert step("decllm-tiny", only(layer={D: 1e6}), *PALM) - step(
        "decllm-tiny", only(layer={D: 1e6}), PALM[1]
    ) == pytest.approx(6 * (products - MATRICES * T) * LAYERS * B / 1e6)
    scores = {1: {D // 2: 1e6}}
    assert step("decllm-tiny", only(scores=scores), *PALM) - step(
        "decllm-tiny", only(scores=scores), PALM[1]
    ) == pytest.approx(12 * D * T * source * LAYERS * B / 1e6)


def test_a_layers_partial_attention_is_called_like_cross_attention() -> None:
    one = ["model.decoder.layer_ranges.1.partial_attention=palm", PALM[1]]
    assert step("decllm-tiny", only(cross_seconds=1e-3), *PALM) == pytest.approx(LAYERS * 1e-3)
    assert step("decllm-tiny", only(cross_seconds=1e-3), *one) == pytest.approx(1e-3)


def test_causal_attention_takes_twelve_flops_per_entry_and_visible_pair() -> None:
    pairs = T * (T + 1) / 2  # QKᵀ and the sum over values, a multiply-add as 2, forward and twice that backward
    assert step("decllm-tiny", only(scores={1: {D // 2: 1e6}})) == pytest.approx(12 * D * pairs * LAYERS * B / 1e6)


def test_attention_goes_at_the_rate_of_its_keys() -> None:
    both = {T // 2: {D // 2: 1e6}, T: {D // 2: 2e6}}
    one, two = ({1: {D // 2: rate}} for rate in (1e6, 2e6))
    assert step("decllm-tiny", only(scores=both)) == pytest.approx(step("decllm-tiny", only(scores=two)))
    assert step("redllm-tiny", only(scores=both)) == pytest.approx(step("redllm-tiny", only(scores=one)))


def test_an_encoder_sees_all_pairs_and_cross_attention_source_by_target() -> None:
    half = T // 2
    pairs = 2 * half * half + 2 * half * (half + 1) / 2 + 2 * half * half
    assert step("redllm-tiny", only(scores={1: {D // 2: 1e6}})) == pytest.approx(12 * D * pairs * B / 1e6)


def test_the_loss_takes_time_for_each_logit_and_its_product_for_each_width() -> None:
    assert step("decllm-tiny", only(logits={1: 1e6})) == pytest.approx(B * T * V / 1e6)
    assert step("decllm-tiny", only(logit_width=1e-6)) == pytest.approx(B * T * V * D * 1e-6)
    assert step("redllm-tiny", only(logits={1: 1e6})) == pytest.approx(B * T / 2 * V / 1e6)


def test_a_loss_in_chunks_is_computed_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step("decllm-tiny", only(logit_width=1e-6))
    monkeypatch.setattr(loss_config, "CHUNK_ENTRIES", V * (B * T - 1))
    assert step("decllm-tiny", only(logit_width=1e-6)) == pytest.approx(whole * 4 / 3)
    one_by_one = "pretrain.training.execution.micro_batch_size=1"
    assert step("decllm-tiny", only(logit_width=1e-6), one_by_one) == pytest.approx(whole)


@pytest.mark.parametrize(("micro", "passes"), [(6, 1), (4, 2), (1, 6)])
def test_operator_calls_are_paid_for_each_layer_and_micro_batch(micro: int, passes: int) -> None:
    cut = f"pretrain.training.execution.micro_batch_size={micro}"
    layers = passes * LAYERS + TRAINER_LAYERS
    assert step("decllm-tiny", only(layer_seconds=1e-3), cut) == pytest.approx(layers * 1e-3)
    assert step("redllm-tiny", only(cross_seconds=1e-3), cut) == pytest.approx(passes * 2 * 1e-3)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adafactor_factored"])
def test_an_optimiser_is_paid_for_each_tensor_and_parameter(kind: str) -> None:
    # Seven matrices a layer and the tied embedding.
    update: dict[str, Any] = {**NOTHING.update, kind: (1e-3, 1e-6)}
    found = step("decllm-tiny", only(update=update), f"pretrain.training.optimizer={{kind: {kind}}}")
    assert found == pytest.approx((7 * LAYERS + 1) * 1e-3 + (MATRICES * LAYERS + V * D) * 1e-6)


def test_muon_pays_for_the_narrow_side_of_the_matrices_and_adamw_for_the_embedding() -> None:
    muon, adamw = ({**NOTHING.update, kind: (0.0, 1e-3)} for kind in ("muon", "adamw"))
    wanted = "pretrain.training.optimizer={kind: muon}"
    # All matrices here have D as their narrow side; it was measured at MUON_WIDTH.
    entries = MATRICES * LAYERS
    assert step("decllm-tiny", only(update=muon), wanted) == pytest.approx(
        entries * D / time_estimate.MUON_WIDTH * 1e-3
    )
    assert step("decllm-tiny", only(update=adamw), wanted) == pytest.approx(V * D * 1e-3)


def test_a_run_is_its_start_its_steps_and_a_third_of_a_pass_for_each_validated_window() -> None:
    machine = only(layer={D: 1e6})
    overrides = [*SMALL, "pretrain.validation.times=3", "pretrain.validation.sequences=12"]
    red = seconds_of(load_experiment("redllm-tiny", overrides), machine)
    assert red.validation == pytest.approx(
        12 * red.step / B / 3
    )  # forward only; the objective's cut is the yardstick's
    # One before the first step and two of three at intervals; the last one reads eight times as many of both splits.
    assert red.final == pytest.approx(2 * 8 * 12 * red.step / B / 3)
    assert red.run == pytest.approx(START_SECONDS + 10 * red.step + 3 * red.validation + red.final)
    dec = seconds_of(load_experiment("decllm-tiny", overrides), machine)
    assert dec.validation == pytest.approx(2 * 12 * dec.step / B / 3)  # once for the yardstick, once for its own loss
    assert dec.final == pytest.approx(2 * (8 * 12 + 12) * dec.step / B / 3)
    half = load_experiment("decllm-tiny", [*overrides, "pretrain.data.test_fraction=0.025"])
    small = seconds_of(half, machine, held_out={"": 90 * T})
    assert small.final == pytest.approx((90 + 12 + 45 + 12) * dec.step / B / 3), "half as much text for the test"


def test_looking_at_logits_every_other_step_is_half_a_forward_pass_over_its_sequences() -> None:
    machine = only(layer={D: 1e6})
    look = ["pretrain.training.stability.logit_every=2", "pretrain.training.stability.logit_sequences=3"]
    without = step("decllm-tiny", machine)
    assert step("decllm-tiny", machine, *look) == pytest.approx(without * (1 + 3 / B / 3 / 2))


def test_the_largest_preset_has_a_finite_time_too() -> None:
    """8.6e9 parameters, 1.7e12 tokens, 5.5e22 FLOPs at 8e10 FLOP/s: ten thousands of years."""
    years = seconds_of(load_experiment("redllm-8b"), USUAL).run / (365.25 * 86400)
    assert 4.47e22 / 8e10 / (365.25 * 86400) < years < 1e5


def test_rates_between_two_sizes_lie_on_a_straight_line_of_logarithms() -> None:
    rates = {4: 1.0, 64: 16.0, 128: 20.0}
    assert interpolated(rates, 16) == pytest.approx(4.0)
    assert interpolated(rates, 64) == pytest.approx(16.0)
    assert interpolated(rates, 2) == pytest.approx(0.5)
    assert interpolated(rates, 4096) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("seconds", "slots", "end"),
    [([3, 3, 3], 1, 9), ([3, 3, 3], 2, 6), ([1, 1, 5], 2, 6), ([5, 1, 1], 2, 5), ([], 2, 0), ([2], 8, 2)],
)
def test_runs_start_in_order_as_soon_as_a_slot_is_free(seconds: list[float], slots: int, end: float) -> None:
    assert makespan(seconds, slots) == end


ONE_PASS = 2 * MATRICES * LAYERS / 1e6
"""Seconds of a token's forward pass where a FLOP of the products takes a microsecond."""


def evaluated(section: str, preset: str = "decllm-tiny", stage: str = "pretrain", **options: Any) -> float:
    experiment = load_experiment(preset, [*SMALL, *options.pop("more", ()), f"evaluate={{{section}}}"])
    found = seconds_of(experiment, only(layer={D: 1e6}), **options).evaluations
    return found[f"{section.partition(':')[0]} after {stage}"] - START_SECONDS


@pytest.mark.parametrize(
    ("section", "tokens"),
    [
        ("likelihood: {documents: 10, length: 24, prefix_length: 8}", 10 * 24),
        ("extrapolation: {lengths: [1, 3], prefixes: [1, half], sequences: 5}", 5 * 2 * 3 * T),
        # Two readings and a look at each window; of one, two readings, and derivatives at the steps 1, 2, 4, 8, 16.
        ("attention: {sequences: 4, sensitivity_sequences: 0}", 4 * (2 + LOOKING["decoder"]) * T),
        (
            "attention: {sequences: 4, sensitivity_sequences: 1, draws: 10}",
            (4 * (2 + LOOKING["decoder"]) + 2 + 5 * (1 + 10 * BY_DIRECTION["decoder"])) * T,
        ),
    ],
)
def test_an_evaluation_is_a_forward_pass_over_what_it_reads(section: str, tokens: int) -> None:
    assert evaluated(section) == pytest.approx(tokens * ONE_PASS)


def test_no_more_is_scored_than_is_held_out() -> None:
    documents, beyond = "likelihood: {documents: 1000}", "extrapolation: {lengths: [2], prefixes: [half], sequences: 9}"
    assert evaluated(documents, held_out={"": 500}) == pytest.approx(500 * ONE_PASS)
    assert evaluated(beyond, held_out={"": 4 * 2 * T + 5}) == pytest.approx(4 * 2 * T * ONE_PASS)
    assert evaluated(beyond, held_out={"": 10**9}) == pytest.approx(9 * 2 * T * ONE_PASS)


TUNED = """finetune={data: {examples: {kind: jsonl, files: [x]}, input_length: 12, target_length: 4, batch_size: 2},
training: {max_steps: 4, schedule: constant}}"""


def test_examples_are_as_long_as_in_a_batch_where_that_is_known() -> None:
    section = "examples: {examples: 7}"
    assert evaluated(section, more=[TUNED]) == pytest.approx(7 * 16 * ONE_PASS)
    assert evaluated(section, stage="finetune", more=[TUNED], padded=PaddedBatch(2, 6.0, 3.0)) == pytest.approx(
        7 * 9 * ONE_PASS
    )


def test_rows_that_examples_share_are_paid_for_once() -> None:
    """Of batches of two examples with 6 and 3 tokens each, three in four are one row."""
    none, shared = (
        seconds_of(load_experiment("decllm-tiny", [*SMALL, TUNED]), only(layer={D: 1e6}), PaddedBatch(rows, 6.0, 3.0))
        for rows in (2, 1.25)
    )
    assert none.finetune - shared.finetune == pytest.approx(4 * 0.75 * 9 * 3 * ONE_PASS)


def test_a_batch_of_an_evaluation_calls_each_layer_once() -> None:
    section = "evaluate={batch_tokens: 100, likelihood: {documents: 10, length: 25}}"
    found = seconds_of(load_experiment("decllm-tiny", [*SMALL, section]), only(layer_seconds=3e-3)).evaluations
    assert found["likelihood after pretrain"] - START_SECONDS == pytest.approx(3 * LAYERS * 1e-3)  # 4 + 4 + 2 documents


def test_a_whole_run_is_its_training_and_its_evaluations_but_for_the_tasks() -> None:
    sections = "evaluate={tasks: {names: [boolq]}, likelihood: {documents: 10}, extrapolation: {sequences: 2}}"
    found = seconds_of(load_experiment("decllm-tiny", [*SMALL, sections]), USUAL)
    assert found.evaluations.keys() == {"likelihood after pretrain", "extrapolation after pretrain"}
    assert found.total == pytest.approx(found.run + sum(found.evaluations.values()))
