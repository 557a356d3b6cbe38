"""The evaluation of a finished stage: each part once, resumed where it stopped, the same whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.ablation.run import Watcher, prepare_data
from lit_llm.config.problems import InputError
from lit_llm.evaluation import scoring
from lit_llm.experiment.chain import chain
from lit_llm.experiment.finished import open_finished
from lit_llm.experiment.frozen import freeze
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.run import run_one
from lit_llm.generation import Sampling, generate
from lit_llm.tracking.store import Stage, Store, read_json, write_json

EVERY = (
    "{after: [pretrain], likelihood: {documents: 9}, extrapolation: {lengths: [1, 2], sequences: 3}, "
    "attention: {sequences: 2, sensitivity_sequences: 1, steps: [1, 4], draws: 2}}"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def trained(store, corpus):
    """trained(preset, overrides) -> (experiment, its links by name); the pretraining is done, the rest frozen."""

    def made(preset="decllm-tiny", *overrides):
        small = [
            "model.d_model=16", "model.vocabulary=258", "model.attention.heads=2", "model.feed_forward.d_ff=32",
            f'pretrain.data.corpus={{kind: text, files: ["{corpus}/*.txt"]}}', "pretrain.data.tokenizer=bytes",
            "pretrain.data.sequence_length=32", "pretrain.data.batch_size=4", "pretrain.training.max_steps=6",
            "pretrain.data.validation_fraction=0.3", "pretrain.training.schedule.warmup_steps=2",
            "pretrain.validation.times=1", "pretrain.validation.sequences=8", f"evaluate={EVERY}", *overrides,
        ]  # fmt: skip
        experiment = load_experiment(preset, small)
        store.open()
        prepare_data([experiment], store, Watcher())
        links = {link.name: link for link in chain(experiment)}
        for link in links.values():
            freeze(store, link, experiment)
        assert run_one(store.root, links["pretrain"].fingerprint) == "done"
        return experiment, links

    return made


def evaluated(store: Store, links) -> Stage:
    return store.stage(links["evaluate after pretrain"].fingerprint)


@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_what_is_interrupted_goes_on_with_what_is_left(store, trained, preset):
    _, links = trained(preset)
    stage = evaluated(store, links)
    asked = iter([False, False, True])  # once by the claim, once before each evaluation
    assert run_one(store.root, stage.fingerprint, lambda: next(asked)) == "interrupted"
    assert stage.result() is None
    first = stage.folder / "evaluations" / "likelihood.json"
    assert [path.name for path in sorted(first.parent.glob("*.jsonl"))] == ["likelihood.jsonl"]
    written = first.stat().st_mtime_ns
    assert run_one(store.root, stage.fingerprint) == "done"
    assert first.stat().st_mtime_ns == written
    metrics = stage.result()["metrics"]
    assert {name.partition("/")[0] for name in metrics} == {"likelihood", "extrapolation", "attention"}
    rows = [json.loads(line) for line in (first.parent / "likelihood.jsonl").read_text().splitlines()]
    assert metrics["likelihood/nll"] == pytest.approx(sum(r["nats"] for r in rows) / sum(r["tokens"] for r in rows))


def test_what_other_code_has_begun_is_not_gone_on_with(store, trained):
    _, links = trained("decllm-tiny", "seed=3")
    stage = evaluated(store, links)
    asked = iter([False, False, True])
    run_one(store.root, stage.fingerprint, lambda: next(asked))
    folder = stage.folder / "evaluations"
    write_json(folder / "provenance.json", read_json(folder / "provenance.json") | {"code": "older"})
    write_json(folder / "likelihood.json", {"likelihood/nll": -1.0})
    assert run_one(store.root, stage.fingerprint) == "done"
    assert stage.result()["metrics"]["likelihood/nll"] > 0


def test_batches_change_no_number(store, trained, monkeypatch):
    """Beyond rounding: 1e-5 of a loss in float32."""
    batches: list[int] = []
    inner = scoring.lay_out

    def counted(sources, *rest):
        batches.append(len(sources))
        return inner(sources, *rest)

    monkeypatch.setattr(scoring, "lay_out", counted)
    found, longest = {}, {}
    for size in (32, 100, 5000):
        _, links = trained("redllm-tiny", "seed=1", f"evaluate.batch_tokens={size}")
        stage = evaluated(store, links)
        if stage.result() is not None:
            stage.forget()
            trained("redllm-tiny", "seed=1", f"evaluate.batch_tokens={size}")
        batches.clear()
        assert run_one(store.root, stage.fingerprint) == "done"
        found[size], longest[size] = stage.result()["metrics"], max(batches)
    assert longest[32] == 1 < longest[100] < longest[5000]
    for size in (32, 100):
        assert found[size] == pytest.approx(found[5000], rel=2e-5, abs=1e-5)


def test_bfloat16_moves_a_loss_by_less_than_a_hundredth(store, trained):
    """The bound: products have 8 bits of mantissa, so logits of size one are off by some thousandths."""
    losses = []
    for precision in ("fp32", "bf16"):
        only = "evaluate.extrapolation=null", "evaluate.attention=null"
        _, links = trained("decllm-tiny", "seed=2", f"evaluate.precision={precision}", *only)
        stage = evaluated(store, links)
        assert run_one(store.root, stage.fingerprint) == "done"
        losses.append(stage.result()["metrics"]["likelihood/nll"])
    assert 0 < abs(losses[1] - losses[0]) < 0.01 * losses[0]


def test_a_finished_stage_opens_with_its_weights_tokenizer_and_mask(store, trained):
    experiment, links = trained()
    finished = open_finished(store, links["pretrain"].fingerprint)
    assert finished.experiment == experiment
    assert finished.masks == experiment.pretrain.masks
    weights = load_file(store.stage(links["pretrain"].fingerprint).checkpoints / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in finished.model.state_dict().items())
    (text,) = finished.generate(["the a of"], 12, Sampling())
    ids = [byte + 2 for byte in b"the a of"]
    (expected,) = generate(finished.model, [ids], max_new_tokens=12)
    assert text == bytes(token - 2 for token in expected.tokens if token > 1).decode(errors="replace")


def test_what_has_no_weights_says_so(store, trained):
    _, links = trained()
    with pytest.raises(InputError, match="there is no stage 0123456789abcdef"):
        open_finished(store, "0123456789abcdef")
    with pytest.raises(InputError, match="is an evaluation of"):
        open_finished(store, links["evaluate after pretrain"].fingerprint)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("{tasks: {names: [x], folder: nowhere}}", "evaluate.tasks.folder: nowhere has no task files"),
        ("{tasks: {names: []}}", "evaluate.tasks.names: needs at least 1"),
        ("{likelihood: {prefix_length: 32}}", "evaluate.likelihood.prefix_length: a prefix of 32 tokens leaves no"),
        ("{extrapolation: {lengths: []}}", "evaluate.extrapolation.lengths: needs at least 1"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_anything_runs(corpus, evaluate, message):
    with pytest.raises(InputError) as error:
        chain(load_experiment("decllm-tiny", ["pretrain.data.sequence_length=32", f"evaluate={evaluate}"]))
    assert message in str(error.value)


def test_python_in_a_task_file_is_refused(tmp_path: Path):
    (tmp_path / "task.yaml").write_text("task: mine\nprocess_docs: !function code.run\n")
    section = f'{{tasks: {{names: [mine], folder: "{tmp_path}"}}}}'
    with pytest.raises(InputError, match="names Python code"):
        chain(load_experiment("decllm-tiny", [f"evaluate={section}"]))
