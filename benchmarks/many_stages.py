"""Thousands of stages taken by hundreds of workers from one store, with deaths, a slow disk and wrong clocks.

    python benchmarks/many_stages.py [--stages 1000 10000 100000] [--workers 100] [--locks lease:20] [--deaths 0.01]

Each worker is a process with a host name and a clock of its own. It picks, claims and ends stages by the functions of
the store; the work itself is a pause. Some die in the middle of a stage, and a new worker takes their place, as a
cluster's queue does. In the end each stage must have one result, written once. Then `status --json` and `plan` are
timed for a study of the same number of runs (`--study`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llm.runs.provenance import provenance
from lit_llm.store import files, locks
from lit_llm.store import store as stores
from lit_llm.store.claims import Superseded, last_claim
from lit_llm.store.locks import VARIABLE, Busy
from lit_llm.store.store import FINAL, MetricsFile, Store
from lit_llm.studies import picking
from lit_llm.studies.load import load_study
from lit_llm.studies.picking import Picker
from lit_llm.studies.runs import runs_of


class CountingPicker(Picker):
    """A picker that counts its looks at stages."""

    looks = 0

    def _state(self, name: str) -> str | None:
        self.looks += 1
        return super()._state(name)


def behave_as_host(name: str, skew: float) -> None:
    """Give this process a host's name and clock."""
    clock, touch = time.time, os.utime

    def skewed_touch(path: Any, times: Any = None, **more: Any) -> None:
        touch(path, (time.time(), time.time()) if times is None and not more else times, **more)

    socket.gethostname = lambda: name
    time.time = lambda: clock() + skew
    os.utime = skewed_touch
    os.supports_fd.add(skewed_touch)


def slow_down(latency: float) -> None:
    """Let each look at a file, each written file and each look at a lock take longer, as on a remote disk."""

    def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            time.sleep(latency)
            return function(*arguments, **named)

        return call

    files.put_in_place = slowed(files.put_in_place)
    stores.read_json = picking.read_json = slowed(stores.read_json)
    stores.locked, picking.is_free = slowed(locks.locked), slowed(locks.is_free)


def work(store: Store, parents: dict[str, tuple[str, ...]], number: int, options: argparse.Namespace) -> None:
    """One worker, until all stages have ended. Writes its counts into the store."""
    chance = random.Random(f"{number} {os.getpid()}")
    behave_as_host(f"node{number % options.hosts}", chance.choice([-options.skew, 0.0, options.skew]))
    if options.latency:
        slow_down(options.latency)
    reasons: Counter[str] = Counter()
    with (store.root / "finished" / f"{number}-{os.getpid()}").open("a", buffering=1) as finished:
        began, pause = time.perf_counter(), 0.05
        picker = CountingPicker(store, parents, number / options.workers, store.root / "notes")
        picking_seconds = time.perf_counter() - began
        while not picker.over:
            began = time.perf_counter()
            name = picker.take()
            picking_seconds += time.perf_counter() - began
            if name is None:
                time.sleep(pause * chance.uniform(0.5, 1.5))
                pause = min(2 * pause, 2.0)
                continue
            pause, stage = 0.05, store.stage(name)
            try:
                with stage.claim():
                    if (state := stage.status()["state"]) in FINAL:
                        picker.ended(name, state)
                        continue
                    stage.set_state("running")
                    time.sleep(options.seconds * chance.uniform(0.5, 1.5))
                    if chance.random() < options.deaths:
                        os.kill(os.getpid(), signal.SIGKILL)
                    stage.finish({"state": "done"})
                    finished.write(name + "\n")
                    picker.ended(name, "done")
            except (Busy, Superseded) as reason:
                reasons[type(reason).__name__] += 1
                picker.put_back(name)
    content = {"picking_seconds": picking_seconds, "looks": picker.looks, "Busy": 0, "Superseded": 0, **reasons}
    (store.root / "counts" / f"{number}-{os.getpid()}").write_text(json.dumps(content))


def simulate(store: Store, names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Let all workers run, replace those that die, and check the end."""
    parents: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    for folder in ("finished", "counts"):
        (store.root / folder).mkdir()
    gc.collect()
    gc.freeze()
    began, deaths, running = time.perf_counter(), 0, dict[int, int]()

    def start(number: int) -> None:
        if (pid := os.fork()) == 0:
            try:
                work(store, parents, number, options)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        running[pid] = number

    for number in range(options.workers):
        start(number)
    started = time.perf_counter() - began
    while running:
        pid, status = os.wait()
        number = running.pop(pid)
        if os.WIFSIGNALED(status):
            deaths += 1
            start(number)
        elif os.WEXITSTATUS(status):
            raise SystemExit(f"worker {number} failed")
    whole = time.perf_counter() - began
    lines = [line for file in (store.root / "finished").iterdir() for line in file.read_text().splitlines()]
    assert Counter(lines) <= Counter(names), "a stage was computed twice"
    states = Counter(store.stage(name).status()["state"] for name in names)
    assert states == {"done": len(names)}, states
    claims = sum(claim.generation for name in names if (claim := last_claim(store.stage(name).folder)) is not None)
    counts = [json.loads(file.read_text()) for file in (store.root / "counts").iterdir()]
    return {
        "stages": len(names),
        "workers": options.workers,
        "results": states["done"],
        "claims": claims,
        "deaths": deaths,
        "seconds": whole,
        "seconds_to_start_workers": started,
        "picking_seconds_of_a_worker": statistics.median(each["picking_seconds"] for each in counts),
        "looks_of_a_worker": statistics.median(each["looks"] for each in counts),
        "looks": sum(each["looks"] for each in counts),
        "busy": sum(each["Busy"] for each in counts),
        "late_holders": sum(each["Superseded"] for each in counts),
    }


STUDY = """
study: many
question: How long do the commands take for a study of many runs?
extends: decllm-tiny
base:
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}"]}}, tokenizer: bytes}}
    training: {{max_steps: 2, schedule: {{warmup_steps: 1}}}}
    validation: {{times: 1, sequences: 16}}
grid: {{design: factorial, factors: {{pretrain.training.optimizer.lr: {levels}}}}}
seeds: {seeds}
"""


def time_commands(folder: Path, count: int) -> dict[str, float]:
    """Seconds of `status --json` and `plan` for a study of `count` runs with results, 10 seeds an arm."""
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"it was the best of times number {number} " * 200)
    levels = [round(1e-6 * (number + 1), 6) for number in range(max(count // 10, 1))]
    path, root = folder / "many.yaml", folder / "store"
    path.write_text(STUDY.format(corpus=f"{folder}/*.txt", seeds=list(range(10)), levels=levels))
    store = Store(root).open()
    ablation = load_study(path)
    runs = runs_of(ablation, store)
    origin = provenance(runs[0].experiment)
    for run in runs:
        file = MetricsFile(run.last.metrics_file)
        for step in range(1, 51):
            file.append(step, {"train/loss": 5.5 / step, "val/target_nll": 5.6 / step, "train/grad_norm": 1.0})
        file.close()
        metrics = {"train/loss": 0.11, "val/target_nll": 0.11}
        run.last.finish({"state": "done", "steps": 50, "metrics": metrics, "provenance": origin, "flops": 1e9})
    found = {}
    for words in (("plan",), ("status", "--json")):
        began = time.perf_counter()
        command = ["lit-llm", words[0], str(path), *words[1:], "--store", str(root)]
        subprocess.run(command, check=True, capture_output=True)
        found[f"{words[0]}_seconds"] = time.perf_counter() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.02, help="of the work of a stage")
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--locks", default="lease:20")
    parser.add_argument("--deaths", type=float, default=0.002, help="probability that a worker dies in a stage")
    parser.add_argument("--latency", type=float, default=0.001, help="seconds that each access to a file takes longer")
    parser.add_argument("--skew", type=float, default=5 * 3600.0, help="seconds by which clocks are wrong")
    parser.add_argument("--study", type=int, nargs="*", default=[], help="runs of studies that commands are timed on")
    parser.add_argument("--folder", type=Path, help="where the stores are made")
    options = parser.parse_args()
    os.environ[VARIABLE] = options.locks
    for count in options.stages:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            store = Store(Path(name) / "store").open()
            found = simulate(store, [f"{number:016x}" for number in range(count)], options)
        print(json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    for count in options.study:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            seconds = time_commands(Path(name), count)
        print(json.dumps({"runs": count, **{key: round(value, 2) for key, value in seconds.items()}}), flush=True)


if __name__ == "__main__":
    main()
