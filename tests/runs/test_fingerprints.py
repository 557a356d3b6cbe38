"""A fingerprint is what was computed: the same for the same computation, however and wherever it was written down."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lit_llm import load_experiment
from lit_llm.config.section import validate
from lit_llm.config.tree import read_yaml
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import pretrain_fingerprint
from lit_llm.runs.provenance import _instruction_set, provenance, provenance_digest, same_provenance


def write_corpus(folder, names=("a.txt", "b.txt", "c.txt"), texts=("one ", "two ", "three ")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_text(text * 20)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("identity"))


@pytest.fixture
def fingerprint(text):
    """fingerprint("a.b=1", ..., preset=...) of a tiny experiment on three small documents."""

    def of(*overrides, preset="redllm-tiny", files=f"{text}/*.txt"):
        corpus = json.dumps({"kind": "text", "files": [files]})
        small = [f"pretrain.data.corpus={corpus}", "pretrain.data.tokenizer=bytes"]
        return pretrain_fingerprint(load_experiment(preset, [*small, *overrides]))

    return of


def test_the_windows_that_the_last_evaluation_reads_count_not_the_key_that_says_so(fingerprint):
    """At least as many as those during training, 64 of them; eight times as many by themselves."""
    few, all_during = (fingerprint(f"pretrain.validation.final_sequences={count}") for count in (3, 64))
    assert few == all_during != fingerprint("pretrain.validation.final_sequences=65")
    assert fingerprint() == fingerprint("pretrain.validation.final_sequences=512")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.attention.kv_heads=4"],
        ["model.attention.kv_heads=null"],
        ["model.attention.head_dim=16"],
        ["model.attention.qkv_norm=[v, q, k]"],
        ["model.attention.qkv_norm=[q, k, v, v]"],
        ["model.attention.output_norm=head"],
        ["model.norm.function=rms_norm", "model.norm.scale=false"],
        ["pretrain.objective.split=64", "pretrain.data.sequence_length=128", "pretrain.validation.prefix_length=64"],
        ["pretrain.training.clip_norm=1"],
        ["pretrain.training.optimizer.lr=0.003"],
        ["pretrain.training.optimizer=adamw", "pretrain.training.optimizer.lr=3e-3"],
        ["pretrain.validation={}"],
        ["model.attention.rope=none", "model.attention.rope=continuous"],
    ],
    ids=" ".join,
)
def test_the_same_experiment_written_differently_has_the_same_name(fingerprint, overrides):
    assert fingerprint(*overrides) == fingerprint()


def test_a_default_of_all_or_the_same_override_everywhere_is_the_same_model(fingerprint):
    everywhere = ("encoder.attention", "decoder.self_attention", "decoder.cross_attention")
    assert fingerprint(*(f"model.{place}.output_norm=none" for place in everywhere)) == fingerprint(
        "model.attention.output_norm=none"
    )
    ranges = "model.encoder.layer_ranges={0: {attention: {rope: none}}, 1: {attention: {rope: none}}}"
    assert fingerprint(ranges) == fingerprint("model.encoder.attention.rope=none")


def test_the_order_of_keys_and_one_against_one_point_zero_do_not_matter():
    text = """
    {first}
    pretrain:
      data: {{sequence_length: 8, batch_size: 2, tokenizer: bytes, corpus: {{kind: text, files: [{here}]}}}}
      training: {{max_steps: 3, clip_norm: {one}, schedule: constant}}
    {second}
    """
    model = "model: {d_model: 8, vocabulary: 258, attention: {heads: 1}, feed_forward: {d_ff: 8}, decoder: {layers: 1}}"

    def of(**parts):
        return pretrain_fingerprint(validate(Experiment, read_yaml(text.format(here=__file__, **parts), "f")))

    assert of(first=model, second="seed: 0", one="1") == of(first="seed: 0", second=model, one="1.0")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "pretrain.training.optimizer.lr=1e-2",
        "pretrain.training.max_steps=301",
        "pretrain.training.precision=bf16",
        "pretrain.training.precision=bf16_master",
        "pretrain.training.dropout=0.1",
        "pretrain.training.attention_dropout=0.1",
        "pretrain.training.feed_forward_dropout=0.1",
        "pretrain.training.weight_averaging=ema",
        "pretrain.training.optimizer.lr_groups.embeddings=0.1",
        "pretrain.training.z_loss=0",
        "pretrain.data.sequence_length=64",
        "pretrain.data.batch_size=8",
        "pretrain.data.validation_fraction=0.5",
        "pretrain.data.tokenizer={kind: bpe, vocabulary: 300}",
        "pretrain.objective.split=random",
        "pretrain.objective.split=32",
        "pretrain.masks.intra_document=true",
        "pretrain.validation.prefix_length=32",
        "model.vocabulary=1025",
        "model.attention.output_norm=none",
        "model.attention.kv_heads=2",
        "model.decoder.cross_attention.rope=restart",
        "model.decoder.layer_ranges={1: {feed_forward: {d_ff: 128}}}",
        "model.tie_embeddings=none",
        "model.norm.scale=true",
    ],
)
def test_what_changes_the_result_changes_the_name(fingerprint, override):
    assert fingerprint(override) != fingerprint()


def test_partial_attention_changes_the_name_and_what_is_in_it_does_too(fingerprint):
    on, heads = "model.decoder.partial_attention=palm", "model.decoder.partial_attention.kv_heads=1"
    kinds = ([], [on], [on, heads], ["model.decoder.layer_ranges.1.partial_attention=palm"])
    names = [fingerprint("pretrain.objective=prefix_lm", *kind, preset="decllm-tiny") for kind in kinds]
    assert len(set(names)) == 4


def test_what_is_computed_with_one_seed_or_model_is_told_from_all_others(fingerprint):
    names = [
        fingerprint(f"seed={seed}", preset=preset) for seed in range(3) for preset in ("redllm-tiny", "decllm-tiny")
    ]
    assert len(set(names)) == 6


@pytest.mark.parametrize(
    "override",
    [
        "pretrain.training.execution.threads=2",
        "pretrain.training.execution.micro_batch_size=4",
        "pretrain.training.execution.activation_checkpointing=true",
        "pretrain.training.execution.workers=2",
        "pretrain.training.execution.accelerator=auto",
        "pretrain.training.execution.log_every=3",
    ],
)
def test_how_the_machine_does_it_is_not_in_the_name(fingerprint, override):
    assert fingerprint(override) == fingerprint()


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("training.dropout=0", True),
        ("training.dropout=0.1", False),
        ("training.attention_dropout=0.1", False),
        ("training.feed_forward_dropout=0.1", False),
        ("training.precision=bf16_master", False),
    ],
)
def test_another_micro_batch_is_another_origin_where_it_changes_the_result(override, same):
    def origin(size):
        pieces = f"pretrain.training.execution.micro_batch_size={size}"
        return provenance(
            load_experiment("redllm-tiny", [f"pretrain.{override}", pieces, "pretrain.data.batch_size=8"])
        )

    assert same_provenance(origin(4), origin(2)) is same
    assert (provenance_digest(origin(4)) == provenance_digest(origin(2))) is same
    assert same_provenance(origin("null"), origin(8))  # the whole batch, however it is written


@pytest.mark.parametrize(
    ("override", "same"), [("dropout=0", True), ("dropout=0.1", False), ("precision=bf16_master", False)]
)
def test_shared_rows_are_another_origin_where_they_change_the_result(override, same):
    """Beyond the last bits: dropout draws for each row, bfloat16 gradients are added row by row."""

    def origin(packing):
        data = f"examples: {{kind: jsonl, files: [a]}}, input_length: 8, target_length: 4, packing: {packing}"
        stage = f"finetune={{data: {{{data}, batch_size: 4}}, training: {{max_steps: 2, schedule: constant}}}}"
        return provenance(load_experiment("redllm-tiny", [stage, f"finetune.training.{override}"]), "finetune")

    assert same_provenance(origin("none"), origin("greedy")) is same


def test_another_bitsandbytes_is_another_origin_for_who_uses_it(monkeypatch):
    def origin(kind, installed):
        monkeypatch.setattr("lit_llm.runs.provenance.installed_version", lambda name: installed)
        return provenance(load_experiment("redllm-tiny", [f"pretrain.training.optimizer={kind}"])) | {"torch": "x"}

    assert not same_provenance(origin("adamw_8bit", "1"), origin("adamw_8bit", "2"))
    beside_muon = "{kind: muon, adamw: {kind: adamw_8bit}}"
    assert not same_provenance(origin(beside_muon, "1"), origin(beside_muon, "2"))
    assert same_provenance(origin("adamw", "1"), origin("adamw", "2"))


def test_a_cpu_with_other_bfloat16_instructions_is_another_device(monkeypatch):
    names = []
    for flags in ("avx2 avx512f", "avx2 avx512f avx512_bf16", "avx2 avx512f avx512_bf16 amx_bf16", "avx2"):
        monkeypatch.setattr("lit_llm.runs.provenance.cpu_flags", lambda flags=flags: {"fpu", *flags.split()})
        names.append(_instruction_set())
    assert len(set(names)) == 4


@pytest.mark.parametrize("kernels", ["liger", "fla"])
def test_a_result_of_installed_kernels_is_of_that_release(kernels, monkeypatch):
    def origin(kernels, installed):
        monkeypatch.setattr("lit_llm.runs.provenance.installed_version", lambda name: installed)
        overrides = [f"pretrain.training.execution.kernels={kernels}"]
        return provenance(load_experiment("redllm-tiny", overrides)) | {"torch": "x"}

    assert not same_provenance(origin(kernels, "1"), origin(kernels, "2"))
    assert same_provenance(origin("auto", "1"), origin("auto", "2"))


def test_a_result_of_fla_is_of_that_triton_and_of_its_rounding_in_float32(monkeypatch):
    def origin(triton="3.9.0", kernels="fla", rounding=None, precision="fp32"):
        versions = {"triton": triton, "torch": "2.13.0"}
        monkeypatch.setattr("lit_llm.runs.provenance.installed_version", lambda name: versions.get(name, "1"))
        monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
        if rounding:
            monkeypatch.setenv("TRITON_F32_DEFAULT", rounding)
        keys = {"execution.kernels": kernels, "precision": precision}
        return provenance(load_experiment("redllm-tiny", [f"pretrain.training.{key}={keys[key]}" for key in keys]))

    assert origin()["fla"] == "fla-core 1, triton 3.9.0, float32 products ieee"
    assert same_provenance(origin(), origin(rounding="ieee"))
    assert not same_provenance(origin(), origin(rounding="tf32"))
    assert not same_provenance(origin(), origin(triton="3.8.0"))
    assert same_provenance(origin(precision="bf16"), origin(precision="bf16", rounding="tf32"))
    assert same_provenance(origin(kernels="auto"), origin(triton="3.8.0", kernels="auto", rounding="tf32"))


def test_an_evaluation_that_generates_is_another_without_a_compiler(monkeypatch):
    def origin(tasks, path):
        monkeypatch.setattr("lit_llm.runs.provenance.compiler", lambda: path)
        evaluate = "evaluate={tasks: {names: [arc_easy]}}" if tasks else "evaluate={likelihood: {}}"
        return provenance(load_experiment("redllm-tiny", [evaluate]), evaluates=True)

    assert not same_provenance(origin(True, "/usr/bin/g++"), origin(True, None))
    assert same_provenance(origin(False, "/usr/bin/g++"), origin(False, None))


def test_where_a_corpus_lies_and_what_its_files_are_called_is_not_in_the_name(fingerprint, text, tmp_path, monkeypatch):
    moved = shutil.copytree(text, tmp_path / "elsewhere")
    renamed = write_corpus(tmp_path / "renamed", names=("1.md", "2.md", "3.md"))
    with_empty = write_corpus(tmp_path / "empty", ("a", "b", "c", "bb"), ("one ", "two ", "three ", ""))
    same = fingerprint()
    assert fingerprint(files=f"{moved}/*.txt") == same
    assert fingerprint(files=f"{renamed}/*") == same
    assert fingerprint(files=f"{with_empty}/*") == same  # an empty document is no document
    monkeypatch.chdir(moved.parent)
    assert fingerprint(files="elsewhere/*.txt") == same


def test_what_a_corpus_says_and_in_which_order_is_in_the_name(fingerprint, tmp_path):
    changed = write_corpus(tmp_path / "changed", texts=("one ", "two ", "threE "))
    swapped = write_corpus(tmp_path / "swapped", texts=("two ", "one ", "three "))
    fewer = write_corpus(tmp_path / "fewer", names=("a", "b"), texts=("one ", "two "))
    names = {fingerprint(files=f"{folder}/*") for folder in (changed, swapped, fewer)}
    assert len(names | {fingerprint()}) == 4


PROGRAM = """
import sys
from lit_llm import load_experiment
from lit_llm.runs.fingerprints import pretrain_fingerprint
print(pretrain_fingerprint(load_experiment("redllm-tiny", sys.argv[1:])))
"""


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_a_name_is_the_same_in_every_process(fingerprint, text, tmp_path, hash_seed):
    """Nothing in it may come from the order of a set or from an address in memory."""
    corpus = json.dumps({"kind": "text", "files": [f"{text}/*.txt"]})
    overrides = [f"pretrain.data.corpus={corpus}", "pretrain.data.tokenizer=bytes"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", PROGRAM, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == fingerprint()
