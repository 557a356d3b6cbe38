"""Execution of each kind of stage, from its frozen configuration and its parent's weights to a result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
from lit_llm.evaluation.final import FinalEvaluation
from lit_llm.evaluation.result import EvaluationResult, Progress
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.evaluation.unit_losses import write_losses
from lit_llm.experiment.cost import cost_of, example_flops, whole_steps
from lit_llm.experiment.schema import Experiment, Trained
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.runs.kernels import kernels_note, lengths_vary, training_of
from lit_llm.runs.provenance import provenance, same_provenance
from lit_llm.runs.ranks import LostRank, started_ranks
from lit_llm.runs.stage_config import StageConfig
from lit_llm.runs.stage_data import StageData, finetuning_data, pretraining_data
from lit_llm.runs.trained_model import end_of_trunk, open_finished, trunk_before, write_weights
from lit_llm.runs.trainer_parts import in_force
from lit_llm.runs.warm_start import load_source_weights
from lit_llm.store.files import Damaged, remove
from lit_llm.store.store import SCHEMA, MetricsFile, Stage, Store, finite, read_json, write_json, write_text
from lit_llm.training.config import ExecutionConfig, TrainingConfig
from lit_llm.training.devices import DeviceGroup
from lit_llm.training.fit import Evaluate, ShouldPrune, TrainResult, accelerator_of, fit
from lit_llm.training.module import WarmStart
from lit_llm.training.throughput import StepCost

ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Control:
    """What decides the end of a stage before its last step."""

    should_stop: ShouldStop = lambda: False
    should_prune: ShouldPrune | None = None
    follows: tuple[DeviceGroup, ExecutionConfig] | None = None
    """The group of a process that only helps another one, rank 0: it writes nothing, and rank 0 decides; with rank 0's
    execution settings."""


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
    return _train("pretrain", frozen, stage, model, data, step_cost, control, weights, warm_start, trunk)


def finetune(frozen: StageConfig, stage: Stage, store: Store, control: Control) -> dict[str, Any]:
    """Train an experiment's `finetune` section from the weights of its pretraining."""
    experiment, section = frozen.experiment, frozen.experiment.finetune
    assert section is not None
    torch.set_num_threads(section.training.execution.threads)
    examples = _examples(frozen, store)
    data = finetuning_data(experiment, _text(frozen, store), examples)
    step_cost = _mean_step_cost(experiment, examples)
    finished = open_finished(store, frozen.parent)
    return _train("finetune", frozen, stage, finished.model, data, step_cost, control, finished.weights)


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
        evaluation = _run_evaluation(frozen, store, model, _progress_of(stage, control))
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


def _progress_of(stage: Stage, control: Control) -> Progress:
    """A callback that writes the stage's progress file, at most twice a second."""
    if control.follows is not None:
        return lambda done, total: None
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            write_text(stage.progress_file, json.dumps({"done": done, "total": total}))

    return report


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


def _train(
    name: Trained,
    frozen: StageConfig,
    stage: Stage,
    model: LanguageModel,
    data: StageData,
    step_cost: StepCost,
    control: Control,
    weights: str | None = None,
    warm_start: WarmStart | None = None,
    trunk: Stage | None = None,
) -> dict[str, Any]:
    """Train one stage. Returns the result for result.json.

    weights: digest of the initial weights. trunk: the stage whose last checkpoint it goes on from.
    """
    started = time.time()
    experiment, section = frozen.experiment, frozen.experiment.section(name)
    branches = frozen.kind == "trunk"
    if control.follows is None:
        training = training_of(experiment, name)
    else:
        training = section.training.model_copy(update={"execution": control.follows[1]})
    final = FinalEvaluation(data.held_out_splits, data.measure, _progress_of(stage, control))
    additions = in_force().build(stage.folder / "lightning")
    for logger in additions.loggers:
        logger.log_hyperparams(experiment.model_dump(mode="json"))
    train = partial(
        fit,
        model,
        training,
        data.batches,
        step_cost=step_cost,
        evaluate=data.evaluate,
        final=final,
        evaluate_times=0 if branches else section.validation.times,
        metrics_file=stage.metrics_file,
        checkpoints=stage.checkpoints,
        trunk=lambda: None if trunk is None else end_of_trunk(trunk),
        branches=branches,
        warm_start=warm_start,
        lengths_vary=lengths_vary(experiment, name),
        additions=additions,
    )
    if control.follows is not None:
        train(group=control.follows[0])
        return {}
    origin = provenance(experiment, name, weights=weights)
    discard_other_provenance(
        origin, stage.checkpoints / "provenance.json", [stage.checkpoints, stage.metrics_file], stage.note
    )
    if note := kernels_note(experiment, name):
        stage.note(note)
    stage.progress_file.unlink(missing_ok=True)  # left by an attempt that stopped in its last evaluation
    began = time.perf_counter()
    initial: dict[str, float | None] = {}
    before = 0.0
    try:
        with started_ranks(stage, training.execution) as group:
            if trunk is None:
                initial = _before_training(model, section.training, data.evaluate, stage)
            else:  # measured before its first step, by the same windows
                initial = (trunk.result() or {}).get("initial", {})
            before = time.perf_counter() - began
            fitted = train(
                should_stop=control.should_stop,
                should_prune=control.should_prune,
                log=stage.note,
                check_claim=stage.check_claim,
                group=group,
            )
    except LostRank as lost:
        fitted = TrainResult("interrupted", 0, error=str(lost), seconds={"training": 0.0, "evaluation": 0.0})
    if fitted.stopped_by and branches:
        message = f"{fitted.stopped_by} ended the trunk at step {fitted.steps} of {training.max_steps}, before its end"
        raise RuntimeError(f"{message}, where branches begin; leave out the callback, or `schedule.branch_at`")
    if fitted.stopped_by:
        averaging = training.weight_averaging
        lacks = "" if averaging is None else averaging.shortfall(fitted.steps, training.max_steps)
        ended = f"{fitted.stopped_by} ended it at step {fitted.steps} of {training.max_steps}"
        stage.note(f"{ended}; {lacks}" if lacks else ended)
    digest = None
    if fitted.state == "done":
        digest = write_weights(stage, fitted.weights)
        if not branches:
            write_losses(stage.losses_file, final.losses, stage.check_claim)
    return {
        "schema": SCHEMA,
        "stage": frozen.kind,
        "state": fitted.state,
        "error": fitted.error,
        "stopped_by": fitted.stopped_by,
        "steps": fitted.steps,
        "metrics": fitted.metrics,
        "initial": initial,
        "weights": digest,
        "tokens": round(step_cost.batches(fitted.steps) * step_cost.tokens),
        "loss_tokens": fitted.loss_tokens,
        "flops": step_cost.whole_steps(fitted.steps) * step_cost.flops,
        "parameters": cost_of(experiment).parameters,
        "seconds": {**fitted.seconds, "evaluation": fitted.seconds["evaluation"] + before},
        "started": started,
        "finished": time.time(),
        "provenance": origin,
    }


def _before_training(
    model: LanguageModel, training: TrainingConfig, evaluate: Evaluate, stage: Stage
) -> dict[str, float | None]:
    """Evaluation of the model before its first step, computed like the later ones; kept over resumes."""
    kept = stage.checkpoints / "initial.json"
    try:
        if (initial := read_json(kept)) is not None:
            return initial
    except Damaged as damage:
        stage.note(f"{damage}; it is measured again")
        remove(kept)
    device = torch.device(accelerator_of(training.execution.accelerator))
    model.to(device).eval()
    # As after training: only `bf16` evaluates in low precision.
    low = training.precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
        measured: dict[str, float | None] = finite(evaluate(model))
    model.train()
    write_json(kept, measured, signed=True)
    return measured


def discard_other_provenance(
    origin: dict[str, Any], note: Path, made: Sequence[Path], log: Callable[[str], None] = print
) -> None:
    """Remove what other code, threads or another device has begun, as a result has one provenance.

    made: files and folders to remove where `note` records another provenance, or is damaged.
    """
    try:
        earlier, why = read_json(note) or {}, ""
    except Damaged as damage:
        earlier, why = {}, str(damage)
    # A run that is restarted with a smaller micro-batch keeps its checkpoint, unless the numbers depend on it.
    if any(path.exists() for path in made) and not same_provenance(earlier, origin):
        if why:
            log(f"{why}; starting over")
        else:
            print("this was begun by other code, threads or another device: starting over")
        for path in made:
            remove(path)
    write_json(note, origin, signed=True)
