"""Entry points of worker processes of a study or a sweep: one stage, or the runs of one trial.

Both are in one module, so that one fork server can preload it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from lit_llm.components.registry import modules_of_parts
from lit_llm.launch import ask_coordinator, stop_requested
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.trainer_parts import TrainerParts, given
from lit_llm.store.disk import check_exists
from lit_llm.store.store import Store


def preloaded() -> list[str]:
    """Modules that every stage needs, imported once by the fork server."""
    return [__name__, "lit_llm.runs.stages", "safetensors.torch", *modules_of_parts()]


Judged = Literal["validations", "seeds"] | None
"""Question to the coordinator in a trial: after each validation of its first run, after each run, or never."""


def run_stage(root: Path, fingerprint: str, parts: TrainerParts = TrainerParts()) -> str:
    """Run one stage. Returns its state; "running" where another process works on it.

    parts: what Python adds to Lightning's Trainer, besides the user's settings. Raises DiskError for an error of the
    disk, or where the store is gone.
    """
    with given(parts):
        return run_one(root, fingerprint, should_stop=partial(_is_to_stop, Store(root)), waits=False)


def _is_to_stop(store: Store) -> bool:
    check_exists(store)  # before each step, and so before each checkpoint
    return stop_requested()


def run_trial(root: Path, fingerprints: Sequence[str], judged: Judged) -> tuple[str, bool]:
    """Run the runs of a trial, one after another. Returns (state of the last one, whether the trial was pruned)."""
    state: str = "done"
    for number, name in enumerate(fingerprints):
        pruned: list[bool] = []

        def should_prune(step: int, metrics: dict[str, float], pruned: list[bool] = pruned) -> bool:
            if ask_coordinator((step, metrics)):
                pruned.append(True)
            return bool(pruned)

        should_stop = partial(_is_to_stop, Store(root))
        state = run_one(root, name, should_stop, should_prune if judged == "validations" and number == 0 else None)
        if pruned and state == "interrupted":
            return state, True
        if state != "done":
            break
        if judged == "seeds" and number < len(fingerprints) - 1 and ask_coordinator((number, None)):
            return state, True
    return state, False
