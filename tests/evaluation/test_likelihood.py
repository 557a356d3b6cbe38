"""Losses of single documents: the right documents, the right tokens, the right nats."""

import json
import math
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import read_yaml
from lit_llm.data.config import DataConfig
from lit_llm.data.prepare import open_held_out, prepare, prepare_held_out
from lit_llm.data.sources import identify_held_out
from lit_llm.data.splits import content_hash
from lit_llm.data.tokenizers import Bytes
from lit_llm.evaluation import window_documents
from lit_llm.evaluation.config import LikelihoodConfig
from lit_llm.evaluation.documents import likelihood
from lit_llm.objectives.config import MasksConfig
from tests.evaluation.evaluated import BYTES, FAMILIES, model_of, plain_nats, uniform
from tests.peers import HEADS, THETA, D, loaded, peer_shape, with_random_scales
from tests.tiny_models import build

ALL = LikelihoodConfig(documents=1000)


def evaluate(model, data, config=ALL, masks=MasksConfig(), batch_tokens=200):
    return likelihood(model, config, data, masks, batch_tokens=batch_tokens)


def config(**keys):
    return validate(LikelihoodConfig, read_yaml(json.dumps(keys), "f"))


def hash_of(ids):
    """The content hash of a document, by its bytes' ids."""
    return f"{content_hash(bytes(byte - 2 for byte in ids if byte > 1).decode()):016x}"


def by_document(found, value="nats"):
    return {row["document"]: row[value] for row in found.rows}


def metrics(found, kind):
    return {name.removeprefix(f"likelihood/{kind}"): v for name, v in found.metrics.items() if f"/{kind}" in name}


# --- nats ----------------------------------------------------------------------------------------------------------


def test_nats_of_each_document_are_those_of_a_llama_with_the_same_weights(data, held_out):
    """transformers' own forward pass over each document alone, cut to 32 tokens, of which the last 16 count."""
    from transformers import LlamaConfig, LlamaForCausalLM

    eps = 1e-3
    model = with_random_scales(
        build("decllm", f"vocabulary={BYTES}", f"attention.rope_theta={THETA}", f"norm.eps={eps}", double=False)
    )
    shape = peer_shape(4, eps, True, D // HEADS) | {"vocab_size": BYTES}
    peer = loaded(LlamaForCausalLM(LlamaConfig(**shape)), model)
    expected = {}
    for ids in held_out:
        if len(ids) > 16:
            tokens = torch.tensor([1, *ids[:32].tolist()])
            with torch.no_grad():
                logits_TV = peer(tokens[None, :-1]).logits[0]
            expected[hash_of(ids)] = F.cross_entropy(logits_TV[16:], tokens[17:], reduction="sum").item()
    found = by_document(evaluate(model, data))
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for document, nats in expected.items():
        assert found[document] == pytest.approx(nats, abs=1e-4)


@pytest.mark.parametrize("masks", [MasksConfig(), MasksConfig(prefix="bidirectional")], ids=lambda m: m.prefix)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("length", "prefix"), [(None, None), (50, 7), (24, 0)])
def test_nats_are_those_of_a_forward_pass_over_each_document_alone(data, held_out, family, masks, length, prefix):
    model = model_of(family)
    found = evaluate(model, data, config(documents=1000, length=length, prefix_length=prefix), masks, batch_tokens=150)
    length, prefix = length or 32, 16 if prefix is None else prefix
    opened = {"prefix_length": prefix + 1} if family == "decllm" and masks.prefix == "bidirectional" else {}
    for ids in held_out:
        if len(ids) > prefix:
            # An empty source is one end-of-document token for the encoder, and nothing for a decoder.
            source = ids[:prefix] if prefix or family == "decllm" else [0]
            expected = plain_nats(model, source, ids[prefix:length], **opened).sum().item()
            assert by_document(found)[hash_of(ids)] == pytest.approx(expected, rel=1e-6)
    assert found.metrics["likelihood/documents"] == sum(len(ids) > prefix for ids in held_out) == len(found.rows)
    assert found.metrics["likelihood/skipped"] == sum(len(ids) <= prefix for ids in held_out)


def test_both_families_are_asked_for_the_same_tokens_of_the_same_documents(data):
    dec, red = (evaluate(model_of(family), data) for family in FAMILIES)
    without = [[{k: v for k, v in row.items() if k != "nats"} for row in found.rows] for found in (dec, red)]
    assert without[0] == without[1]
    assert by_document(dec) != by_document(red)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_give_the_same_nats(data, family):
    model = model_of(family, double=False)
    alone, some, all_ = (by_document(evaluate(model, data, batch_tokens=size)) for size in (1, 100, 10**6))
    assert list(alone) == list(some) == list(all_)
    for document, nats in alone.items():
        assert some[document] == pytest.approx(nats, rel=1e-5)
        assert all_[document] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_hold_no_more_tokens_than_asked_for_and_no_gradient(data, family, monkeypatch):
    model, seen = model_of(family), []
    forward = model.hidden

    def spied(*given, **inputs):
        seen.append(sum(v.numel() for k, v in inputs.items() if k in ("tokens_BT", "source_BS", "target_BT")))
        hidden = forward(*given, **inputs)
        assert not hidden.requires_grad
        return hidden

    monkeypatch.setattr(model, "hidden", spied)
    evaluate(model, data, batch_tokens=100)
    assert max(seen) <= 100
    assert sorted(seen)[len(seen) // 2] > 60, "and they are used"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bfloat16_says_about_the_same(data, family):
    exact = evaluate(model_of(family), data).metrics["likelihood/nll"]
    assert evaluate(model_of(family).bfloat16(), data).metrics["likelihood/nll"] == pytest.approx(exact, rel=0.02)


def test_a_model_that_would_drop_out_is_not_scored(data):
    with pytest.raises(AssertionError, match="training mode"):
        evaluate(model_of("decllm").train(), data)


# --- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_per_byte_of_the_uniform_distribution_are_those_of_counting(data, write, family):
    """ln 258 nats for every token; a byte for every token but the end of a document."""
    folder = write({"a": "0123456789", "b": "0123456789abcdef", "c": "01é", "d": "012"})
    text = {"kind": "text", "files": [f"{folder}/*"]}
    found = evaluate(uniform(family), data, config(length=12, prefix_length=4, corpora={"x": text}))
    by_length = sorted((row["tokens"], row["bytes"]) for row in found.rows if row["source"] == "x")
    # Without the first 4: 10 bytes and the end; 16 bytes, cut to 12; 4 bytes (é has two) and the end. d has no more.
    assert by_length == [(1, 0), (7, 6), (8, 8)]
    assert found.metrics["likelihood/skipped/x"] == 1
    assert found.metrics["likelihood/nll/x"] == pytest.approx(math.log(258), rel=1e-6)
    assert found.metrics["likelihood/perplexity"] == pytest.approx(258, rel=1e-6)
    assert found.metrics["likelihood/bits_per_byte/x"] == pytest.approx(16 * math.log2(258) / 14, rel=1e-6)


def test_of_one_source_there_is_nothing_to_tell_apart(data):
    found = evaluate(uniform("decllm"), data)
    kinds = ("nll", "perplexity", "bits_per_byte", "documents", "skipped")
    assert set(found.metrics) == {f"likelihood/{kind}" for kind in kinds}
    byte_count = sum(row["bytes"] for row in found.rows)
    bits = sum(row["tokens"] for row in found.rows) * math.log2(258)
    assert found.metrics["likelihood/bits_per_byte"] == pytest.approx(bits / byte_count, rel=1e-6)


def test_bytes_that_are_not_known_are_not_made_up(data, monkeypatch):
    monkeypatch.setattr(Bytes, "byte_lengths", lambda self: None)
    found = evaluate(uniform("decllm"), data)
    assert {row["bytes"] for row in found.rows} == {None}
    assert "likelihood/bits_per_byte" not in found.metrics
    json.dumps(found.rows)


def mixture_of(folders):
    sources = {
        name: {"corpus": {"kind": "text", "files": [f"{folder}/*.txt"]}, "weight": weight}
        for name, (folder, weight) in folders.items()
    }
    return {"kind": "mixture", "sources": sources}


def test_sources_are_told_apart_and_their_mean_weighs_them_alike(prepared, write):
    texts = {f"{n:02}.txt": f"{n:02}" * 30 for n in range(40)}
    short = {f"{n:02}.txt": f"{n:02}" + "x" * 18 for n in range(20)}
    data = prepared(mixture_of({"long": (write(texts), 1), "short": (write(short), 3)}), window=16)
    found = evaluate(model_of("decllm"), data)
    nll = {}
    for source in ("long", "short"):
        rows = [row for row in found.rows if row["source"] == source]
        nll[source] = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
        assert found.metrics[f"likelihood/documents/{source}"] == len(rows) > 3
    assert metrics(found, "nll/") == pytest.approx(nll, rel=1e-12)
    assert found.metrics["likelihood/mean_over_sources"] == pytest.approx(sum(nll.values()) / 2, rel=1e-12)
    every = sum(row["nats"] for row in found.rows) / sum(row["tokens"] for row in found.rows)
    assert found.metrics["likelihood/nll"] == pytest.approx(every, rel=1e-12)
    assert every != pytest.approx(sum(nll.values()) / 2)


# --- which documents -----------------------------------------------------------------------------------------------


def test_the_sample_does_not_depend_on_how_files_are_called_or_ordered(prepared, write, documents):
    """Nor on copies: a text that is there three times counts once."""
    names = {f"{n:02}.txt": text for n, text in enumerate(documents)}
    turned = {f"{99 - n}.txt": text for n, text in enumerate([*documents, *documents[:20], *documents[:20]])}
    one, other = (
        evaluate(model_of("decllm"), prepared({"kind": "text", "files": [f"{write(texts)}/*"]}), config(documents=7))
        for texts in (names, turned)
    )
    assert len(one.rows) == 7
    assert by_document(one) == by_document(other)


def test_documents_are_those_of_the_test_split_where_there_is_one(prepared, write, documents):
    folder = write({f"{number:02}.txt": text for number, text in enumerate(documents)})
    data = prepared({"kind": "text", "files": [f"{folder}/*.txt"]}, test=0.3)
    both = {
        split: likelihood(uniform("decllm"), ALL, data, MasksConfig(), batch_tokens=200, split=split)
        for split in ("validation", "test")
    }
    for split, found in both.items():
        held_out = {f"{content:016x}" for content in data.sources[0].contents(split).tolist()}
        assert 5 < len(by_document(found)) == len(held_out) - found.metrics["likelihood/skipped"]
        assert by_document(found).keys() <= held_out
    assert evaluate(uniform("decllm"), data) == both["test"]


def test_the_sample_is_the_same_under_every_tokenizer(write, documents, tmp_path):
    folder = write({f"{number:02}.txt": f"{text} " * 4 for number, text in enumerate(documents)})
    sampled = []
    for tokenizer in ("bytes", {"kind": "bpe", "vocabulary": 300}):
        config = DataConfig.model_validate(
            {
                "corpus": {"kind": "text", "files": [f"{folder}/*.txt"]},
                "tokenizer": tokenizer,
                "sequence_length": 8,
                "batch_size": 2,
                "test_fraction": 0.5,
            }
        )
        model, few = build("decllm", "vocabulary=300"), LikelihoodConfig(documents=6, prefix_length=1)
        found = likelihood(model, few, prepare(config, tmp_path), MasksConfig(), batch_tokens=200)
        sampled.append(list(by_document(found)))
    assert len(sampled[0]) == 6
    assert sampled[0] == sampled[1]


def test_a_smaller_sample_is_part_of_a_larger_one(data):
    sizes = [set(by_document(evaluate(model_of("decllm"), data, config(documents=n)))) for n in (1, 2, 5, 1000)]
    assert [len(documents) for documents in sizes[:3]] == [1, 2, 5]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_documents_longer_than_what_is_read_at_once_are_whole(data, chunk, monkeypatch):
    whole = evaluate(model_of("decllm"), data)
    monkeypatch.setattr(window_documents, "_CHUNK", chunk)
    assert evaluate(model_of("decllm"), data) == whole


def test_a_prefix_that_leaves_no_target_is_refused_before_the_model_is_asked(data):
    with pytest.raises(InputError) as caught:
        evaluate(None, data, config(length=95, prefix_length=94))
    (problem,) = caught.value.problems
    assert problem.key == "likelihood.prefix_length"
    assert "held-out documents of corpus has a token after a prefix of 94" in problem.message
    with pytest.raises(InputError, match=r"likelihood.prefix_length: a prefix of 40 tokens leaves no target .* to 32"):
        evaluate(None, data, config(prefix_length=40))


def test_what_is_left_open_comes_from_the_training_window():
    """Two configurations that mean the same have one identity."""
    assert ALL.resolved(64) == ALL.model_copy(update={"length": 64, "prefix_length": 32})
    assert config(length=10).resolved(64) == config(length=10, prefix_length=5).resolved(128)


# --- other texts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def red_pajama(write, documents):
    """One file of records, whose subsets alternate."""
    lines = [
        json.dumps({"text": f"{text} {text}!", "meta": {"red_pajama_subset": ("arxiv", "c4", "book")[n % 3]}})
        for n, text in enumerate(documents)
    ]
    return write({"all.jsonl": "\n".join(lines)}) / "all.jsonl"


def subset(path, *names):
    where = {"meta.red_pajama_subset": list(names)}
    return {"kind": "jsonl", "files": [str(path)], "where": where}


def test_domains_are_told_apart_by_where_and_all_their_documents_are_held_out(data, held_out, red_pajama, documents):
    corpora = {"arxiv": subset(red_pajama, "arxiv"), "others": subset(red_pajama, "c4", "book")}
    found = evaluate(uniform("redllm"), data, config(corpora=corpora))
    expected = {"arxiv": [], "others": [], "corpus": [hash_of(ids) for ids in held_out if len(ids) > 16]}
    for n, text in enumerate(documents):
        ids = [byte + 2 for byte in f"{text} {text}!".encode()] + [0]
        if len(ids) > 16:
            expected["others" if n % 3 else "arxiv"].append(hash_of(ids))
    said = [(row["source"], row["document"]) for row in found.rows]
    assert sorted(said) == sorted((name, document) for name in expected for document in expected[name])
    assert set(metrics(found, "nll/")) == set(metrics(found, "bits_per_byte/")) == {"arxiv", "others"}


def test_domains_change_nothing_in_the_figures_of_the_model_s_own_text(data, red_pajama):
    model, names = model_of("decllm"), ("arxiv", "c4", "book")
    own = evaluate(model, data)
    found = evaluate(model, data, config(corpora={name: subset(red_pajama, name) for name in names}))
    assert found.metrics.items() >= own.metrics.items()
    assert [row for row in found.rows if row["source"] == "corpus"] == own.rows
    nll = metrics(found, "nll/")
    assert set(nll) == set(names)
    assert found.metrics["likelihood/mean_over_corpora"] == pytest.approx(sum(nll.values()) / 3, rel=1e-12)
    assert "likelihood/mean_over_sources" not in found.metrics


def test_of_a_text_that_was_trained_on_only_what_was_held_out_there_is_read(prepared, write, red_pajama, tmp_path):
    """A copy of the file, under another name: what counts is what is in it."""
    data = prepared({"kind": "jsonl", "files": [str(red_pajama)]}, root=tmp_path)
    copy = write({"copy.jsonl": red_pajama.read_text()}) / "copy.jsonl"
    names = ("arxiv", "c4", "book")
    found = evaluate(model_of("decllm"), data, config(corpora={name: subset(copy, name) for name in names}))
    own = {row["document"] for row in found.rows if row["source"] == "corpus"}
    domains = [{row["document"] for row in found.rows if row["source"] == name} for name in names]
    assert set.union(*domains) == own
    (text,) = prepare_held_out(config(corpora={"x": data.config.corpus.model_dump(mode="json")}).corpora, data)
    assert text.folder != data.sources[0].folder
    assert text.count("train") == 0 < data.sources[0].count("train"), "what is not evaluated is not tokenised again"
    assert text.count("validation") == data.sources[0].count("validation")
    assert sum(map(len, domains)) == len(own) < 45


def test_other_texts_are_tokenised_once_and_opened_by_their_digests(data, red_pajama, monkeypatch):
    corpora = config(corpora={"b": subset(red_pajama, "c4"), "a": subset(red_pajama, "arxiv")}).corpora
    texts = prepare_held_out(corpora, data)
    digests = identify_held_out(corpora, data.config, data.tokenizer_folder.name)
    assert [text.name for text in texts] == ["a", "b"]
    assert open_held_out(digests, data) == texts
    assert {text.count("train") for text in texts} == {0}
    monkeypatch.setattr("lit_llm.data.prepare.write_shards", None)
    assert prepare_held_out(corpora, data) == texts
    model = model_of("decllm")
    given = likelihood(model, ALL, data, MasksConfig(), batch_tokens=200, corpora=texts)
    assert given == evaluate(model, data, config(documents=1000, corpora=json.loads(json.dumps(raw(corpora)))))


def raw(corpora):
    return {name: corpus.model_dump(mode="json") for name, corpus in corpora.items()}


def test_the_identity_of_other_texts_is_their_content_and_the_tokenizer(data, write):
    def digest(tokenizer="t", **texts):
        files = {"kind": "text", "files": [f"{write(texts)}/*"]}
        return identify_held_out(config(corpora={"x": files}).corpora, data.config, tokenizer)["x"]

    assert digest(a="one", b="two") == digest(c="one", d="two")
    assert len({digest(a="one"), digest(a="two"), digest(a="one", b="two"), digest("u", a="one")}) == 4


def test_the_identity_of_other_texts_is_had_without_torch(write):
    folder = write({"a.txt": "one", "b.txt": "two"})
    code = (
        "import sys; from lit_llm.data.config import DataConfig; from lit_llm.data.sources import identify_held_out\n"
        "from lit_llm.evaluation.config import LikelihoodConfig\n"
        "text = {'kind': 'text', 'files': (sys.argv[1] + '/a.txt',)}\n"
        "data = DataConfig(corpus=text, sequence_length=8, batch_size=1)\n"
        "corpora = LikelihoodConfig(corpora={'x': {'kind': 'text', 'files': (sys.argv[1] + '/b.txt',)}}).corpora\n"
        "print(len(identify_held_out(corpora, data, 't')['x']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16", "False"]


def test_what_is_wrong_with_other_texts_is_told_at_their_keys_all_at_once(data, red_pajama, tmp_path):
    corpora = {
        "gone": {"kind": "text", "files": [f"{tmp_path}/gone/*.txt"]},
        "nothing": subset(red_pajama, "wiki"),
        "corpus": subset(red_pajama, "c4"),
    }
    with pytest.raises(InputError) as caught:
        identify_held_out(config(corpora=corpora).corpora, data.config, "t")
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["corpora.corpus", f"corpora.gone.files: {tmp_path}/gone/*.txt", "corpora.nothing.where"]
    with pytest.raises(InputError, match="f:1: corpora.a.b: 'a.b' is not a plain name"):
        config(corpora={"a.b": subset(red_pajama, "c4")})


@pytest.mark.parametrize("wrong", [{"documents": 0}, {"length": 1}, {"prefix_length": -1}, {"corpora": {"a": 1}}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        LikelihoodConfig(**wrong)
