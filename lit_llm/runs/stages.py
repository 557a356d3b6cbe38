"""Execution of each kind of stage, from its frozen configuration and its parent's weights to a result."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.examples import ExampleSet
from lit_llm.data.prepare import Prepared, open_held_out, open_prepared
from lit_llm.evaluation.attention import attention_analysis
from lit_llm.evaluation.documents import likelihood
from lit_llm.evaluation.examples import HeldOutExamples, example_losses
from lit_llm.evaluation.extrapolation import extrapolation
from lit_llm.evaluation.result import EvaluationResult, Progress
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.experiment.cost import cost_of, example_flops, whole_steps
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.runs.provenance import provenance
from lit_llm.runs.stage_config import StageConfig
from lit_llm.runs.stage_data import finetuning_data, pretraining_data
from lit_llm.runs.stage_training import Control, StageTraining, Start
from lit_llm.runs.trained_model import open_finished, trunk_before
from lit_llm.runs.warm_start import load_source_weights
from lit_llm.store.store import SCHEMA, MetricsFile, Stage, Store, write_text
from lit_llm.training.fit import accelerator_of
from lit_llm.training.throughput import StepCost


def pretrain(frozen: StageConfig, stage: Stage, store: Store, control: Control) -> dict[str, Any]:
    """Train an experiment's `pretrain` section, from random weights or from those of other models; or its trunk.

    After a trunk it goes on from the trunk's last checkpoint, as if it had been interrupted there.
    """
    experiment, section = frozen.experiment, frozen.experiment.pretrain
    torch.set_num_threads(section.training.execution.threads)
    data = pretraining_data(experiment, open_prepared(section.data, store.data, frozen.data))
    size = section.data.batch_size * section.data.sequence_length
    cost = cost_of(experiment)
    before, steps = cost.before, (section.whole_batches, whole_steps(experiment))
    step_cost = StepCost(size, cost.flops_per_step, before.tokens, before.train_flops, *steps)
    model = build_model(experiment.model, experiment.seed)
    warm_start, weights = load_source_weights(model, frozen, store)
    trunk = trunk_before(frozen, store)
    if trunk is not None and frozen.kind == "pretrain":
        weights = (trunk.result() or {}).get("weights")
    start = Start(model, weights, warm_start, trunk)
    return StageTraining(frozen, stage, start, data, step_cost, control).run()


def finetune(frozen: StageConfig, stage: Stage, store: Store, control: Control) -> dict[str, Any]:
    """Train an experiment's `finetune` section from the weights of its pretraining."""
    experiment, section = frozen.experiment, frozen.experiment.finetune
    assert section is not None
    torch.set_num_threads(section.training.execution.threads)
    examples = _examples(frozen, store)
    data = finetuning_data(experiment, _text(frozen, store), examples)
    step_cost = _mean_step_cost(experiment, examples)
    finished = open_finished(store, frozen.parent)
    start = Start(finished.model, finished.weights)
    return StageTraining(frozen, stage, start, data, step_cost, control).run()


def evaluate(frozen: StageConfig, stage: Stage, store: Store, control: Control) -> dict[str, Any]:
    """Run one evaluation of a finished stage."""
    started = time.time()
    config, section = frozen.experiment.evaluate, frozen.experiment.section(frozen.after)
    assert config is not None
    before = store.stage(frozen.parent).result()
    assert before is not None
    result = {
        "schema": SCHEMA,
        "stage": "evaluate",
        "after": frozen.after,
        "evaluation": frozen.evaluation,
        "state": "done",
        "error": None,
        "steps": before["steps"],
        "parameters": before["parameters"],
        "started": started,
        "provenance": provenance(frozen.experiment, frozen.after, evaluates=True, weights=before.get("weights")),
    }
    if control.should_stop():
        return result | {"state": "interrupted", "error": "it was asked to stop"}
    torch.set_num_threads(section.training.execution.threads)
    model = open_finished(store, frozen.parent).model
    device = torch.device(accelerator_of(section.training.execution.accelerator))
    model.to(device)
    low = config.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
        evaluation = _run_evaluation(frozen, store, model, control.report_progress(stage))
    write_text(stage.rows_file, "".join(json.dumps(row) + "\n" for row in evaluation.rows), True, stage.check_claim)
    file = MetricsFile(stage.metrics_file)
    file.append(before["steps"], evaluation.metrics)
    file.close()
    finished = time.time()
    return result | {"metrics": evaluation.metrics, "finished": finished, "seconds": {"evaluation": finished - started}}


STAGES = {"trunk": pretrain, "pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}
"""{kind of a stage: its function}."""


def _run_evaluation(frozen: StageConfig, store: Store, model: LanguageModel, progress: Progress) -> EvaluationResult:
    """The evaluation, by its name in the configuration."""
    name, experiment, config = frozen.evaluation, frozen.experiment, frozen.experiment.evaluate
    assert config is not None
    masks, data = experiment.section(frozen.after).masks, _text(frozen, store)
    batch, text = config.batch_tokens, experiment.pretrain
    # Instructions have no mode tokens, so a finetuned model is evaluated without them.
    before = text.objective.opening(text.data.sequence_length, text.data.tokenizer.vocabulary)
    opening = before if frozen.after == "pretrain" else ()
    if config.likelihood is not None and name == "likelihood":
        corpora = open_held_out(frozen.texts, data)
        return likelihood(
            model,
            config.likelihood,
            data,
            masks,
            batch_tokens=batch,
            progress=progress,
            corpora=corpora,
            opening=opening,
            split=config.split,
        )
    if config.extrapolation is not None and name == "extrapolation":
        return extrapolation(
            model,
            config.extrapolation,
            data,
            masks,
            batch_tokens=batch,
            progress=progress,
            opening=opening,
            split=config.split,
        )
    if config.attention is not None and name == "attention":
        return attention_analysis(
            model, config.attention, data, masks, batch_tokens=batch, progress=progress, split=config.split
        )
    if (tasks := config.tasks) is not None and name == "tasks":
        from lit_llm.evaluation.harness import evaluate_tasks  # its library is an extra

        if frozen.tasks and tasks.folder and read_task_files(Path(tasks.folder)) != frozen.tasks:
            message = f"{tasks.folder} has changed since the study was planned; give `run` the study's file"
            raise InputError(Problem(message, "evaluate.tasks.folder"))
        return evaluate_tasks(
            model,
            data.tokenizer(),
            tasks.names,
            max_length=tasks.max_length or data.config.sequence_length,
            shots=tasks.shots,
            masks=masks,
            limit=tasks.limit,
            include_path=Path(tasks.folder) if tasks.folder else None,
            batch_tokens=batch,
        )
    assert config.examples is not None
    assert name == "examples"
    byte_lengths = data.tokenizer().byte_lengths()
    examples = _examples(frozen, store)
    split = examples.evaluated_split(config.split)
    held_out = HeldOutExamples(examples, config.examples.examples, masks, byte_lengths, split)
    return example_losses(model, held_out, batch_tokens=batch, progress=progress)


def _text(frozen: StageConfig, store: Store) -> Prepared:
    return open_prepared(frozen.experiment.pretrain.data, store.data, frozen.data)


def _examples(frozen: StageConfig, store: Store) -> ExampleSet:
    return ExampleSet(store.data, frozen.examples, frozen.experiment.pretrain.data.tokenizer)


_SAMPLE = 1000
"""Number of examples whose mean cost stands for all."""


def _mean_step_cost(experiment: Experiment, examples: ExampleSet) -> StepCost:
    """Mean cost of a step, without padding."""
    assert experiment.finetune is not None
    lengths, size = examples.sample_of_lengths("train", _SAMPLE), experiment.finetune.data.batch_size
    tokens = sum(source + target for source, target in lengths) / len(lengths)
    flops = sum(example_flops(experiment, *pair) for pair in lengths) / len(lengths)
    return StepCost(round(size * tokens), size * flops)
