"""An experiment in a Trainer of the user's: the bits of a run, with Lightning's callbacks, loggers and checkpoints."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity
from torchmetrics.wrappers import LambdaInputTransformer

from lit_llm import LitData, LitExperiment
from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.objectives.collate import Batch
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import load_stage_config, save_stage_config
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.runs.trained_model import open_finished
from lit_llm.store.store import Stage, Store
from lit_llm.studies.load import load_study
from lit_llm.training import compiled_blocks
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from tests.stages_in_parts import numbers, prepared_stage
from tests.training.test_step import uneven_batch

OVERRIDES = {
    "decllm-tiny": ["pretrain.training.dropout=0.2", "pretrain.training.execution.micro_batch_size=3"],
    "redllm-tiny": ["pretrain.training.precision=bf16", "pretrain.data.test_fraction=0.2"],
}
pytestmark = pytest.mark.filterwarnings("ignore")


class Trained(NamedTuple):
    """One experiment, trained by a run and in a Trainer of its own."""

    stage: Stage
    experiment: Experiment
    lit: LitExperiment
    data: LitData
    trainer: L.Trainer
    folder: Path


def trainer_of(lit: LitExperiment, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(
        **{**lit.trainer_options, **quiet, "log_every_n_steps": 1, **options},
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=CSVLogger(folder),
    )


@pytest.fixture(scope="module", params=OVERRIDES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Trained:
    folder = tmp_path_factory.mktemp("own_trainer")
    stage = prepared_stage(Store(folder / "store"), corpus, request.param, *OVERRIDES[request.param])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_one(folder / "store", stage.fingerprint) == "done"
    experiment = load_stage_config(stage).experiment
    lit, data = LitExperiment(experiment), LitData(experiment, store=folder / "store")
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1, monitor=None)
    trainer = trainer_of(lit, folder, checkpoints, LearningRateMonitor(), EarlyStopping("val/target_nll", patience=9))
    trainer.fit(lit, datamodule=data)
    torch.set_num_threads(threads)
    return Trained(stage, experiment, lit, data, trainer, folder)


def assert_equal_weights(lit: LitExperiment, expected: Mapping[str, torch.Tensor]) -> None:
    weights = lit.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_trainer_of_the_users_own_gives_the_weights_of_a_run_to_the_bit(trained: Trained) -> None:
    assert trained.trainer.global_step == 14
    assert_equal_weights(trained.lit, load_file(trained.stage.checkpoints / "model.safetensors"))


def test_the_test_metrics_are_those_that_the_run_measured_after_its_last_step(trained: Trained) -> None:
    torch.set_num_threads(1)
    if trained.experiment.pretrain.data.test_fraction == 0:
        with pytest.raises(InputError, match="test_fraction"):
            trained.trainer.test(trained.lit, datamodule=trained.data, verbose=False)
        return
    measured = trained.trainer.test(trained.lit, datamodule=trained.data, verbose=False)[0]
    of_run = (trained.stage.result() or {})["metrics"]
    expected = {name: value for name, value in of_run.items() if name.startswith("test/")}
    assert measured == pytest.approx(expected, rel=1e-6)  # Lightning keeps float32
    assert len(expected) >= 3


def test_loggers_get_the_metrics_of_the_run_and_the_monitor_the_rate_of_the_coming_step(trained: Trained) -> None:
    lines = list(csv.DictReader((Path(trained.trainer.logger.log_dir) / "metrics.csv").open()))
    rates = {int(line["step"]): float(line["train/lr"]) for line in lines if line["train/lr"]}
    of_run = {step - 1: values["train/lr"] for step, values in numbers(trained.stage)}
    assert len(rates) == 14
    assert {step: rates[step] for step in of_run} == pytest.approx(of_run)
    name = next(key for key in lines[0] if key.startswith("lr-"))
    monitored = {int(line["step"]): float(line[name]) for line in lines if line[name]}
    assert monitored == pytest.approx(rates)
    validated = [int(line["step"]) for line in lines if line["val/target_nll"]]
    assert validated == [3, 7, 11]
    assert all(line["val/perplexity"] for line in lines if line["val/target_nll"])


def test_a_training_goes_on_from_a_checkpoint_of_lightnings_to_the_same_bits(trained: Trained) -> None:
    torch.set_num_threads(1)
    lit = LitExperiment(trained.experiment)
    trainer = trainer_of(lit, trained.folder / "resumed")
    trainer.fit(lit, datamodule=LitData(trained.experiment, store=trained.folder / "store"),
                ckpt_path=trained.folder / "step=5.ckpt")  # fmt: skip
    assert_equal_weights(lit, load_file(trained.stage.checkpoints / "model.safetensors"))


def test_a_checkpoint_of_lightnings_holds_the_experiment(trained: Trained) -> None:
    loaded = LitExperiment.load_from_checkpoint(trained.folder / "step=10.ckpt")
    assert loaded.experiment == trained.experiment
    state = torch.load(trained.folder / "step=10.ckpt")["state_dict"]
    assert_equal_weights(loaded, {name.removeprefix("model."): value for name, value in state.items()})
    data = LitData.load_from_checkpoint(trained.folder / "step=10.ckpt")
    assert (data.experiment, data.store.root) == (trained.experiment, trained.folder / "store")


def test_early_stopping_ends_a_training_of_the_users_own(trained: Trained) -> None:
    lit = LitExperiment(trained.experiment)
    stopping = EarlyStopping("val/target_nll", patience=1, min_delta=100.0)
    trainer = trainer_of(lit, trained.folder / "stopped", stopping)
    trainer.fit(lit, datamodule=trained.data)
    assert trainer.global_step == 8  # the second evaluation is no better than the first by 100 nats


def batches_of(lit: LitExperiment) -> list[Batch]:
    return [uneven_batch("decoder"), next(uneven_batch("decoder").micro_batches(3))]


def test_batches_of_the_users_own_are_measured_by_their_mean_loss_over_all_targets(tmp_path: Path) -> None:
    """Judge: torch's cross-entropy over the targets of both batches, which differ in their number."""
    lit = LitExperiment("decllm-tiny")
    batches = batches_of(lit)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    measured = trainer_of(lit, tmp_path).validate(lit, loader, verbose=False)[0]
    with torch.no_grad():
        logits = torch.cat([lit.model(batch.inputs["tokens_BT"])[batch.weights.bool()] for batch in batches])
    targets = torch.cat([batch.targets[batch.weights.bool()] for batch in batches])
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert measured == {"val/objective_loss": pytest.approx(expected, rel=1e-5)}


class ByHand(L.Callback):
    """Steps a copy of the model with torch's clipping of the gradients that callbacks get, and checks the loss."""

    def __init__(self, clip: Callable[[Any], Any]) -> None:
        self.clip, self.changed = clip, 0

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        assert isinstance(lit, LitExperiment)
        self.peer = copy.deepcopy(lit.model)
        self.optimizer = build_optimizer(lit.training_config.optimizer, self.peer)

    def on_before_optimizer_step(self, trainer: L.Trainer, lit: L.LightningModule, optimizer: object) -> None:
        assert isinstance(lit, LitExperiment)
        for mine, parameter in zip(self.peer.parameters(), lit.model.parameters(), strict=True):
            mine.grad = None if parameter.grad is None else parameter.grad.clone()
        before = [mine.grad.clone() for mine in self.peer.parameters() if mine.grad is not None]
        self.clip(self.peer.parameters())
        after = [mine.grad for mine in self.peer.parameters() if mine.grad is not None]
        self.changed += not all(map(torch.equal, before, after))
        config = lit.training_config
        set_learning_rate(self.optimizer.param_groups, config.schedule.factor(trainer.global_step, config.max_steps))
        self.optimizer.step()

    def on_train_batch_end(self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, *_: object) -> None:
        assert isinstance(lit, LitExperiment)
        assert lit.report is not None
        assert outputs["loss"].item() == pytest.approx(lit.report.loss, rel=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_trainers_clipping_takes_the_place_of_the_experiments(tmp_path: Path, algorithm: str) -> None:
    """Judge: torch's clipping by hand, to the bit over two steps."""
    lit, limit = LitExperiment(load_experiment("decllm-tiny", ["pretrain.training.z_loss=0"])), 1e-3
    clips = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}
    hand = ByHand(lambda parameters: clips[algorithm](list(parameters), limit))
    trainer = trainer_of(lit, tmp_path, hand, max_steps=2, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    trainer.fit(lit, torch.utils.data.DataLoader(batches_of(lit), batch_size=None))
    assert trainer.global_step == hand.changed == 2
    assert_equal_weights(lit, hand.peer.state_dict())


def test_accumulation_of_lightnings_is_refused_as_it_would_average_means(tmp_path: Path) -> None:
    lit = LitExperiment("decllm-tiny")
    with pytest.raises(InputError, match=r"accumulate_grad_batches.*mean over all of their target tokens.*batch_size"):
        trainer_of(lit, tmp_path, accumulate_grad_batches=2).fit(
            lit, torch.utils.data.DataLoader(batches_of(lit), batch_size=None)
        )


def of_torchmetrics(lit: LitExperiment) -> MetricCollection:
    perplexity = LambdaInputTransformer(Perplexity(), lambda logits: logits[None], lambda ids: ids[None])
    accuracy = MulticlassAccuracy(lit.model.config.vocabulary, average="micro")
    return MetricCollection({"accuracy": accuracy, "peer_perplexity": perplexity})


def test_metrics_of_the_users_own_are_measured_over_all_targets_of_a_loader(tmp_path: Path) -> None:
    """Judge: torch, by hand."""
    lit = LitExperiment("decllm-tiny", metrics=of_torchmetrics(LitExperiment("decllm-tiny")))
    batches, trainer = batches_of(lit), trainer_of(lit, tmp_path)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    measured, again = (trainer.validate(lit, loader, verbose=False)[0] for _ in range(2))
    with torch.no_grad():
        logits = torch.cat([lit.model(batch.inputs["tokens_BT"])[batch.weights.bool()] for batch in batches])
    targets = torch.cat([batch.targets[batch.weights.bool()] for batch in batches])
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert measured == again  # each validation begins anew
    assert measured == pytest.approx(
        {
            "val/accuracy": (logits.argmax(-1) == targets).float().mean().item(),
            "val/peer_perplexity": loss.exp().item(),
            "val/objective_loss": loss.item(),
        },
        rel=1e-4,
    )


def test_metrics_of_the_users_own_are_measured_on_the_targets_of_a_run(trained: Trained) -> None:
    """Judge: torchmetrics' perplexity beside the run's."""
    torch.set_num_threads(1)
    lit = LitExperiment(trained.experiment, metrics=of_torchmetrics(trained.lit))
    lit.model.load_state_dict(trained.lit.model.state_dict())
    trainer = trainer_of(lit, trained.folder / "measured")
    (measured,) = trainer.validate(lit, datamodule=trained.data, verbose=False)
    assert measured["val/peer_perplexity"] == pytest.approx(measured["val/perplexity"], rel=1e-3)
    assert 0 < measured["val/accuracy"] < 1


def test_a_metric_with_the_name_of_a_runs_own_is_refused() -> None:
    with pytest.raises(InputError, match="metrics: perplexity: a run's own metric has this name"):
        LitExperiment("decllm-tiny", metrics=MetricCollection({"perplexity": Perplexity()}))


def test_a_finetuning_from_the_weights_of_a_run_gives_the_weights_of_its_second_stage(
    tmp_path: Path, write_two: Callable[..., Path]
) -> None:
    torch.set_num_threads(1)
    experiment = load_study(write_two("tuned", "arms: {dec: {extends: decllm-tiny}}", seeds=(0,))).arms[0].seeded(0)
    store = Store(tmp_path / "store")
    data = LitData(experiment, "finetune", store.root)
    data.prepare_data()
    nodes = [node for node in stage_graph(experiment) if node.kind != "evaluate"]
    stages = [save_stage_config(store.open(), node, experiment) for node in nodes]
    assert [run_one(store.root, stage.fingerprint) for stage in stages] == ["done", "done"]
    lit = LitExperiment(experiment, "finetune")
    lit.model.load_state_dict(open_finished(store, stages[0].fingerprint).model.state_dict())
    trainer = trainer_of(lit, tmp_path)
    trainer.fit(lit, datamodule=data)
    assert_equal_weights(lit, load_file(stages[1].checkpoints / "model.safetensors"))
    assert trainer.callback_metrics["val/target_nll/even"] > 0


def test_an_experiment_without_a_second_stage_has_no_module_of_it() -> None:
    with pytest.raises(InputError, match="finetune: the experiment has no such section; it has pretrain"):
        LitExperiment("decllm-tiny", "finetune")


def test_an_adaptation_is_refused_since_its_weights_are_in_other_runs() -> None:
    with pytest.raises(InputError, match="adapt: begins with the weights of other runs"):
        LitExperiment(load_experiment("redllm-tiny", ["adapt.from=decllm-tiny"]))


def test_master_weights_are_refused_since_the_model_has_only_their_bfloat16_copies() -> None:
    with pytest.raises(InputError, match=r"pretrain.training.precision: bf16_master keeps .*; use bf16 or fp32"):
        LitExperiment(load_experiment("decllm-tiny", ["pretrain.training.precision=bf16_master"]))
    with pytest.raises(InputError, match=r"pretrain.training.weight_averaging: keeps .*callback EMAWeightAveraging"):
        LitExperiment(load_experiment("decllm-tiny", ["pretrain.training.weight_averaging=ema"]))


def test_kernels_are_those_of_a_run_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment("decllm-tiny", ["pretrain.training.execution.kernels=flex"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="kernels: FlexAttention trains on a CUDA device, .* set kernels to auto"):
        LitExperiment(experiment)
    compiled: list[bool] = []
    monkeypatch.setattr(compiled_blocks, "kernel_obstacle", lambda kernels, on_gpu: "")
    monkeypatch.setattr(compiled_blocks, "compile_attention", lambda model, lengths_vary: compiled.append(lengths_vary))
    LitExperiment(experiment)
    assert compiled == [False]
