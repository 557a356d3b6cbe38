"""Runs one stage, by its fingerprint. Its inputs are in the store, and its results are written there."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.config.tree import to_yaml
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.stage_config import load_stage_config
from lit_llm.store.claims import Superseded
from lit_llm.store.disk import DiskError, disk_problem
from lit_llm.store.locks import Busy
from lit_llm.store.store import FINAL, Stage, State, Store

if TYPE_CHECKING:
    from lit_llm.training.fit import ShouldPrune


def run_one(
    root: Path,
    fingerprint: str,
    should_stop: Callable[[], bool] = lambda: False,
    should_prune: ShouldPrune | None = None,
    waits: bool = True,
) -> State:
    """Claim a stage, continue it from its checkpoint, write its result. Returns its state.

    If another process works on the stage, or takes it over, it waits for that result, or returns "running" at once
    without `waits`. Errors become the stage's state, not exceptions. A stage that `should_prune` stops is interrupted
    and can be continued.

    Raises DiskError for an error of the disk. The stage can then continue from its last checkpoint; its state may not
    have been written.
    """
    stage = Store(root).stage(fingerprint)
    while not should_stop():
        try:
            with stage.claim():
                return _run_claimed(stage, Store(root), should_stop, should_prune)
        except Busy:
            if not waits:
                return "running"
            time.sleep(0.5)
        except Superseded as reason:  # this process was stopped or cut off; nothing is recorded
            print(f"{reason}; this process gives the stage up", flush=True)
    return "interrupted"


def _run_claimed(
    stage: Stage, store: Store, should_stop: Callable[[], bool], should_prune: ShouldPrune | None
) -> State:
    before = stage.status()["state"]
    if before in (*FINAL, "failed", "out_of_memory"):
        return before  # another process has finished it
    try:
        stage.set_state("running")
        from lit_llm.runs.stage_training import Control
        from lit_llm.runs.stages import STAGES
        from lit_llm.training.checkpoints import remove_checkpoints

        frozen = load_stage_config(stage)

        def is_to_stop() -> bool:
            stage.check_lease()
            return should_stop()

        result = STAGES[frozen.kind](frozen, stage, store, Control(is_to_stop, should_prune))
        if result["state"] == "interrupted":
            stage.set_state("interrupted", result["error"])
        else:
            stage.finish({**result, "retries": stage.retries()})
            # Only a resume needs the optimiser state, and a result is final; branches begin with a trunk's.
            remove_checkpoints(stage.checkpoints, keep_last=stage.is_trunk)
    except Exception as error:
        return _record_error(error, stage, store, should_stop)
    return result["state"]


def _record_error(error: Exception, stage: Stage, store: Store, should_stop: Callable[[], bool]) -> State:
    """Record the error that ended a stage. Raises DiskError for an error of the disk, and Superseded."""
    if isinstance(error, DiskError | Superseded):  # the store is gone, and writing would create it anew; or not ours
        raise error
    state: State = "out_of_memory" if ran_out_of_memory(error) else "failed"
    message, problem = f"{type(error).__name__}: {error}", disk_problem(error, store.root)
    if problem is not None:
        with suppress(OSError):
            stage.set_state("interrupted", problem, traceback.format_exc())
        raise DiskError(problem) from error
    traceback.print_exc()  # into the run's log
    if should_stop():  # a batch system may have killed its data loaders
        state = "interrupted"
    stage.set_state(state, message, traceback.format_exc())
    return state


def ran_out_of_memory(error: BaseException) -> bool:
    """True where an error is a lack of memory, of a GPU or of the machine."""
    name, text = type(error).__name__, str(error)
    # On a GPU filled by other processes, creating the context or the libraries' memory fails.
    phrases = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or any(part in text for part in phrases)


def experiment_yaml(experiment: Experiment) -> str:
    """The full configuration as a file that `train` takes."""
    return to_yaml(experiment.model_dump(mode="json"))
