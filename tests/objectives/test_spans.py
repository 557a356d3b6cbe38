"""Span corruption and the mixture of denoisers: nothing is lost, and the counts are those that the papers give."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lit_llm.objectives.base import EOD
from lit_llm.objectives.config import PrefixLM
from lit_llm.objectives.spans import MIXES, UL2, Denoiser, ModeShares, SpanCorruption

VOCABULARY = 5000
"""Text is 2, 3, 4 ...: every token once, so that its place can be told."""


def window(length):
    return np.arange(2, 2 + length)


def examples(objective, length, count):
    return [objective.example(window(length), np.random.default_rng(seed), VOCABULARY) for seed in range(count)]


def spans_of(target):
    """{sentinel: tokens} of a target."""
    assert target[-1] == EOD
    starts = [place for place, token in enumerate(target) if token >= VOCABULARY]
    ends = [*starts[1:], len(target) - 1]
    return {int(target[start]): target[start + 1 : end].tolist() for start, end in zip(starts, ends, strict=True)}


def rebuilt(source, target):
    """The source with each sentinel replaced by its span."""
    spans = spans_of(target)
    return [token for item in source.tolist() for token in spans.get(item, [item])]


SETTINGS = [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0), (0.3, 1.0), (0.4, 1.0)]


@pytest.mark.parametrize("length", [2, 3, 7, 64, 129, 512])
@pytest.mark.parametrize(("corruption", "mean_span"), SETTINGS)
def test_the_source_and_the_spans_of_the_target_are_the_window(corruption, mean_span, length):
    objective = SpanCorruption(corruption=corruption, mean_span=mean_span)
    for made in examples(objective, length, 20):
        assert rebuilt(made.source, made.target) == window(length).tolist()
        assert made.counted is None


def test_the_picture_of_span_corruption():
    """8 tokens, half of them in spans of 2: four that stay and four that go, in two spans, the last at the end."""
    for made in examples(SpanCorruption(corruption=0.5, mean_span=2), 8, 50):
        sentinels = [VOCABULARY, VOCABULARY + 1]
        assert [token for token in made.source.tolist() if token >= VOCABULARY] == sentinels
        assert made.source[0] == 2
        assert made.source[-1] == sentinels[-1]
        assert list(spans_of(made.target)) == sentinels


@pytest.mark.parametrize("length", [64, 100, 512, 1024])
@pytest.mark.parametrize(("corruption", "mean_span"), SETTINGS)
def test_the_numbers_of_tokens_and_spans_are_t5s(corruption, mean_span, length):
    """num_noise_tokens = round(L r), num_noise_spans = round(num_noise_tokens / mean), each at least 1."""
    noise = round(Fraction(corruption).limit_denominator(100) * length)
    spans = max(1, round(noise / mean_span))
    for made in examples(SpanCorruption(corruption=corruption, mean_span=mean_span), length, 5):
        taken = spans_of(made.target)
        assert (sum(map(len, taken.values())), len(taken)) == (noise, spans)
        assert all(taken.values()), "no span is empty"


@pytest.mark.parametrize("kind", ["span", "gap"])
def test_the_lengths_of_spans_have_the_distribution_of_a_random_partition(kind):
    """Of C(n-1, k-1) equally likely ways to cut n tokens into k pieces, C(n-m-1, k-2) have a first piece of m tokens.

    64 tokens at 30% in spans of 3.2: n = 19 noise tokens in k = 6 spans; 45 that stay in 6 pieces.
    """
    objective, count, k = SpanCorruption(corruption=0.3, mean_span=3.2), 10_000, 6
    n = {"span": 19, "gap": 45}[kind]
    found = Counter()
    for made in examples(objective, 64, count):
        gap = int(np.flatnonzero(made.source >= VOCABULARY)[0])
        found[len(spans_of(made.target)[VOCABULARY]) if kind == "span" else gap] += 1
    assert sum(found.values()) == count
    for m in range(1, n - k + 2):
        share = math.comb(n - m - 1, k - 2) / math.comb(n - 1, k - 1)
        assert abs(found[m] - count * share) <= 4 * math.sqrt(count * share * (1 - share)) + 1


@pytest.mark.parametrize(("corruption", "mean_span"), SETTINGS)
@pytest.mark.parametrize("length", [64, 129, 512])
def test_lengths_and_ids_are_known_before_any_text_is_read(corruption, mean_span, length):
    objective = SpanCorruption(corruption=corruption, mean_span=mean_span)
    [(share, lengths)] = objective.lengths(length)
    assert share == 1
    for made in examples(objective, length, 5):
        assert (len(made.source), len(made.target), 0) == lengths
        highest = max(made.source.max(), made.target.max())
        assert highest == VOCABULARY + sum(objective.extra_ids(length).values()) - 1


def test_spans_without_text_between_them_are_refused():
    """70% of ten tokens in spans of one: seven spans, and three tokens to part them."""
    assert "7 spans of 7 tokens leave 3" in SpanCorruption(corruption=0.7, mean_span=1).problem(10)
    assert SpanCorruption(corruption=0.5, mean_span=1).problem(10) == ""
    assert SpanCorruption().problem(1)


@pytest.mark.parametrize("keys", [{"corruption": 0}, {"corruption": 1.0}, {"mean_span": 0.5}])
def test_what_is_no_share_and_no_span_is_refused(keys):
    with pytest.raises(ValidationError):
        SpanCorruption(**keys)


# --- UL2 -----------------------------------------------------------------------------------------------------------

TABLE_1 = [("r", 3, 0.15), ("r", 8, 0.15), ("s", None, 0.25), *[("x", m, c) for m, c in [(3, 0.5), (8, 0.5)]]]
TABLE_1 += [("x", 64, 0.15), ("x", 64, 0.5)]
UL2R = [("r", 3, 0.15, 1 / 6), ("x", 32, 0.15, 1 / 6), ("x", 3, 0.5, 1 / 6), ("s", None, "random", 1 / 2)]
T5GEMMA_2 = [("r", 3, 0.15, 1), ("x", 12, 0.5, 1), ("x", 32, 0.15, 1), ("x", 32, 0.5, 1), ("s", None, 0.75, 4)]
TABLES: dict[str, Any] = {
    "ul2": [(*task, 1 / 7) for task in TABLE_1],
    "ul2r": UL2R,
    "t5gemma2": [(*task, weight / 8) for *task, weight in T5GEMMA_2],
}


@pytest.mark.parametrize("mix", TABLES)
def test_the_mixes_are_those_of_the_papers(mix):
    found = [(d.mode, d.mean_span, d.corruption, share) for share, d in UL2(mix=mix).shares]
    assert sorted(map(str, found)) == sorted(map(str, [(m, s and float(s), c, w) for m, s, c, w in TABLES[mix]]))


def mode_of(source, objective, length):
    first = VOCABULARY + objective.extra_ids(length)["sentinels"]
    return "rsx"[source[0] - first]


def of_denoiser(made, length):
    """(mode, whether it has sentinels, tokens that are asked for, spans)."""
    target = made.target.tolist()
    spans = sum(token >= VOCABULARY for token in target)
    return spans, len(target) - spans - bool(spans)


@pytest.mark.parametrize("mix", TABLES)
def test_shares_rates_and_span_means_are_the_tables(mix):
    """10,000 windows of 512: each denoiser's share within three standard errors, its rate and its mean span as known
    as the rounding of its counts allows."""
    length, count, objective = 512, 10_000, UL2(mix=mix)
    found = Counter()
    for made in examples(objective, length, count):
        spans, taken = of_denoiser(made, length)
        key = (spans, taken) if spans else "s"
        found[mode_of(made.source, objective, length), key] += 1
    for mode, mean_span, corruption, share in TABLES[mix]:
        noise = None if corruption == "random" else round(length * corruption)
        key = "s" if mean_span is None else (max(1, round(noise / mean_span)), noise)
        assert abs(found[mode, key] / count - share) <= 3 * math.sqrt(share * (1 - share) / count), (mode, key)
        if mean_span is not None:
            assert abs(noise / length - corruption) <= 0.5 / length
            spans = noise / mean_span
            assert abs(noise / key[0] - mean_span) <= mean_span * 0.5 / max(1, spans - 0.5)
    assert len(found) == len(TABLES[mix])


@pytest.mark.parametrize("mode_tokens", [True, False])
@pytest.mark.parametrize("mix", TABLES)
def test_every_example_of_a_mixture_rebuilds_the_window(mix, mode_tokens):
    objective = UL2(mix=mix, mode_tokens=mode_tokens)
    for made in examples(objective, 200, 100):
        source = made.source[1:] if mode_tokens else made.source
        if made.target.max() >= VOCABULARY:
            assert rebuilt(source, made.target) == window(200).tolist()
        else:
            assert [*source, *made.target] == window(200).tolist(), "S is a prefix LM, with neither sentinel nor end"


@pytest.mark.parametrize("mode_tokens", [True, False])
@pytest.mark.parametrize("mix", TABLES)
def test_the_average_of_any_quadratic_is_that_of_the_examples(mix, mode_tokens):
    """Costs are quadratic in the lengths. Of 10,000 examples, to three standard errors; the largest is known too."""
    objective, length = UL2(mix=mix, mode_tokens=mode_tokens), 256
    pairs = [(len(made.source), len(made.target)) for made in examples(objective, length, 10_000)]

    def value(source, target):
        return source**2 + 3 * source * target + 7 * target**2 + 11 * source + 5

    values = np.array([value(*pair) for pair in pairs])
    expected = objective.average(length, lambda of: value(of.source, of.target))
    assert abs(values.mean() - expected) <= 3 * values.std() / math.sqrt(len(values))
    longest = objective.extremes(length)
    assert max(source for source, _ in pairs) <= max(of.source for of in longest)
    assert max(target for _, target in pairs) <= max(of.target for of in longest)
    if mix != "ul2r":  # whose cuts are random
        assert {*pairs} == {(of.source, of.target) for of in longest}


def test_no_id_is_above_those_that_are_asked_for_and_each_kind_has_its_own():
    objective, length = UL2(), 512
    extra = objective.extra_ids(length)
    assert extra == {"sentinels": round(256 / 3), "mode tokens": 3}  # (3, 0.5) has the most spans
    ids = np.concatenate([np.concatenate([made.source, made.target]) for made in examples(objective, length, 300)])
    assert ids.max() == VOCABULARY + sum(extra.values()) - 1
    inside = [made.source[1:] for made in examples(objective, length, 300)]
    assert max(part.max() for part in inside) < VOCABULARY + extra["sentinels"]


def test_without_mode_tokens_only_sentinels_are_new():
    assert UL2(mode_tokens=False).extra_ids(512) == {"sentinels": 85}
    assert UL2(modes={"s": 1.0}, mode_tokens=False).extra_ids(512) == {}


def test_shares_of_modes_hold_whatever_the_mix():
    """S a half; within X its four denoisers as the mix weighs them: alike."""
    shares = UL2(modes={"r": 0.25, "s": 0.5, "x": 0.25}).shares
    by_mode = Counter()
    for share, denoiser in shares:
        by_mode[denoiser.mode] += share
    assert by_mode == pytest.approx({"r": 0.25, "s": 0.5, "x": 0.25})
    assert [share for share, denoiser in shares if denoiser.mode == "x"] == pytest.approx([0.0625] * 4)


def test_a_mode_that_is_left_out_is_not_drawn():
    objective = UL2(modes={"r": 1.0, "x": 3.0})
    assert {denoiser.mode for _, denoiser in objective.shares} == {"r", "x"}
    modes = Counter(mode_of(made.source, objective, 128) for made in examples(objective, 128, 2000))
    assert abs(modes["x"] / 2000 - 0.75) <= 3 * math.sqrt(0.75 * 0.25 / 2000)


def test_s_alone_is_a_prefix_lm_of_three_quarters():
    """Mean span L/4, one span: what T5's partition leaves of one span is the end of the window."""
    objective = UL2(modes={"s": 1.0}, mode_tokens=False)
    for seed in range(10):
        random = np.random.default_rng(seed)
        ours = objective.example(window(128), random, VOCABULARY)
        peer = PrefixLM(split=96).example(window(128), random, VOCABULARY)
        assert ours.source.tolist() == peer.source.tolist()
        assert ours.target.tolist() == peer.target.tolist()
    with_span = SpanCorruption(corruption=0.25, mean_span=32)
    assert rebuilt(*examples(with_span, 128, 1)[0][:2]) == window(128).tolist()
    assert spans_of(examples(with_span, 128, 1)[0].target) != {}


def test_what_continues_a_prefix_is_the_sequential_mode():
    """The id that stands before S's own examples; none without mode tokens, and none where S is never trained."""
    objective = UL2()
    (opening,) = objective.opening(128, VOCABULARY)
    seen = {made.source[0] for made in examples(objective, 128, 200) if made.target.max() < VOCABULARY}
    assert seen == {opening}
    assert UL2(mode_tokens=False).opening(128, VOCABULARY) == ()
    assert UL2(modes={"r": 1.0, "x": 1.0}).opening(128, VOCABULARY) == ()
    assert PrefixLM().opening(128, VOCABULARY) == ()


@pytest.mark.parametrize(
    "one",
    [UL2(mix="t5gemma2"), UL2(modes={"r": 1.0, "s": 2.0}), UL2(mix=[Denoiser(mode="x", corruption=0.5, weight=3.0)])],
)
def test_the_resolved_mixture_is_the_same_mixture(one):
    resolved = one.resolved(128)
    assert resolved.resolved(128) == resolved
    assert [share for share, _ in resolved.shares] == pytest.approx([share for share, _ in one.shares])
    for left, right in zip(examples(one, 128, 50), examples(resolved, 128, 50), strict=True):
        assert left.source.tolist() == right.source.tolist()
        assert left.target.tolist() == right.target.tolist()


def test_a_list_and_a_name_for_it_resolve_alike():
    assert UL2(mix=MIXES["ul2r"]).resolved(128) == UL2(mix="ul2r").resolved(128)
    assert UL2(modes={"r": 2.0, "s": 1.0, "x": 4.0}).resolved(128) == UL2().resolved(128)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"modes": {}}, "at least one share above 0"),
        ({"mix": []}, "at least one denoiser"),
        ({"mix": [Denoiser(mode="r", corruption=0.1, mean_span=3)], "modes": ModeShares(x=1)}, "no such denoiser"),
        ({"mix": "ul3"}, "ul2r"),
        ({"mix": [{"mode": "r", "corruption": "random", "mean_span": 3.0}]}, "leave mean_span out"),
        ({"mix": [{"mode": "r", "corruption": 1.5}]}, "not between 0 and 1"),
    ],
)
def test_a_mixture_that_nothing_can_be_drawn_from_is_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        UL2(**keys)


def test_a_denoiser_that_does_not_fit_the_window_is_named():
    objective = UL2(mix=[Denoiser(mode="x", corruption=0.7, mean_span=1.0)])
    assert objective.problem(10).startswith("the denoiser x (1.0, 0.7): 7 spans")
    assert UL2().problem(8) == ""
