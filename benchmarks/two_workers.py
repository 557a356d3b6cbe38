"""Four single-thread runs, one at a time and two at a time: total seconds, and that both give the same bits.

python benchmarks/two_workers.py [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Finished, Observer, run_study
from lit_llm.studies.runs import Run

STUDY = """
study: workers
question: Do two workers beat one?
extends: decllm-tiny
base: {{pretrain: {{training: {{max_steps: {steps}, schedule: constant}}, validation: {{times: 1}}}}}}
seeds: [0, 1, 2, 3]
"""


class Stopwatch(Observer):
    """Times from the launch of the first run to the end of the last."""

    seconds = 0.0

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        self._began = time.perf_counter()

    def finished(self) -> None:
        self.seconds = time.perf_counter() - self._began


def timed(path: Path, store: Path, max_parallel: int) -> tuple[float, Finished]:
    watch = Stopwatch()
    finished = run_study(load_study(path), Store(store), observer=watch, max_parallel=max_parallel)
    return watch.seconds, finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "workers.yaml"
        path.write_text(STUDY.format(steps=steps))
        warm_up = folder / "warm_up.yaml"
        warm_up.write_text(STUDY.format(steps=1).replace("study: workers", "study: warm_up"))
        timed(warm_up, folder / "warm_up", 1)  # starts the fork server
        seconds: dict[int, list[float]] = {1: [], 2: []}
        losses: dict[int, list[float]] = {}
        for turn in range(3):
            for max_parallel, times in seconds.items():
                taken, finished = timed(path, folder / f"store-{turn}-{max_parallel}", max_parallel)
                times.append(taken)
                losses[max_parallel] = [run.last.result()["metrics"]["val/target_nll"] for run in finished.runs]  # type: ignore[index]
        assert losses[1] == losses[2], "the number of workers changed a result"
    one, two = (statistics.median(times) for times in seconds.values())
    print(json.dumps({"one_worker_s": round(one, 1), "two_workers_s": round(two, 1), "speed_up": round(one / two, 2)}))


if __name__ == "__main__":
    main()
