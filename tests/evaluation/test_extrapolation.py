"""Loss beyond the training window: of the right tokens, and what a plain forward pass says of them."""

import json
import math
import re

import numpy as np
import pytest
from pydantic import ValidationError

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import read_yaml
from lit_llm.data.config import CYCLE
from lit_llm.evaluation.config import ExtrapolationConfig
from lit_llm.evaluation.extrapolation import extrapolation
from lit_llm.objectives.config import MasksConfig
from tests.evaluation.evaluated import BYTES, FAMILIES, model_of, plain_nats, uniform

WINDOW = 32


def evaluate(model, data, masks=MasksConfig(), batch_tokens=300, **keys):
    return extrapolation(model, config(**keys), data, masks, batch_tokens=batch_tokens)


def config(**keys):
    return validate(ExtrapolationConfig, read_yaml(json.dumps(keys), "f"))


def sequences_of(data, source, length, count):
    """`count` stretches of the held-out tokens as they lie on disk, evenly spread."""
    files = sorted(source.folder.glob("*.validation.bin"))
    tokens = np.concatenate([np.fromfile(file, np.uint16) for file in files]).astype(np.int64)
    stretches = tokens[: len(tokens) // length * length].reshape(-1, length)
    assert len(stretches) >= count
    return stretches[np.arange(count) * len(stretches) // count]


# --- nats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [1, "quarter", "half", 11])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_at_a_length_is_that_of_a_forward_pass_over_just_that_length(data, family, prefix):
    """Cut at the length, so that nothing behind it can matter: the last quarter of a window of targets before it."""
    model, first = model_of(family), {"quarter": 8, "half": 16}.get(prefix, prefix)
    found = evaluate(model, data, lengths=[1, 2, 3], prefixes=[prefix], sequences=4)
    texts = sequences_of(data, data.sources[0], 3 * WINDOW, 4)
    assert len(found.metrics) == 3
    for length in (32, 64, 96):
        tail = [plain_nats(model, text[:first], text[first:length])[-8:].mean().item() for text in texts]
        said = found.metrics[f"extrapolation/nll/prefix_{prefix}/length_{length // WINDOW}x"]
        assert said == pytest.approx(np.mean(tail), rel=1e-6)


@pytest.mark.parametrize("window", [16, 20, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_loss_by_position(prepared, data, window, family):
    """Of a window of 20 tokens a bucket has one or two positions."""
    data = prepared(data.config.corpus.model_dump(mode="json"), window=window)
    model = model_of(family)
    found = evaluate(model, data, lengths=[1, 2], prefixes=[3], sequences=5)
    texts = sequences_of(data, data.sources[0], 2 * window, 5)
    nats = np.array([plain_nats(model, text[:3], text[3:]) for text in texts])
    positions = np.arange(3, 2 * window)
    assert sum(row["tokens"] for row in found.rows) == nats.size, "every target is in one row"
    for row in found.rows:
        inside = nats[:, (row["position"] <= positions) & (positions < row["length"])]
        assert row["tokens"] == inside.size > 0
        assert row["nats"] == pytest.approx(inside.sum(), rel=1e-6)
        assert row["log_probability"] == pytest.approx(-inside.mean(), rel=1e-6)
        assert row["length"] - row["position"] in ({1, 2} if window == 20 else {window // 16})
        assert (row["source"], row["prefix"]) == ("corpus", 3)
    assert found.rows[-1]["length"] == 2 * window


def test_masks_are_those_of_the_model(data):
    model, opened = model_of("decllm"), MasksConfig(prefix="bidirectional")
    found = evaluate(model, data, opened, lengths=[1], prefixes=["half"], sequences=3)
    texts = sequences_of(data, data.sources[0], WINDOW, 3)
    # <s> belongs to the prefix.
    tail = [plain_nats(model, text[:16], text[16:], prefix_length=17)[-8:].mean().item() for text in texts]
    assert found.metrics["extrapolation/nll/prefix_half/length_1x"] == pytest.approx(np.mean(tail), rel=1e-6)
    shut = evaluate(model, data, lengths=[1], prefixes=["half"], sequences=3)
    separate = evaluate(model, data, MasksConfig(intra_document=True), lengths=[1], prefixes=["half"], sequences=3)
    assert len({tuple(found.metrics.values()) for found in (found, shut, separate)}) == 3


def test_both_families_are_asked_for_the_same_targets(data):
    dec, red = (evaluate(model_of(family), data, sequences=3) for family in FAMILIES)
    without = [
        [{k: v for k, v in row.items() if k not in ("nats", "log_probability")} for row in found.rows]
        for found in (dec, red)
    ]
    assert without[0] == without[1]
    assert dec.metrics.keys() == red.metrics.keys()
    assert all(dec.metrics[name] != red.metrics[name] for name in dec.metrics)


def test_for_a_causal_decoder_the_prefix_only_says_what_counts(data):
    metrics = evaluate(model_of("decllm"), data, sequences=3).metrics
    for length in (1, 2, 4):
        named = (metrics[f"extrapolation/nll/prefix_{prefix}/length_{length}x"] for prefix in (1, "quarter", "half"))
        one, quarter, half = named
        assert one == pytest.approx(quarter, rel=1e-6)
        assert one == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_give_the_same(data, family):
    model = model_of(family, double=False)
    alone, some, all_ = (evaluate(model, data, batch_tokens=size, sequences=5) for size in (1, 300, 10**6))
    for other in (some, all_):
        assert other.metrics == pytest.approx(alone.metrics, rel=1e-5)
        assert [row["nats"] for row in other.rows] == pytest.approx([row["nats"] for row in alone.rows], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bfloat16_says_about_the_same(data, family):
    exact = evaluate(model_of(family), data, sequences=3).metrics
    assert evaluate(model_of(family).bfloat16(), data, sequences=3).metrics == pytest.approx(exact, rel=0.03)


def test_a_uniform_distribution_costs_the_same_everywhere(data):
    found = evaluate(uniform("redllm"), data)
    assert len(found.metrics) == 9
    assert list(found.metrics.values()) == pytest.approx([math.log(BYTES)] * 9, rel=1e-6)


def test_progress_counts_each_sequence_once_for_each_prefix(data):
    said = []
    extrapolation(
        model_of("decllm"),
        config(lengths=[1], prefixes=[1, 2], sequences=3),
        data,
        MasksConfig(),
        batch_tokens=1,
        progress=lambda *numbers: said.append(numbers),
    )
    assert said == [(done, 6) for done in range(1, 7)]


# --- what is read --------------------------------------------------------------------------------------------------


def test_of_a_mixture_it_is_the_mean_over_sources_by_their_shares(prepared, write):
    """However many sequences each source has."""
    folders = {name: write({f"{n:02}.txt": f"{letters}{n:02}" * 8 for n in range(count)}) for name, letters, count in
               (("few", "abc", 8), ("many", "xyz", 40))}  # fmt: skip
    sources = {
        name: {"corpus": {"kind": "text", "files": [f"{folder}/*.txt"]}, "weight": {"few": 3, "many": 1}[name]}
        for name, folder in folders.items()
    }
    data = prepared({"kind": "mixture", "sources": sources}, window=16, test=0)
    found = evaluate(model_of("decllm"), data, lengths=[2], prefixes=["half"], sequences=20)
    own, sizes = {}, {}
    for source in data.sources:
        rows = [row for row in found.rows if row["source"] == source.name and row["position"] >= 28]
        sizes[source.name] = sum(row["tokens"] for row in rows)
        own[source.name] = sum(row["nats"] for row in rows) / sizes[source.name]
        assert source.share == {"few": 0.75 * CYCLE, "many": 0.25 * CYCLE}[source.name]
    assert sizes["few"] < sizes["many"]
    (said,) = found.metrics.values()
    assert said == pytest.approx(0.75 * own["few"] + 0.25 * own["many"], rel=1e-12)


def test_held_out_text_that_is_too_short_is_refused_before_the_model_is_asked(data):
    tokens = data.sources[0].count("validation")
    with pytest.raises(InputError) as caught:
        evaluate(None, data, lengths=[1, 1000])
    (problem,) = caught.value.problems
    assert problem.key == "extrapolation.lengths"
    assert f"1000 windows are 32000 tokens, and the held-out text has {tokens}" in problem.message


# --- settings ------------------------------------------------------------------------------------------------------


def test_the_prefixes_of_the_paper_are_the_default():
    """Figure 5: 1, 512 and 1024 of a window of 2048."""
    assert ExtrapolationConfig().prefix_lengths(2048) == (1, 512, 1024)


def test_metrics_have_names_that_mlflow_takes(data):
    for name in evaluate(uniform("decllm"), data, sequences=1).metrics:
        assert re.fullmatch(r"[/\w.\- :]*", name), "what mlflow's own message allows"


@pytest.mark.parametrize("prefix", [0, -3, 25, 64])
def test_a_prefix_that_reaches_into_what_is_measured_is_refused(data, prefix):
    with pytest.raises(InputError, match=rf"extrapolation.prefixes: {prefix} tokens .* length of 32; from 1 to 24 are"):
        evaluate(None, data, prefixes=[1, prefix])
    evaluate(uniform("decllm"), data, prefixes=[24], sequences=1)


def test_a_window_too_small_for_buckets_is_refused():
    assert ExtrapolationConfig().problems(15) == [
        ("lengths", "of windows of 15 tokens; 16 or more are needed"),
    ]
    assert not ExtrapolationConfig().problems(16)


@pytest.mark.parametrize(
    "wrong", [{"lengths": ()}, {"lengths": (0,)}, {"prefixes": ()}, {"prefixes": ("third",)}, {"sequences": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ExtrapolationConfig(**wrong)
