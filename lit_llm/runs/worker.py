"""What a process does that the coordinator of a study or a sweep has started: one stage, or the runs of one trial.

Both lie here, below studies and sweeps, so that one fork server has what either needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from lit_llm.components.registry import modules_outside
from lit_llm.launch import ask_coordinator, stop_requested
from lit_llm.runs.run import run_one
from lit_llm.store.disk import check_exists
from lit_llm.store.store import Store


def preloaded() -> list[str]:
    """What every stage needs: imported once, by the server that the processes are forked from."""
    return [__name__, "lit_llm.runs.stages", *modules_outside()]


Judged = Literal["validations", "seeds"] | None
"""What the coordinator is asked about a trial: each validation of its first run, each finished run, or nothing."""


def run_stage(root: Path, fingerprint: str) -> str:
    """Run one stage. Returns how it ended. Raises DiskError where the disk is to blame, or the store is gone."""
    return run_one(root, fingerprint, should_stop=partial(_is_to_stop, Store(root)))


def _is_to_stop(store: Store) -> bool:
    check_exists(store)  # before each step, and so before each checkpoint
    return stop_requested()


def run_trial(root: Path, fingerprints: Sequence[str], judged: Judged) -> tuple[str, bool]:
    """Run the runs of a trial, one after another. Returns (how the last one ended, whether it was given up)."""
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
