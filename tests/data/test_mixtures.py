"""A mixture is read in exactly its shares, whoever reads it, and is refused where it could not be."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import difference, read_yaml
from lit_llm.data.batches import StepSampler, TrainBatches, cycle
from lit_llm.data.config import CYCLE, DataConfig
from lit_llm.data.prepare import prepare
from lit_llm.data.sources import identify
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.evaluation.likelihood import Validation, sum_of_nats
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.objectives.config import CausalLM, MasksConfig, PrefixLM


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three folders of documents, each in an alphabet of its own: abc, ABC, 123."""
    root = tmp_path_factory.mktemp("mixtures")
    for name, letters, number in (("low", "abc", 40), ("high", "ABC", 25), ("digits", "123", 60)):
        (root / name).mkdir()
        draw = np.random.default_rng(number)
        for n in range(number):
            (root / name / f"{n:02}.txt").write_text("".join(draw.choice(list(letters), 300)))
    return root


def yaml_of(texts, **weights):
    sources = {
        name: {"corpus": {"kind": "text", "files": [f"{texts}/{name}/*.txt"]}, "weight": weight}
        for name, weight in weights.items()
    }
    corpus = {"kind": "mixture", "sources": sources}
    data = {"corpus": corpus, "tokenizer": "bytes", "sequence_length": 16, "batch_size": 8}
    return json.dumps(data | {"validation_fraction": 0.2})


def config(texts, text="", **weights):
    return validate(DataConfig, read_yaml(text or yaml_of(texts, **weights), "f"))


def refused(text):
    with pytest.raises(InputError) as caught:
        config(None, text)
    return [str(problem) for problem in caught.value.problems]


def shares(found):
    return {name: source.weight for name, source in found.corpus.sources.items()}


# --- shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1000,), (750, 250), (333, 333, 334), (1, 999), (997, 1, 1, 1)])
def test_every_cycle_holds_exactly_the_shares_and_no_prefix_strays_beyond_the_bound(counts):
    """Of n among N, k windows hold between max(0, k - N + n) and min(k, n): at most n (N - n) / N from k n / N."""
    for number in (0, 1, 77):
        sources, before = cycle(counts, 3, number)
        for source, count in enumerate(counts):
            of_it = sources == source
            assert of_it.sum() == count
            assert np.array_equal(before[of_it], np.arange(count))
            so_far = np.cumsum(of_it) - np.arange(1, CYCLE + 1) * count / CYCLE
            assert np.abs(so_far).max() <= count * (CYCLE - count) / CYCLE + 1e-9


def test_the_order_of_the_sources_is_drawn_anew_in_each_cycle_and_for_each_seed():
    orders = {tuple(cycle((500, 500), seed, number)[0]) for seed in range(5) for number in range(5)}
    assert len(orders) == 25


def test_the_order_within_a_cycle_is_as_good_as_random():
    """Of 500 in 1000 the first half holds 250 give or take: hypergeometric, sd sqrt(500 / 4 x 500 / 999) = 7.9."""
    halves = [(cycle((500, 500), seed, 0)[0][:500] == 0).sum() for seed in range(200)]
    assert abs(np.mean(halves) - 250) < 5 * 7.91 / math.sqrt(200)
    assert 6 < np.std(halves) < 10


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1500])
def test_batches_hold_the_shares_and_every_window_of_a_source_once_per_pass(mixed, size):
    """Three windows of one source and 700 of the other: passes of one end within a batch, those of the other do not."""
    data = mixed({"a": (250, 3), "b": (750, 700)}, batch_size=size)
    batches = TrainBatches(data, CausalLM(), "decoder", MasksConfig(), seed=5)
    read = [batches.places(k) for k in range(-(-4000 // size))]
    sources, indices = (np.concatenate(part)[:4000] for part in zip(*read, strict=True))
    for number in range(4):
        assert (sources[number * CYCLE : (number + 1) * CYCLE] == 0).sum() == 250
    for source, count in ((0, 3), (1, 700)):
        of_it = indices[sources == source]
        for begin in range(0, len(of_it) - count + 1, count):
            assert np.array_equal(np.sort(of_it[begin : begin + count]), np.arange(count))


def test_the_batch_size_does_not_change_the_order(mixed):
    orders = []
    for size in (3, 250):
        data = mixed({"a": (400, 11), "b": (600, 90)}, batch_size=size)
        batches = TrainBatches(data, CausalLM(), "decoder", MasksConfig(), seed=1)
        orders.append(np.concatenate([np.stack(batches.places(k)) for k in range(3000 // size)], axis=1))
    assert np.array_equal(*orders)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("reached", [0, 60])
def test_batches_are_those_of_their_number_over_mixtures_shards_and_loader_workers(mixed, workers, reached):
    """Shards of 7 tokens under windows of 4; 125 batches of 8 are a cycle. A resume starts anywhere in it."""
    data = mixed({"a": (300, 20), "b": (700, 41)}, batch_size=8)
    batches = TrainBatches(data, PrefixLM(split="random"), "encoder_decoder", MasksConfig(), seed=2)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=StepSampler(130, lambda: reached), num_workers=workers
    )
    for k, batch in enumerate(loader, reached):
        sources, indices = batches.places(k)
        first = 20_000 * sources + 4 * indices
        rows = torch.cat([batch.inputs["source_BS"], batch.targets], 1)
        assert set(rows[rows > 1].tolist()) <= set((first[:, None] + np.arange(4)).ravel().tolist())
        assert torch.equal(batch.targets, batches[k].targets)
    assert len(pickle.dumps(batches)) < 10_000  # a started worker gets no tokens along


def test_batches_hold_the_text_of_their_sources(texts, tmp_path):
    data = prepare(config(texts, low=3, high=1), tmp_path)
    batches = TrainBatches(data, CausalLM(), "decoder", MasksConfig(), seed=0)
    counts = {"low": 0, "high": 0}
    for k in range(125):
        sources, _ = batches.places(k)
        for source, row in zip(sources, batches[k].targets, strict=True):
            name = data.sources[source].name
            counts[name] += 1
            letters = set(data.tokenizer().decode(row.tolist()))
            assert letters <= set("abc" if name == "low" else "ABC")
    assert counts == {"low": 750, "high": 250}


# --- identity ------------------------------------------------------------------------------------------------------


def test_weights_are_relative(texts):
    first, second = config(texts, low=3, high=1), config(texts, low=6, high=2)
    assert shares(first) == {"low": 750, "high": 250}
    assert difference(first.model_dump(), second.model_dump()) == {}
    assert identify(first) == identify(second)


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 1e-3, "b": 0.999}])
def test_resolved_weights_are_whole_windows_near_the_shares_and_resolve_to_themselves(texts, weights):
    found = shares(config(texts, **weights))
    assert sum(found.values()) == CYCLE
    for name, weight in weights.items():
        assert found[name] == int(found[name])
        assert abs(found[name] - CYCLE * weight / sum(weights.values())) < 1
    assert shares(config(texts, **found)) == found


def test_what_a_mixture_is_depends_on_its_shares_contents_and_names_not_on_their_order(texts, tmp_path):
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "a.txt").write_text("other")
    (tmp_path / "high").symlink_to(texts / "high")
    plain = identify(config(texts, low=3, high=1))
    assert identify(config(texts, high=1, low=3)) == plain
    renamed = yaml_of(texts, low=3, high=1).replace('"low":', '"small":')
    others = [
        config(texts, low=2, high=1),
        config(texts, low=1, high=3),
        config(texts, renamed),
        config(tmp_path, low=3, high=1),
        config(texts, low=3, high=1, digits=1),
    ]
    assert len({identify(other).digest for other in others} | {plain.digest}) == len(others) + 1


def test_names_change_no_batch(texts, tmp_path):
    plain = config(texts, low=3, high=1)
    renamed = config(texts, yaml_of(texts, low=3, high=1).replace('"low":', '"zzz":').replace('"high":', '"aaa":'))
    first, second = (
        TrainBatches(prepare(data, tmp_path), CausalLM(), "decoder", MasksConfig(), seed=0) for data in (plain, renamed)
    )
    assert all(torch.equal(first[k].targets, second[k].targets) for k in range(10))


def test_a_source_is_tokenised_once_for_all_that_read_it_with_one_tokenizer(texts, tmp_path):
    def kept(**weights):
        return config(texts, yaml_of(texts, **weights).replace("{", '{"near_duplicates": "keep", ', 1))

    said = []
    first = prepare(kept(low=3, high=1), tmp_path, lambda what, *_: said.append(what))
    assert {"tokenising low", "tokenising high"} <= set(said)
    said.clear()
    second = prepare(kept(low=1, digits=1), tmp_path, lambda what, *_: said.append(what))
    assert {what for what in said if what.startswith("tokenising")} == {"tokenising digits"}
    alone = {"corpus": {"kind": "text", "files": [f"{texts}/low/*.txt"]}}
    single = config(texts, json.dumps(json.loads(yaml_of(texts, low=1, high=1)) | alone | {"near_duplicates": "keep"}))
    said.clear()
    third = prepare(single, tmp_path, lambda what, *_: said.append(what))
    assert said == []
    folders = [{s.folder for s in found.sources} for found in (first, second, third)]
    assert len(folders[0] & folders[1] & folders[2]) == 1


def test_a_source_without_near_duplicates_is_tokenised_once_for_each_set_of_sources(texts, tmp_path):
    """What is left out depends on what the others hold out, not on the shares."""
    said = []
    prepare(config(texts, low=3, high=1), tmp_path)
    prepare(config(texts, low=1, high=5), tmp_path, lambda what, *_: said.append(what))
    assert said == []
    prepare(config(texts, low=1, digits=1), tmp_path, lambda what, *_: said.append(what))
    assert {"tokenising low", "tokenising digits"} <= set(said)


def test_one_tokenizer_is_trained_on_all_sources(texts, tmp_path):
    data = json.loads(yaml_of(texts, low=3, high=1)) | {"tokenizer": {"kind": "bpe", "vocabulary": 300}}
    prepared = prepare(config(texts, json.dumps(data)), tmp_path)
    encode = prepared.tokenizer().encode
    assert len(encode(["abcabcabc"])[0]) < 9
    assert len(encode(["ABCABCABC"])[0]) < 9
    assert len(encode(["123123123"])[0]) == 9  # of no source
    other = identify(config(texts, json.dumps(data).replace('"weight": 3', '"weight": 2')))
    assert other.tokenizer == identify(config(texts, json.dumps(data))).tokenizer  # shares do not matter to it


def test_another_way_of_reading_documents_is_another_tokenizer_and_other_tokens(texts, monkeypatch):
    data = json.dumps(json.loads(yaml_of(texts, low=1, high=1)) | {"tokenizer": {"kind": "bpe", "vocabulary": 300}})
    before = identify(config(texts, data))
    monkeypatch.setattr("lit_llm.data.sources.FORMAT", 0)
    after = identify(config(texts, data))
    assert before.tokenizer != after.tokenizer
    assert not {source.digest for source in before.sources} & {source.digest for source in after.sources}


# --- what is refused -----------------------------------------------------------------------------------------------


def wrong(texts, change, **weights):
    data = json.loads(yaml_of(texts, **(weights or {"low": 3, "high": 1})))
    change(data["corpus"]["sources"])
    return refused(json.dumps(data))


def test_a_weight_of_less_than_one_window_in_a_thousand_is_refused(texts):
    assert refused(yaml_of(texts, low=1, high=0.0009)) == [
        "f:1: corpus.sources.high.weight: 0.0009 of 1.0009 is less than one window in 1000"
    ]


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_that_is_not_positive_is_refused(texts, weight):
    (said,) = refused(yaml_of(texts, low=1, high=weight))
    assert said == f"f:1: corpus.sources.high.weight: should be greater than 0, not {weight}"


def test_fewer_than_two_sources_are_refused(texts):
    assert refused(yaml_of(texts, low=1)) == [
        "f:1: corpus.sources: has 1 of the two sources that it needs; one alone is a corpus itself"
    ]
    assert "has 0 of the two" in refused(yaml_of(texts))[0]


def test_a_mixture_inside_a_mixture_is_refused(texts):
    inner = json.loads(yaml_of(texts, low=1, high=1))["corpus"]
    (said,) = wrong(texts, lambda sources: sources["low"].update(corpus=inner))
    assert said.startswith("f:1: corpus.sources.low.corpus.kind: 'mixture' is not possible - allowed here: ")


def test_a_name_that_is_no_metrics_name_is_refused(texts):
    (said,) = wrong(texts, lambda sources: sources.update({"a.b": sources.pop("low")}))
    assert said == "f:1: corpus.sources.a.b: 'a.b' is not a plain name: letters, digits, '-' and '_'"


def test_files_that_are_not_there_are_told_at_their_sources_all_at_once(texts, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    found = config(tmp_path, gone=1, empty=1)
    with pytest.raises(InputError) as caught:
        identify(found)
    assert [str(problem) for problem in caught.value.problems] == [
        f"corpus.sources.gone.corpus.files: {tmp_path}/gone/*.txt: no file matches",
        f"corpus.sources.empty.corpus.files: {tmp_path}/empty/*.txt: these files are all empty",
    ]


def test_a_source_without_a_window_is_refused_at_its_key(texts, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("ab")
    (tmp_path / "low").symlink_to(texts / "low")
    with pytest.raises(InputError) as caught:
        prepare(config(tmp_path, low=1, short=1), tmp_path / "out")
    assert {problem.key for problem in caught.value.problems} == {"corpus.sources.short"}
    assert all("less than one window of 16" in problem.message for problem in caught.value.problems)


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [PrefixLM(), PrefixLM(split="random"), CausalLM()], ids=lambda o: o.kind)
def test_the_primary_metric_of_a_mixture_is_the_mean_over_its_sources_weighted_by_their_shares(
    texts, tmp_path, objective
):
    """What a model is trained on is what it is measured on, whatever number of windows each source holds out."""
    torch.set_num_threads(1)
    model = build_model(load_experiment("decllm-tiny", ["model.d_model=16"]).model).eval()
    data = prepare(config(texts, low=3, high=1), tmp_path)
    validation = Validation(ValidationConfig(sequences=150), data, objective, "decoder", MasksConfig())
    found = validation(model)
    windows = {source.name: sum(map(len, source.target_batches)) for source in validation.sources}
    assert windows["high"] < windows["low"]
    nll = {name: found[f"val/target_nll/{name}"] for name in windows}
    assert nll["low"] != nll["high"]
    assert found["val/target_nll"] == pytest.approx(0.75 * nll["low"] + 0.25 * nll["high"], rel=1e-12)
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/target_nll"]), rel=1e-12)
    for source in validation.sources:
        nats, tokens = sum_of_nats(model, source.target_batches)
        assert nll[source.name] == nats / tokens
        assert tokens == 8 * windows[source.name]
        # A byte a token, and none for the end of a document.
        ends = tokens - source.bytes.sum()
        assert 0 <= ends < 0.02 * tokens
        assert found[f"val/bits_per_byte/{source.name}"] == nats / math.log(2) / source.bytes.sum()
    if objective == PrefixLM():
        assert found["val/objective_loss"] == found["val/target_nll"]


def test_a_corpus_that_is_no_mixture_has_no_metric_of_a_source(mixed):
    data = mixed({"": (1000, 9)})
    data = type(data)(
        data.config.model_copy(update={"tokenizer": config_of_bytes()}), "d", data.tokenizer_folder, data.sources
    )
    model = build_model(load_experiment("decllm-tiny", ["model.d_model=16"]).model).eval()
    found = Validation(ValidationConfig(), data, CausalLM(), "decoder", MasksConfig())(model)
    assert set(found) == {"val/target_nll", "val/perplexity", "val/bits_per_byte", "val/objective_loss"}


def config_of_bytes():
    return DataConfig.model_validate({"tokenizer": "bytes", "sequence_length": 4, "batch_size": 2}).tokenizer
