"""Runs a study from Python, in a notebook or a script, as `lit-llm run` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lit_llm.launch.settings import launch_settings
from lit_llm.report.pages.study import write_report
from lit_llm.report.progress.terminal import Progressing
from lit_llm.runs.trainer_parts import TrainerParts
from lit_llm.store.store import DEFAULT, Store
from lit_llm.studies.load import Ablation
from lit_llm.studies.parallelism import max_parallel
from lit_llm.studies.pending_stages import Rerun
from lit_llm.studies.run import Finished, run_study
from lit_llm.studies.stored import open_study


def run(
    study: str | Path | Ablation,
    overrides: Sequence[str] = (),
    *,
    store: str | Path = DEFAULT,
    jobs: int | None = None,
    only: str | None = None,
    rerun: Rerun | None = None,
    trainer: TrainerParts = TrainerParts(),
) -> Finished:
    """Run what is not done, resume what was interrupted, and compare, with live progress in a notebook or a terminal.

    Example:
        >>> finished = run("ablations/quickstart.yaml", ["pretrain.training.max_steps=40"])
        >>> finished.comparison.to_frame()

    Args:
        study: A study's file, its name in the store, a preset, or the result of `load_study`.
        overrides: Keys with values for every arm; not for the result of `load_study`, which has its own.
        store: Directory of results.
        jobs: Runs at once; by default as many as the GPUs or the cores allow.
        only: Pattern for names of arms or runs.
        rerun: `"failed"` or `"stale"`, to repeat such runs.
        trainer: Callbacks, loggers and so on, for Lightning's Trainer in every run.

    Returns:
        The runs and their comparison. `to_frame()` has the runs as a data frame, `comparison.to_frame()` the arms.

    Raises:
        InputError: As `run_study`, which has more options.
    """
    place = Store(store)
    ablation = study if isinstance(study, Ablation) else open_study(str(study), overrides, place)
    return run_study(
        ablation,
        place,
        observer=Progressing(Console(markup=False, emoji=False)),
        max_parallel=jobs or max_parallel(ablation, launch_settings(place.root).slots_per_device),
        only=only,
        rerun=rerun,
        report=write_report,
        trainer=trainer,
    )
