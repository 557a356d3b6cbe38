"""A stage of an experiment as a LightningModule and a LightningDataModule, for a Trainer of the user's own.

The steps, the order of the data and the evaluations are those of `lit-llm run`, by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection

from lit_llm.config.metrics import OBJECTIVE_LOSS, OF_SPLITS, SPLITS
from lit_llm.config.problems import InputError, Problem
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.data.examples import ExampleSet, prepare_examples
from lit_llm.data.prepare import open_prepared, prepare, tokenizer_folder
from lit_llm.evaluation.likelihood import batches_of_rank, logits_of
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.models.build import build_model
from lit_llm.objectives.collate import Batch
from lit_llm.runs.fingerprints import digest_of_data, digest_of_examples, identity_of_data
from lit_llm.runs.kernels import lengths_vary, training_of
from lit_llm.runs.stage_data import StageData, finetuning_data, pretraining_data
from lit_llm.store.store import DEFAULT, Store
from lit_llm.training.compiled_blocks import use_kernels
from lit_llm.training.fit import Evaluate, train_loader
from lit_llm.training.module import LitModel

Given = Experiment | str | Path | Mapping[str, Any]
"""An experiment, the name of a preset, the path of an experiment file, or an experiment's keys."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out split, which is measured at once."""

    evaluate: Evaluate
    target_batches: Callable[[], Sequence[Batch]]
    """Batches of the targets that are measured."""


class LitExperiment(LitModel):
    """A stage of an experiment that trains, as a LightningModule.

    >>> lit, data = LitExperiment("redllm-tiny"), LitData("redllm-tiny")
    >>> trainer = L.Trainer(**lit.trainer_options, callbacks=[EarlyStopping("val/target_nll")])
    >>> trainer.fit(lit, datamodule=data)
    >>> lit = LitExperiment.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)

    The weights are initial ones, for a finetuning too: load those of its pretraining into `lit.model`.

    It logs `train/loss`, `train/lr` and `stability/grad_norm` of steps, and the `val/` and `test/` metrics of a run. A
    loader of the user's own gives a `Batch` for each optimiser step; held-out batches are measured by their mean loss.

    The optimisation is automatic: Lightning steps the optimiser, and the Trainer's `gradient_clip_val` takes the place
    of the experiment's `clip_norm`. One batch is one step, whose mean is over all of its targets, so
    `accumulate_grad_batches` is refused; `micro_batch_size` cuts a batch.

    >>> accuracy = MulticlassAccuracy(lit.model.config.vocabulary, average="micro")
    >>> lit = LitExperiment("redllm-tiny", metrics=MetricCollection({"accuracy": accuracy}))  # val/accuracy
    """

    def __init__(self, experiment: Given, stage: Trained = "pretrain", metrics: MetricCollection | None = None) -> None:
        """Build the model with its initial weights. Raises InputError for an experiment that it cannot train.

        metrics: further metrics of held-out text. Their `update` gets the logits (N x V, float32) and the ids (N) of
        targets that count, in chunks; values have the names `val/...` and `test/...`.
        """
        experiment = experiment_of(experiment, stage)
        if experiment.adapt is not None:
            message = "begins with the weights of other runs, which only `lit-llm run` and `lit-llm train` load"
            raise InputError(Problem(message, "adapt"))
        training = training_of(experiment, stage)
        if training.precision == "bf16_master":
            message = "bf16_master keeps its trained weights in the optimiser, where this module cannot show them"
            raise InputError(Problem(f"{message}; use bf16 or fp32, or `lit-llm run`", f"{stage}.training.precision"))
        if training.weight_averaging is not None:
            message = "keeps its average in the optimiser, where this module cannot show it"
            advice = "use `lit-llm run`, or Lightning's callback EMAWeightAveraging"
            raise InputError(Problem(f"{message}; {advice}", f"{stage}.training.weight_averaging"))
        metrics = metrics or MetricCollection({})
        taken = sorted({metric.name for metric in OF_SPLITS}.intersection(metrics.keys(keep_base=True)))
        if taken:
            raise InputError(
                Problem(f"{', '.join(taken)}: a run's own metric has this name; choose another", "metrics")
            )
        super().__init__(build_model(experiment.model, experiment.seed).train(), training, experiment.seed)
        vary = lengths_vary(experiment, stage)
        use_kernels(self.model, training.execution.kernels, torch.cuda.is_available(), vary)
        self.save_hyperparameters({"experiment": experiment.model_dump(mode="json"), "stage": stage})
        self.experiment, self.times = experiment, experiment.section(stage).validation.times
        self.validation_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.validation_metrics = metrics.clone(prefix=SPLITS["validation"])
        self.test_metrics = metrics.clone(prefix=SPLITS["test"])

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer on which the numbers depend; it validates about as often as a run."""
        interval = self.training_config.max_steps // self.times
        return {**super().trainer_options, "val_check_interval": max(1, interval), "num_sanity_val_steps": 0}

    def report_step(self, norm: torch.Tensor) -> None:
        """Set the step's report, and log it."""
        super().report_step(norm)
        assert self.report is not None
        self.log_dict(self.report.metrics(), prog_bar=True, batch_size=self.report.targets)

    def validation_step(self, batch: Batch | HeldOut, batch_idx: int) -> None:
        self._evaluate(batch, "validation", self.validation_loss, self.validation_metrics)

    def test_step(self, batch: Batch | HeldOut, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_loss, self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        self._log(self.validation_metrics)

    def on_test_epoch_end(self) -> None:
        self._log(self.test_metrics)

    def _evaluate(self, batch: Batch | HeldOut, split: str, mean_loss: MeanMetric, metrics: MetricCollection) -> None:
        """Log the metrics of the held-out text: of all of it at once, or the mean loss over batches. Update the user's.

        Batches of a loader are this rank's; those of a held-out split are divided among ranks here.
        """
        if isinstance(batch, HeldOut):
            self.log_dict(batch.evaluate(self.model), on_step=False, on_epoch=True, batch_size=1)
            targets = batch.target_batches() if len(metrics) else ()
            _check_lists(metrics, len(targets), self.trainer.world_size)
            for number, counts in batches_of_rank(len(targets)):
                for logits_NV, ids_N in logits_of(self.model, targets[number].to(self.device)):
                    if counts:
                        metrics.update(logits_NV, ids_N)
            return
        for logits_NV, ids_N in logits_of(self.model, batch):
            mean_loss.update(cross_entropy(logits_NV, ids_N, reduction="none"))
            metrics.update(logits_NV, ids_N)
        self.log(f"{SPLITS[split]}{OBJECTIVE_LOSS.name}", mean_loss, on_step=False, on_epoch=True)

    def _log(self, metrics: MetricCollection) -> None:
        """Log the user's metrics over a whole split, reduced over ranks by torchmetrics."""
        self.log_dict(metrics.compute())
        metrics.reset()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, HeldOut):  # it moves its own batches, one at a time
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def _check_lists(metrics: MetricCollection, batches: int, ranks: int) -> None:
    """Raise InputError where a rank without a held-out batch would gather an empty list, which torchmetrics cannot."""
    names = [name for name, metric in metrics.items() if any(isinstance(s, list) for s in metric.metric_state.values())]
    if names and batches < ranks:
        message = (
            f"{', '.join(names)}: it keeps a list, to which each of {ranks} devices must add, and the held-out text "
            f"has {batches} batches; raise `validation.sequences`, or take a metric that keeps sums"
        )
        raise InputError(Problem(message, "metrics"))


class LitData(L.LightningDataModule):
    """Data of a stage of an experiment: the batches of a run, in its order, and its evaluations.

    Batch k depends on the seed and k alone, so a resumed training reads what an uninterrupted one would. Each held-out
    split is one item of its loader, since its metrics are sums over documents and sources. Tokens are kept in a store,
    where `lit-llm run` finds them too.
    """

    def __init__(self, experiment: Given, stage: Trained = "pretrain", store: str | Path = DEFAULT) -> None:
        """Read the experiment. Raises InputError where it is wrong."""
        super().__init__()
        self.experiment, self.trained_stage = experiment_of(experiment, stage), stage
        self.store = Store(store)
        content = {"experiment": self.experiment.model_dump(mode="json"), "stage": stage, "store": str(store)}
        self.save_hyperparameters(content)
        self._opened: StageData | None = None

    def prepare_data(self) -> None:
        """Tokenise the text and the examples, once. Raises InputError where they cannot be read."""
        experiment, root = self.experiment, self.store.data
        config, identity = experiment.pretrain.data, identity_of_data(experiment)
        prepare(config, root, identity=identity)
        if self.trained_stage == "finetune" and experiment.finetune is not None:
            folder, digest = tokenizer_folder(root, identity.tokenizer), digest_of_examples(experiment)
            prepare_examples(experiment.finetune.data, config.tokenizer, folder, root, digest)

    def setup(self, stage: str) -> None:
        experiment, root = self.experiment, self.store.data
        config = experiment.pretrain.data
        text = open_prepared(config, root, digest_of_data(experiment))
        if self.trained_stage == "pretrain":
            self._opened = pretraining_data(experiment, text)
        else:
            examples = ExampleSet(root, digest_of_examples(experiment), config.tokenizer)
            self._opened = finetuning_data(experiment, text, examples)

    @property
    def data(self) -> StageData:
        """Batches and evaluations, once they are set up."""
        if self._opened is None:
            raise RuntimeError("call prepare_data() and setup('fit') first, as a Trainer does")
        return self._opened

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None, "a Trainer decides the number of ranks and the step to begin with"
        return train_loader(self.data.batches, self.experiment.section(self.trained_stage).training, self.trainer)

    def val_dataloader(self) -> DataLoader[Any]:
        """One item: the evaluation that a run makes during training."""
        return self._loader("validation", self.data.evaluate)

    def test_dataloader(self) -> DataLoader[Any]:
        """One item: the evaluation of the test split that a run makes after its last step."""
        measure = self.data.measure
        if "test" not in self.data.held_out_splits:
            raise InputError(
                Problem("is 0, so that there is no test split", f"{self.trained_stage}.data.test_fraction")
            )
        return self._loader("test", lambda model: measure("test", model, lambda *_: None).metrics)

    def _loader(self, split: str, evaluate: Evaluate) -> DataLoader[Any]:
        items: Any = [HeldOut(evaluate, partial(self.data.target_batches, split))]  # a list is a dataset
        return DataLoader(items, batch_size=None)


def experiment_of(given: Given, stage: Trained) -> Experiment:
    """An experiment from its name, file or keys. Raises InputError with every problem, and for an absent stage."""
    if isinstance(given, Mapping):
        experiment = validate(Experiment, tree(given))
    else:
        experiment = given if isinstance(given, Experiment) else load_experiment(given)
    if stage not in experiment.trained:
        raise InputError(Problem(f"the experiment has no such section; it has {', '.join(experiment.trained)}", stage))
    return experiment
