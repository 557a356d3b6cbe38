"""What is drawn, how often, and from which tokens: against softmax, the definitions, and transformers' processors."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chi2_contingency, chisquare
from torch.testing import assert_close

from lit_llm.generation import sampling as sampling_module
from lit_llm.generation.sampling import Sampling, choose, shares, uniform

V, DRAWS = 12, 20_000
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, -3.0, 2.4, 1.0, -0.5, 0.8, -2.0, 1.9], dtype=torch.float64)


def draws(sampling, step=0):
    """One row of LOGITS for each of many prompts."""
    return choose(LOGITS.expand(DRAWS, V), sampling, [(draw, step) for draw in range(DRAWS)])


def expected_shares(temperature=1.0, top_k=V, top_p=1.0):
    """By the definitions, one token after the other."""
    probabilities = softmax(LOGITS.numpy() / temperature)
    kept = np.zeros(V)
    ranked = np.argsort(-probabilities)[:top_k]
    mass = probabilities[ranked].sum()
    for token in ranked:
        if kept.sum() >= top_p * mass:
            break
        kept[token] = probabilities[token]
    return kept / kept.sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.8},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_drawn_as_often_as_the_definitions_say(setting):
    """Chi-square over the allowed tokens; no other is ever drawn."""
    counts = np.bincount(draws(Sampling(**{"temperature": 1.0, **setting})), minlength=V)
    wanted = expected_shares(**setting)
    assert not counts[wanted == 0].any()
    allowed = wanted > 0
    if allowed.sum() > 1:
        assert chisquare(counts[allowed], DRAWS * wanted[allowed]).pvalue > 1e-3


def test_so_many_draws_would_tell_a_temperature_of_one_from_1_1():
    counts = np.bincount(draws(Sampling(temperature=1.0)), minlength=V)
    assert chisquare(counts, DRAWS * expected_shares(temperature=1.1)).pvalue < 1e-6


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_shares_are_those_of_transformers_processors(setting):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    setting = {"temperature": 1.0, **setting}
    scores = torch.randn(50, 40, dtype=torch.float64) * 2
    found = shares(scores, Sampling(**setting))
    scores = TemperatureLogitsWarper(setting["temperature"])(None, scores)
    if "top_k" in setting:
        scores = TopKLogitsWarper(setting["top_k"])(None, scores)
    if "top_p" in setting:
        scores = TopPLogitsWarper(setting["top_p"])(None, scores)
    assert_close(found / found.sum(-1, keepdim=True), scores.softmax(-1), rtol=0, atol=1e-12)


def test_of_equally_probable_tokens_the_lower_ids_are_kept():
    level = torch.zeros(1, 6)
    assert shares(level, Sampling(temperature=1.0, top_k=2))[0].nonzero().flatten().tolist() == [0, 1]
    assert shares(level, Sampling(temperature=1.0, top_p=0.5))[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert choose(level, Sampling(), [(0, 0)]).tolist() == [0]


def test_greedy_takes_the_most_probable_and_a_low_temperature_comes_to_the_same():
    rows = torch.randn(200, 30)
    assert torch.equal(choose(rows, Sampling(), [(row, 0) for row in range(200)]), rows.argmax(-1))
    assert torch.equal(choose(rows, Sampling(temperature=1e-6), [(row, 0) for row in range(200)]), rows.argmax(-1))


@pytest.mark.parametrize(("number", "token"), [(0.0, 3), (1 - 2**-53, 8)])
def test_the_least_and_the_largest_number_draw_the_first_and_the_last_token_that_is_allowed(number, token, monkeypatch):
    monkeypatch.setattr(sampling_module, "uniform", lambda *_: number)
    logits = torch.full((1, V), -10.0)
    logits[0, [3, 5, 8]] = 1.0
    assert choose(logits, Sampling(temperature=1.0, top_k=3), [(0, 0)]).tolist() == [token]


@pytest.mark.parametrize(
    "pair",
    [
        lambda n: (uniform(0, n, 0), uniform(0, n, 1)),
        lambda n: (uniform(0, 0, n), uniform(0, 1, n)),
        lambda n: (uniform(0, n, 0), uniform(1, n, 0)),
        lambda n: (uniform(0, n, 0), uniform(0, n + 1, 0)),
        lambda n: (uniform(0, 0, n), uniform(0, 0, n + 1)),
        lambda n: (uniform(0, n, 0), uniform(0, 0, n + 1)),
    ],
    ids=["steps", "prompts", "seeds", "next prompt", "next step", "prompt and step"],
)
def test_the_numbers_of_steps_prompts_and_seeds_are_uniform_and_independent(pair):
    cells = (8 * np.array([pair(n) for n in range(DRAWS)])).astype(int)
    table = np.zeros((8, 8))
    np.add.at(table, tuple(cells.T), 1)
    assert chi2_contingency(table).pvalue > 1e-3
    for side in (0, 1):
        assert chisquare(table.sum(side)).pvalue > 1e-3


def test_a_draw_depends_on_seed_prompt_and_step_alone():
    sampling, rows = Sampling(temperature=1.0, seed=5), torch.randn(6, V)
    together = choose(rows, sampling, [(prompt, 11) for prompt in [9, 4, 7, 0, 2, 3]])
    alone = [choose(rows[[row]], sampling, [(prompt, 11)]) for row, prompt in enumerate([9, 4, 7, 0, 2, 3])]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"top_k": 0}, "top_k: 0 leaves no token"),
        ({"top_p": 0.0}, "top_p: 0.0 is not a mass"),
        ({"top_p": 1.5}, "top_p: 1.5 is not a mass"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_ids_beyond_the_tokenizers_are_not_chosen_unless_they_are_asked_for():
    """The likeliest token of LOGITS is 6: with the ids below 6 alone, greedy takes 1, and shares are those of six."""
    assert choose(LOGITS[None], Sampling(), [(0, 0)]).tolist() == [6]
    assert choose(LOGITS[None], Sampling(vocabulary=6), [(0, 0)]).tolist() == [1]
    counts = np.bincount(draws(Sampling(temperature=1.0, vocabulary=6)), minlength=V)
    assert not counts[6:].any()
    assert chisquare(counts[:6], DRAWS * softmax(LOGITS[:6].numpy())).pvalue > 1e-6
    with pytest.raises(ValueError, match="vocabulary: 0 leaves no token"):
        Sampling(vocabulary=0)
