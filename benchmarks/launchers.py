"""Seconds per run of a tiny study by each launcher, in turns.

    python benchmarks/launchers.py [--runs 8] [--rounds 3] [--launchers local slurm]

Each launcher has one place with one run at a time. `run_seconds` is the time between the ends of two runs: two training
steps, a validation, and all that a run costs beside them. `start_seconds` is the rest: from the command to the end of
the first run, less one such time. SLURM is the cluster that this machine submits jobs to; a launcher that cannot serve
here is left out, with its reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

from run_overhead import STUDY, timing, write_corpus

from lit_llm.launch.engine import EngineError, Needs
from lit_llm.launch.settings import Launcher, engine_of, launch_settings
from lit_llm.store.store import Store
from lit_llm.studies.launched import Places
from lit_llm.studies.load import load_study
from lit_llm.studies.observer import Observer
from lit_llm.studies.run import run_study


def places_of(launcher: Launcher, store: Store) -> Places | None:
    """One place of a launcher; None for this machine. Raises EngineError where it cannot serve."""
    settings = launch_settings(store.root)
    engine = engine_of(launcher, settings)
    if engine is None:
        return None
    if reason := engine.obstacle(Needs()):
        raise EngineError(reason)
    return Places(launcher, engine, settings, Needs(), 1)


def measure(folder: Path, launcher: Launcher, number: int, seeds: list[int]) -> tuple[list[float], float]:
    """Run a study; returns the seconds between the ends of its runs, and those until the end of the first."""
    text = STUDY.format(corpus=f"{folder}/*.txt", seeds=seeds)
    path, store = folder / f"{launcher}{number}.yaml", Store(folder / "store")
    path.write_text(text.replace("study: overhead", f"study: {launcher}{number}"))
    ablation, places, began = load_study(path), places_of(launcher, store), time.time()
    finished = run_study(ablation, store, observer=Observer(), max_parallel=1, places=places)
    ends = sorted(timing(run)["finished"] for run in finished.runs)
    return [late - early for early, late in itertools.pairwise(ends)], ends[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launchers", nargs="+", choices=get_args(Launcher), default=get_args(Launcher))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        measure(folder, "local", 0, [0])  # tokenises, opens MLflow, starts the fork server
        seeds = itertools.count(1)
        walls: dict[str, list[float]] = {}
        starts: dict[str, list[float]] = {}
        for number in range(1, options.rounds + 1):
            for launcher in options.launchers:
                try:
                    between, first = measure(folder, launcher, number, list(itertools.islice(seeds, options.runs)))
                except EngineError as error:
                    print(f"{launcher} is left out: {error}", file=sys.stderr)
                    continue
                walls.setdefault(launcher, []).extend(between)
                starts.setdefault(launcher, []).append(first - statistics.median(between))
    table = {
        launcher: {
            "run_seconds": round(statistics.median(walls[launcher]), 3),
            "start_seconds": round(statistics.median(starts[launcher]), 1),
        }
        for launcher in walls
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
