"""The evaluation of a finished stage: each part once, resumed where it stopped, the same whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.config.problems import InputError
from lit_llm.evaluation import scoring
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.experiment.load import load_experiment
from lit_llm.generation import Sampling, generate
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.runs.trained_model import open_finished
from lit_llm.store.store import Stage, Store
from lit_llm.studies.observer import Observer
from lit_llm.studies.prepare_data import prepare_data

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
        prepare_data([experiment], store, Observer())
        nodes = {node.name: node for node in stage_graph(experiment)}
        for node in nodes.values():
            save_stage_config(store, node, experiment)
        assert run_one(store.root, nodes["pretrain"].fingerprint) == "done"
        return experiment, nodes

    return made


def evaluated(store: Store, nodes, name: str = "likelihood") -> Stage:
    return store.stage(nodes[f"{name} after pretrain"].fingerprint)


@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_every_evaluation_is_made_once_and_what_is_interrupted_goes_on(store, trained, preset):
    _, nodes = trained(preset)
    first, second = evaluated(store, nodes), evaluated(store, nodes, "extrapolation")
    assert run_one(store.root, first.fingerprint) == "done"
    asked = iter([False, True])  # once by the claim, once before it begins
    assert run_one(store.root, second.fingerprint, lambda: next(asked)) == "interrupted"
    assert second.result() is None
    assert not (second.folder / "rows.jsonl").exists()
    written = (first.folder / "result.json").stat().st_mtime_ns
    for stage in (first, second, evaluated(store, nodes, "attention")):
        assert run_one(store.root, stage.fingerprint) == "done"
    assert (first.folder / "result.json").stat().st_mtime_ns == written
    rows = [json.loads(line) for line in (first.folder / "rows.jsonl").read_text().splitlines()]
    nll = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    assert first.result()["metrics"]["likelihood/nll"] == pytest.approx(nll)
    assert all(name.startswith("extrapolation/") for name in second.result()["metrics"])


def test_batches_change_no_number(store, trained, monkeypatch):
    """Beyond rounding: 1e-5 of a loss in float32."""
    batches: list[int] = []
    inner = scoring.collate

    def counted(sources, *rest):
        batches.append(len(sources))
        return inner(sources, *rest)

    monkeypatch.setattr(scoring, "collate", counted)
    found, longest = {}, {}
    for size in (32, 100, 5000):
        _, nodes = trained("redllm-tiny", "seed=1", f"evaluate.batch_tokens={size}")
        found[size] = {}
        batches.clear()
        for name in ("likelihood", "extrapolation", "attention"):
            stage = evaluated(store, nodes, name)
            if stage.result() is not None:
                stage.forget()
            assert run_one(store.root, stage.fingerprint) == "done"
            found[size] |= stage.result()["metrics"]
        longest[size] = max(batches)
    assert longest[32] == 1 < longest[100] < longest[5000]
    for size in (32, 100):
        assert found[size] == pytest.approx(found[5000], rel=2e-5, abs=1e-5)


def test_bfloat16_moves_a_loss_by_less_than_a_hundredth(store, trained):
    """The bound: products have 8 bits of mantissa, so logits of size one are off by some thousandths."""
    losses = []
    for precision in ("fp32", "bf16"):
        only = "evaluate.extrapolation=null", "evaluate.attention=null"
        _, nodes = trained("decllm-tiny", "seed=2", f"evaluate.precision={precision}", *only)
        stage = evaluated(store, nodes)
        assert run_one(store.root, stage.fingerprint) == "done"
        losses.append(stage.result()["metrics"]["likelihood/nll"])
    assert 0 < abs(losses[1] - losses[0]) < 0.01 * losses[0]


def test_a_finished_stage_opens_with_its_weights_tokenizer_and_mask(store, trained):
    experiment, nodes = trained()
    finished = open_finished(store, nodes["pretrain"].fingerprint)
    assert finished.experiment == experiment
    assert finished.masks == experiment.pretrain.masks
    weights = load_file(store.stage(nodes["pretrain"].fingerprint).checkpoints / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in finished.model.state_dict().items())
    (text,) = finished.generate(["the a of"], 12, Sampling())
    ids = [byte + 2 for byte in b"the a of"]
    (expected,) = generate(finished.model, [ids], max_new_tokens=12)
    assert text == bytes(token - 2 for token in expected.tokens if token > 1).decode(errors="replace")


def test_what_has_no_weights_says_so(store, trained):
    _, nodes = trained()
    with pytest.raises(InputError, match="there is no stage 0123456789abcdef"):
        open_finished(store, "0123456789abcdef")
    with pytest.raises(InputError, match="is an evaluation of"):
        open_finished(store, nodes["likelihood after pretrain"].fingerprint)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("{tasks: {names: [x], folder: nowhere}}", f"evaluate.tasks.folder: {Path.cwd()}/nowhere has no task files"),
        ("{tasks: {names: []}}", "evaluate.tasks.names: needs at least 1"),
        ("{likelihood: {prefix_length: 32}}", "evaluate.likelihood.prefix_length: a prefix of 32 tokens leaves no"),
        ("{extrapolation: {lengths: []}}", "evaluate.extrapolation.lengths: needs at least 1"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_anything_runs(corpus, evaluate, message):
    with pytest.raises(InputError) as error:
        stage_graph(load_experiment("decllm-tiny", ["pretrain.data.sequence_length=32", f"evaluate={evaluate}"]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task: mine\nprocess_docs: !function code.run\n",
            "the tag !function is not allowed: a file is data, never code",
        ),
        ("task: mine\nprocess_docs: !%66unction code.run\n", "the tag !function is not allowed"),
        ("task: mine\ninclude: other.txt\n", "includes another file"),
        ("task: mine\nmetric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate runs code"),
        ("task: mine\nmetric_list: [{metric: ./mine}]\n", "is none of the harness's own"),
        ("task: mine\nclass: mine.Task\n", "names a class"),
        ("task: mine\ndataset_kwargs: {data_files: {test: /etc/hosts}}\n", "reads /etc/hosts, which is not in"),
        ("[1, 2]\n", "should be a mapping"),
        ("task: [\n", "this is not valid YAML"),
    ],
)
def test_a_task_file_that_names_code_or_other_files_is_refused(tmp_path: Path, text, message):
    (tmp_path / "task.yaml").write_text(text)
    section = f'{{tasks: {{names: [mine], folder: "{tmp_path}"}}}}'
    with pytest.raises(InputError) as error:
        stage_graph(load_experiment("decllm-tiny", [f"evaluate={section}"]))
    assert f"{tmp_path}/task.yaml:" in str(error.value)
    assert "evaluate.tasks.folder: " in str(error.value)
    assert message in str(error.value)


def test_task_files_that_are_not_text_are_refused(tmp_path: Path):
    (tmp_path / "task.yaml").write_bytes("task: mine\n".encode("utf-16"))
    with pytest.raises(InputError, match="task.yaml: evaluate.tasks.folder: cannot be read: 'utf-8' codec"):
        read_task_files(tmp_path)


def test_a_template_reaches_nothing_but_its_question(tmp_path: Path, trained, store):
    """The harness fills templates in with all of Python behind them; here a sandbox does."""
    pytest.importorskip("lm_eval")
    from lit_llm.evaluation.harness import evaluate_tasks

    (tmp_path / "data.jsonl").write_text(json.dumps({"inputs": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    made = tmp_path / "made"
    way_out = f"{{{{ cycler.__init__.__globals__.os.system('touch {made}') }}}}"
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/data.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": way_out, "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    _, nodes = trained()
    finished = open_finished(store, nodes["pretrain"].fingerprint)
    with pytest.raises(Exception, match="cycler|unsafe|cannot load"):
        evaluate_tasks(finished.model, finished.tokenizer, ["mine"], max_length=32, include_path=tmp_path)
    assert not made.exists()


def test_the_identity_of_task_files_does_not_depend_on_where_they_lie(tmp_path: Path):
    digests = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text("{}\n")
        files = f"{{data_files: {{test: {tmp_path}/{name}/data.jsonl}}}}"
        (tmp_path / name / "task.yaml").write_text(f"task: mine\ndataset_kwargs: {files}\n")
        digests.append(read_task_files(tmp_path / name))
    assert digests[0] == digests[1]
    (tmp_path / "there" / "data.jsonl").write_text("{} \n")
    assert read_task_files(tmp_path / "there") != digests[0]


def test_task_files_that_have_changed_since_the_plan_are_not_run(trained, store: Store, tmp_path: Path):
    (tmp_path / "task.yaml").write_text("task: mine\n")
    _, nodes = trained("decllm-tiny", f"evaluate={{tasks: {{names: [mine], folder: {tmp_path}}}}}", "seed=7")
    (tmp_path / "task.yaml").write_text("task: mine\nnum_fewshot: 3\n")
    assert run_one(store.root, nodes["tasks after pretrain"].fingerprint) == "failed"
    status = evaluated(store, nodes, "tasks").status()
    assert f"{tmp_path} has changed since the study was planned; give `run` the study's file" in status["error"]
