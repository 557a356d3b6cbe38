"""Matching: the arm ends equal to its baseline in the quantity asked for, and says what it moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import Plan, plan

TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}\nmatch: {by: %s}"


def planned(write: Callable[..., Path], by: str, rest: str = "", steps: str = "max_steps: 600") -> Plan:
    path = write("matching", TWO % by + rest)
    text = path.read_text().replace("max_steps: 12", steps).replace("heads: 2}", "heads: 2, head_dim: 8}")
    path.write_text(text.replace("d_model: 16", "d_model: 64").replace("d_ff: 32", "d_ff: 256"))
    return plan(load_study(path))


@pytest.mark.parametrize("by", ["tokens", "loss_tokens", "train_flops"])
def test_the_length_of_training_is_moved_until_the_quantity_agrees(write_study: Callable[..., Path], by: str) -> None:
    """Judge: the plan's own figures of both arms, and the warm-up's share of the steps."""
    found = planned(write_study, by)
    red, dec = found.arms
    quantity = {"tokens": "tokens", "loss_tokens": "loss_tokens", "train_flops": "train_flops"}[by]
    assert getattr(dec.cost, quantity) == pytest.approx(getattr(red.cost, quantity), rel=0.01)
    training = dec.arm.experiment.pretrain.training
    assert training.schedule.warmup_steps == round(2 * training.max_steps / 600)
    if by == "loss_tokens":  # a causal LM counts every token, a prefix LM half of them
        assert dec.arm.matched_keys["pretrain.training.max_steps"] == [600, 300]
    assert not found.refused
    assert any(finding.key == "match.by" for finding in found.findings)


def test_the_feed_forward_is_moved_in_steps_of_eight_until_the_parameters_agree(
    write_study: Callable[..., Path],
) -> None:
    found = planned(write_study, "parameters")
    red, dec = found.arms
    assert dec.arm.experiment.model.feed_forward.d_ff % 8 == 0
    assert dec.cost.parameters == pytest.approx(red.cost.parameters, rel=0.01)
    assert list(dec.arm.matched_keys) == ["model.feed_forward.d_ff"]
    assert not found.refused


def test_a_residual_above_one_percent_is_refused(write_study: Callable[..., Path]) -> None:
    """Three steps cannot be halved: one and a half."""
    found = planned(write_study, "loss_tokens", steps="max_steps: 3")
    assert [finding.key for finding in found.refused] == ["match.by"]
    with pytest.raises(InputError, match="after matching"):
        found.check()


def test_matching_by_what_a_factor_sets_is_refused(write_study: Callable[..., Path]) -> None:
    grid = "\ngrid: {factors: {pretrain.training.max_steps: [600, 900]}}"
    with pytest.raises(InputError, match=r"moves pretrain.training.max_steps, which is a factor"):
        planned(write_study, "tokens", grid)


def test_matching_by_warm_ups_or_averages_that_factors_set_is_refused(write_study: Callable[..., Path]) -> None:
    """They are moved with the steps, so the runs would not have the values of their labels."""
    levels = {
        "schedule.warmup_steps": [2, 50],
        "batch_warmup.steps": [40, 60],
        "sequence_warmup.steps": [40, 80],
        "weight_averaging.every": [10, 20],
    }
    base = "max_steps: 600, batch_warmup: {begin: 1, increment: 1, steps: 40}, sequence_warmup: {begin: 8, steps: 40}"
    base += ", weight_averaging: {kind: last_k, k: 2, every: 10}"
    moved = {f"pretrain.training.{key}" for key in levels}
    assert planned(write_study, "loss_tokens", steps=base).arms[1].arm.matched_keys.keys() >= moved
    factors = ", ".join(f"pretrain.training.{key}: {values}" for key, values in levels.items())
    with pytest.raises(InputError) as refused:
        planned(write_study, "loss_tokens", f"\ngrid: {{factors: {{{factors}}}}}", base)
    (problem,) = refused.value.problems
    named = problem.message.removeprefix("loss_tokens moves ").removesuffix(", which are factors of the study too")
    assert {*named.split(" and ")} == moved
