"""Where an objective cuts a window, and that its average over cuts is what summing over them gives."""

import numpy as np
import pytest
from pydantic import ValidationError

from lit_llm.experiment.cost import shape_of
from lit_llm.experiment.load import load_experiment
from lit_llm.models.cost import train_flops
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.base import Lengths
from lit_llm.objectives.config import CausalLM, PrefixLM

RNG = np.random.default_rng


def cuts(objective, length, rows, random):
    """Tokens of the source, for so many windows."""
    return [len(objective.example(np.arange(length), random, length).source) for _ in range(rows)]


def test_causal_lm_has_no_source():
    assert cuts(CausalLM(), 16, 3, RNG(0)) == [0, 0, 0]
    assert CausalLM().average(16, lambda of: 7 + of.source) == 7


@pytest.mark.parametrize(("split", "length", "cut"), [("half", 16, 8), ("half", 15, 7), (5, 16, 5), (1, 16, 1)])
def test_prefix_lm_cuts_at_half_or_at_a_number(split, length, cut):
    objective = PrefixLM(split=split)
    assert cuts(objective, length, 3, RNG(0)) == [cut] * 3
    assert objective.average(length, lambda of: 3 * of.source**2 + 1) == 3 * cut**2 + 1


def test_random_cuts_are_uniform_from_one_to_all_but_one():
    """Of 7000 cuts at 7 places each place gets 1000 ± 6 deviations of √(7000 · 1/7 · 6/7)."""
    counts = np.bincount(cuts(PrefixLM(split="random"), 8, 7000, RNG(0)), minlength=8)
    assert counts[0] == 0
    assert len(counts) == 8
    assert np.abs(counts[1:] - 1000).max() < 6 * np.sqrt(7000 * 1 / 7 * 6 / 7)


def test_random_cuts_depend_on_the_generator_alone():
    objective = PrefixLM(split="random")
    assert cuts(objective, 100, 20, RNG(5)) == cuts(objective, 100, 20, RNG(5))
    assert cuts(objective, 100, 20, RNG(5)) != cuts(objective, 100, 20, RNG(6))


@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 129])
@pytest.mark.parametrize("value", [lambda c: 4.0, lambda c: 3 * c - 2, lambda c: 5 * c**2 - 7 * c + 11])
def test_the_average_over_random_cuts_is_the_mean_of_all_of_them(value, length):
    brute = sum(value(cut) for cut in range(1, length)) / (length - 1)
    found = PrefixLM(split="random").average(length, lambda of: value(of.source))
    assert found == pytest.approx(brute, rel=1e-12)


@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("redllm-tiny", []),
        ("decllm-tiny", ["pretrain.objective=prefix_lm"]),
        ("decllm-tiny", ["pretrain.objective=prefix_lm", "pretrain.masks.prefix=bidirectional"]),
    ],
)
def test_flops_are_quadratic_in_the_cut_so_their_average_is_exact(preset, overrides, length):
    """For odd lengths too, where the average asks for a cut between two tokens."""
    overrides = [*overrides, "pretrain.objective.split=random", f"pretrain.data.sequence_length={length}"]
    experiment = load_experiment(preset, overrides)
    model = resolve_model(experiment.model)

    def value(lengths):
        return train_flops(model, shape_of(experiment, lengths))

    brute = sum(value(Lengths(cut, length - cut)) for cut in range(1, length)) / (length - 1)
    assert experiment.pretrain.objective.average(length, value) == pytest.approx(brute, rel=1e-12)


@pytest.mark.parametrize("split", [16, 20, 0, -1])
def test_a_prefix_that_leaves_no_target_or_no_source_is_a_problem(split):
    assert "a sequence of 16" in PrefixLM(split=split).problem(16)


@pytest.mark.parametrize("split", ["half", "random", 1, 15])
def test_other_prefixes_are_none(split):
    assert PrefixLM(split=split).problem(16) == ""


def test_a_window_of_one_token_cannot_be_cut():
    assert PrefixLM(split="half").problem(1)
    assert PrefixLM(split="random").problem(1)
    assert CausalLM().problem(1) == ""


@pytest.mark.parametrize("split", ["third", 0.5, True])
def test_a_split_is_half_random_or_a_number_of_tokens(split):
    with pytest.raises(ValidationError):
        PrefixLM(split=split)
