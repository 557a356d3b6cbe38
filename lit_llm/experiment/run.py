"""Run one stage, by its fingerprint. What it needs lies in the store; what it finds is written there."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_llm.config.section import validate
from lit_llm.config.tree import read_file
from lit_llm.experiment.config import Experiment
from lit_llm.tracking.store import FINAL, SCHEMA, Busy, Stage, State, Store, read_json, write_json, write_text

if TYPE_CHECKING:
    from lit_llm.training.fit import Judge


def freeze(store: Store, fingerprint: str, experiment: Experiment, data: str) -> Stage:
    """Write a stage's configuration, so that no later edit of a file changes what will run."""
    stage = store.stage(fingerprint)
    content = {"stage": "pretrain", "data": data, "experiment": experiment.model_dump(mode="json")}
    write_text(stage.config_file, yaml.safe_dump(content, sort_keys=False))
    return stage


def frozen(stage: Stage) -> tuple[Experiment, str]:
    """The experiment and the data's digest of a frozen stage."""
    content = read_file(stage.config_file)
    return validate(Experiment, content.value["experiment"]), str(content.value["data"].plain())


def run_one(
    root: Path, fingerprint: str, should_stop: Callable[[], bool] = lambda: False, judge: Judge | None = None
) -> State:
    """Claim the stage, train it from where it stopped, write its result. Returns how it ended.

    Where another process works on it (another study that shares the stage), its result is waited for. Whatever goes
    wrong is the stage's state, not an exception. A stage that `judge` gives up is interrupted: it can be gone on with.
    """
    stage = Store(root).stage(fingerprint)
    while not should_stop():
        try:
            with stage.claim():
                return _run_claimed(stage, Store(root), should_stop, judge)
        except Busy:
            time.sleep(0.5)
    return "interrupted"


def _run_claimed(stage: Stage, store: Store, should_stop: Callable[[], bool], judge: Judge | None) -> State:
    before = stage.status()["state"]
    if before in (*FINAL, "failed", "out_of_memory"):
        return before  # somebody else, who shares this stage, has brought it to its end
    stage.set_state("running")
    try:
        result = pretrain(stage, store, should_stop, judge)
    except Exception as error:
        traceback.print_exc()  # into the run's log
        state: State = "out_of_memory" if ran_out_of_memory(error) else "failed"
        stage.set_state(state, f"{type(error).__name__}: {error}", traceback.format_exc())
        return state
    if result["state"] == "interrupted":
        stage.set_state("interrupted", result["error"])
    else:
        stage.finish(result)
        # Optimiser state is of use to a resume only, and there is none after a result.
        (stage.checkpoints / "last.ckpt").unlink(missing_ok=True)
    return result["state"]


def pretrain(stage: Stage, store: Store, should_stop: Callable[[], bool], judge: Judge | None) -> dict[str, Any]:
    """Train one experiment's `pretrain` section; the result as it is written to disk."""
    import torch
    from safetensors.torch import save_file

    from lit_llm.data.batches import TrainBatches
    from lit_llm.data.prepare import open_prepared
    from lit_llm.evaluation.likelihood import Validation
    from lit_llm.experiment.cost import cost_of
    from lit_llm.experiment.identity import provenance
    from lit_llm.models.build import build_model
    from lit_llm.training.fit import Budget, fit

    started = time.time()
    experiment, digest = frozen(stage)
    section, family = experiment.pretrain, experiment.model.family
    torch.set_num_threads(section.training.execution.threads)
    data = open_prepared(section.data, store.data, digest)
    cost, origin = cost_of(experiment), provenance(experiment)
    _start_over_unless_of(origin, stage)
    model = build_model(experiment.model, experiment.seed)
    fitted = fit(
        model,
        section.training,
        TrainBatches(data, section.objective, family, section.masks, experiment.seed),
        budget=Budget(section.data.batch_size * section.data.sequence_length, cost.flops_per_step),
        evaluate=Validation(section.validation, data, section.objective, family, section.masks),
        evaluate_times=section.validation.times,
        metrics_file=stage.metrics_file,
        checkpoints=stage.checkpoints,
        should_stop=should_stop,
        judge=judge,
    )
    if fitted.state == "done":
        save_file(model.state_dict(), stage.checkpoints / "model.safetensors")
    return {
        "schema": SCHEMA,
        "stage": "pretrain",
        "state": fitted.state,
        "error": fitted.error,
        "steps": fitted.steps,
        "metrics": fitted.metrics,
        "tokens": fitted.steps * section.data.batch_size * section.data.sequence_length,
        "loss_tokens": fitted.loss_tokens,
        "flops": fitted.steps * cost.flops_per_step,
        "parameters": cost.parameters,
        "seconds": fitted.seconds,
        "started": started,
        "finished": time.time(),
        "provenance": origin,
    }


def _start_over_unless_of(origin: dict[str, Any], stage: Stage) -> None:
    """A result is of one origin: a checkpoint of other code, threads or another device is not gone on from."""
    note = stage.checkpoints / "provenance.json"
    if (stage.checkpoints / "last.ckpt").exists() and read_json(note) != origin:
        print("the checkpoint was made by other code, threads or another device: starting over")
        shutil.rmtree(stage.checkpoints)
        stage.metrics_file.unlink(missing_ok=True)
    stage.checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(note, origin)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory was the reason, on a GPU or not."""
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text


def experiment_yaml(experiment: Experiment) -> str:
    """The full configuration as a file that `train` takes."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
