"""Answers: every family is asked the same questions, and the loss and the accuracy are of the answers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_llm.config.metrics import direction
from lit_llm.config.problems import InputError
from lit_llm.data.batches import TrainBatches
from lit_llm.data.prepare import Prepared, prepare
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.evaluation.likelihood import Validation
from lit_llm.experiment.cost import cost_of, shape_of
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.models.cost import Shape
from lit_llm.objectives.base import BOS
from lit_llm.objectives.config import Answers
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.store.store import Store
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.load import load_study

OPEN = "pretrain.masks.prefix=bidirectional"
FAMILIES = [("decllm-tiny", []), ("decllm-tiny", [OPEN]), ("redllm-tiny", []), ("yoco-tiny", [])]
TASK = "{kind: recall, pairs: 4, questions: 2, source_length: 12, keys: 6, values: 5}"
FUZZY = (
    "{kind: recall, pairs: 2, questions: 2, source_length: 15, keys: 6, values: 5, key_length: 2, value_length: 3}",
    "{kind: answers, split: 15, question: 2, answer: 3}",
    26,
)
COPYING = (
    "{kind: selective_copying, tokens: 5, source_length: 10, copied_symbols: 6}",
    "{kind: answers, split: 10, question: 0, answer: 5}",
    16,
)


def experiment_of(
    preset: str, *overrides: str, task: tuple[str, str, int] = (TASK, "{kind: answers, split: 12}", 17)
) -> Experiment:
    corpus, objective, length = task
    return load_experiment(
        preset,
        [
            "model.d_model=32", "model.vocabulary=16", "model.attention.heads=2", "model.feed_forward.d_ff=64",
            f"pretrain.data.corpus={{kind: synthetic, task: {corpus}, examples: 4000}}",
            "pretrain.data.tokenizer={kind: symbols, vocabulary: 14}", f"pretrain.data.sequence_length={length}",
            f"pretrain.objective={objective}", "pretrain.data.batch_size=8", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def data_of(experiment: Experiment, folder: Path) -> Prepared:
    return prepare(experiment.pretrain.data, folder)


def test_the_window_of_the_docstring() -> None:
    k1, v1, k2, v2 = 2, 3, 4, 5
    window = np.array([k1, v1, k2, v2, k2, v2, k1, v1, 0])
    made = Answers(split=4).example(window, np.random.default_rng(0), 6)
    assert (made.source.tolist(), made.target.tolist()) == ([k1, v1, k2, v2], [k2, v2, k1, v1])
    assert made.counted is not None
    assert made.target[made.counted].tolist() == [v2, v1]


@pytest.mark.parametrize("task", [(TASK, "{kind: answers, split: 12}", 17), FUZZY, COPYING], ids=["one", "some", "all"])
def test_every_family_predicts_the_same_answers_from_the_same_tokens(folder: Path, task: tuple[str, str, int]) -> None:
    """Each counted target as (what stands before it, the target), read off the inputs of each family."""
    asked = []
    for preset, overrides in FAMILIES:
        experiment = experiment_of(preset, *overrides, task=task)
        pretrain = experiment.pretrain
        data, family = data_of(experiment, folder), experiment.model.family
        batch = TrainBatches(data, pretrain.objective, family, pretrain.masks, seed=0).whole(3)
        found = []
        for row, place in batch.weights.nonzero().tolist():
            if family == "encoder_decoder":
                before = (
                    batch.inputs["source_BS"][row].tolist() + batch.inputs["target_BT"][row, 1 : place + 1].tolist()
                )
            else:
                before = batch.inputs["tokens_BT"][row, 1 : place + 1].tolist()
                assert batch.inputs["source_length"] == pretrain.objective.split + 1
                open_to = batch.inputs.get("prefix_length", 0)
                assert open_to == (pretrain.objective.split + 1 if overrides else 0)
            found.append((row, before, int(batch.targets[row, place])))
        asked.append(found)
        key = "target_BT" if family == "encoder_decoder" else "tokens_BT"
        assert (batch.inputs[key][:, 0] == BOS).all()
    assert asked[0]
    assert all(found == asked[0] for found in asked)


@pytest.mark.parametrize(("preset", "overrides"), FAMILIES)
def test_loss_and_accuracy_are_those_of_the_answers(folder: Path, preset: str, overrides: list[str]) -> None:
    """By the plain logits of single examples: values stand at the even places after the source's 12 tokens."""
    torch.set_num_threads(1)
    experiment = experiment_of(preset, *overrides, "pretrain.validation.sequences=60")
    data, pretrain = data_of(experiment, folder), experiment.pretrain
    model = build_model(experiment.model, 3).eval()
    family = experiment.model.family
    validation = Validation(pretrain.validation, data, pretrain.objective, family, pretrain.masks)
    found = validation(model)
    windows = torch.from_numpy(_windows(data))[np.arange(60) * _count(data) // 60]
    nats, right = [], []
    for window in windows:
        source, target = window[None, :12], window[None, 12:16]
        with torch.no_grad():
            if family == "encoder_decoder":
                logits = model(source, torch.cat([torch.full((1, 1), BOS), target[:, :-1]], 1))[0]
            else:
                rows = torch.cat([torch.full((1, 1), BOS), source, target[:, :-1]], 1)
                logits = model(rows, prefix_length=13 if overrides else None, source_length=13)[0, 12:]
        for place in (1, 3):
            nats.append(-logits[place].log_softmax(-1)[target[0, place]].item())
            right.append(logits[place].argmax().item() == target[0, place].item())
    assert found["val/target_nll"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["val/objective_loss"] == found["val/target_nll"]
    assert found["val/answer_accuracy"] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1  # some of each, so that both would show
    assert "val/bits_per_byte" not in found


def _count(data: Prepared) -> int:
    return data.sources[0].count("validation") // 17


def _windows(data: Prepared) -> np.ndarray:
    shards = data.open(data.sources[0], "validation")
    return shards.read(np.arange(_count(data)) * 17, 17)


@pytest.mark.parametrize(
    ("preset", "overrides", "shape"),
    [
        ("decllm-tiny", [], Shape(source=0, target=16, outputs=2, prefix=0, partial=13)),
        ("decllm-tiny", [OPEN], Shape(source=0, target=16, outputs=2, prefix=13, partial=13)),
        ("redllm-tiny", [], Shape(source=12, target=4, outputs=2)),
    ],
)
def test_the_plan_costs_all_tokens_and_the_logits_of_the_answers(
    preset: str, overrides: list[str], shape: Shape
) -> None:
    experiment = experiment_of(preset, *overrides)
    [(share, lengths)] = experiment.pretrain.objective.lengths(17)
    assert share == 1
    assert shape_of(experiment, lengths) == shape
    pretrain = experiment.pretrain
    assert cost_of(experiment).loss_tokens == 2 * pretrain.data.batch_size * pretrain.training.max_steps


def test_a_mixture_has_the_accuracy_of_each_difficulty(tmp_path: Path) -> None:
    sources = ", ".join(
        f"{name}: {{corpus: {{kind: synthetic, task: {TASK.replace('pairs: 4', f'pairs: {pairs}')}, examples: 1500}}, "
        f"weight: {weight}}}"
        for name, pairs, weight in (("few", 2, 3), ("many", 6, 1))
    )
    experiment = experiment_of("decllm-tiny", f"pretrain.data.corpus={{kind: mixture, sources: {{{sources}}}}}")
    data, pretrain = prepare(experiment.pretrain.data, tmp_path), experiment.pretrain
    validation = Validation(ValidationConfig(sequences=60), data, pretrain.objective, "decoder", pretrain.masks)
    found = validation(build_model(experiment.model).eval())
    few, many = (found[f"val/answer_accuracy/{name}"] for name in ("few", "many"))
    assert few != many
    assert found["val/answer_accuracy"] == pytest.approx(0.75 * few + 0.25 * many, rel=1e-12)
    assert direction("val/answer_accuracy/few") == direction("test/answer_accuracy") == "higher"


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("pretrain.objective=prefix_lm", "pretrain.objective", "{kind: answers, split: 12, question: 1, answer: 1}"),
        ("pretrain.objective={kind: answers, split: 10}", "pretrain.objective", "the recall task asks for"),
        ("pretrain.validation.prefix_length=8", "pretrain.validation.prefix_length", "a source of its own"),
        ("evaluate={likelihood: {}}", "evaluate", "reads symbols; compare test/answer_accuracy"),
        ("model.vocabulary=13", "model.vocabulary", "13 rows for a tokenizer of 14 tokens"),
    ],
)
def test_sections_that_need_a_text_or_another_objective_are_refused(override: str, key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        experiment_of("decllm-tiny", override)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in problem.message


def test_answers_and_their_accuracy_are_refused_for_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answers are those of a synthetic task"):
        load_experiment("decllm-tiny", ["pretrain.objective=answers"])
    file = tmp_path / "text.yaml"
    file.write_text(
        "study: text\nquestion: q\nextends: decllm-tiny\nseeds: [0]\narms: {one: {}}\n"
        "compare: {metric: test/answer_accuracy}\n"
    )
    (finding,) = [each for each in audit(load_study(file), built=False) if each.kind == "refused"]
    assert finding.key == "compare.metric"
    assert "use test/target_nll" in finding.message


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_a_small_model_learns_the_answers(tmp_path: Path, preset: str) -> None:
    """Eight facts: a guess is right in an eighth of the cases, and after three others by elimination in a fifth."""
    task = ("{kind: memorisation, facts: 8, questions: 4}", "{kind: answers, split: 1}", 10)
    experiment = experiment_of(
        preset, "pretrain.training.max_steps=200", "pretrain.training.optimizer.lr=0.01", "pretrain.validation.times=1",
        "model.vocabulary=20", "pretrain.data.tokenizer={kind: symbols, vocabulary: 19}", task=task,
    )  # fmt: skip
    store = Store(tmp_path)
    prepare(experiment.pretrain.data, store.data)
    stage = save_stage_config(store.open(), stage_graph(experiment)[0], experiment)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    result = stage.result()
    assert result is not None
    assert result["initial"]["val/answer_accuracy"] < 0.4
    assert result["metrics"]["test/answer_accuracy"] > 0.9
    assert result["loss_tokens"] == cost_of(experiment).loss_tokens


@pytest.mark.slow
def test_a_decoder_learns_to_recall(tmp_path: Path) -> None:
    """The pairs are new in each example; one of the source's values, drawn without the others, is right in 0.46."""
    recall = "{kind: recall, source_length: 8, pairs: 4, questions: 3, keys: 8, values: 8}"
    experiment = load_experiment(
        "decllm-tiny",
        [
            f"pretrain.data.corpus={{kind: synthetic, task: {recall}, examples: 60000}}", "model.vocabulary=24",
            "pretrain.data.tokenizer={kind: symbols, vocabulary: 19}", "pretrain.data.sequence_length=15",
            "pretrain.objective={kind: answers, split: 8}", "pretrain.data.batch_size=32",
            "pretrain.training.max_steps=1500", "pretrain.training.optimizer.lr=0.003", "pretrain.validation.times=1",
        ],
    )  # fmt: skip
    store = Store(tmp_path)
    prepare(experiment.pretrain.data, store.data)
    stage = save_stage_config(store.open(), stage_graph(experiment)[0], experiment)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    assert stage.result()["metrics"]["test/answer_accuracy"] > 0.9
