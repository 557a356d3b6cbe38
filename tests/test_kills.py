"""Kills at random moments, from the first migration of MLflow's database on: in the end a store holds what it would
have held without them, to the bit, and each run once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lit_llm.store.store import Stage, Store, read_metrics
from tests.mlflow_runs import mirrored
from tests.store.other_hosts import HOSTS, NETWORK_DISK

KILLS = int(os.environ.get("KILLS", 10))
HANGS = 600
"""Seconds."""
VICTIMS = ("coordinator", "one of its processes", "all of them")


@pytest.fixture
def commands(
    write_study: Callable[..., Path], write_two: Callable[..., Path], write_sweep: Callable[..., Path]
) -> dict[str, list[str]]:
    """What is killed, without its store."""
    longer = "max_steps: 12", "max_steps: 200"
    every = "log_every: 4", "log_every: 4, checkpoint_every: 8"
    arms = "arms: {red: {}, dec: {extends: decllm-tiny}}"
    study, two = write_study("killed", arms, seeds=[0, 1]), write_two("killed_two", seeds=[0])
    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}}"
    sweep = write_sweep("killed_sweep", f"{arms}\n{space}\nseeds: [0]\nsampler: qmc\nwinners: {{seeds: [1]}}", trials=2)
    for path in (study, two, sweep):
        path.write_text(path.read_text().replace(*longer).replace(*every))
    return {
        "study": ["run", str(study), "-j", "2"],
        "two stages": ["run", str(two), "-j", "2"],
        "sweep": ["sweep", str(sweep), "-j", "1"],  # one at a time the draws do not depend on who is first
    }


@contextmanager
def started(
    command: list[str], store: Store, log: Path, environment: Mapping[str, str] = {}
) -> Iterator[subprocess.Popen[bytes]]:
    """`lit-llm` in a session of its own, of which nothing is left afterwards."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_llm", *command, "--store", str(store.root), "--retries", "20"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill(process: subprocess.Popen[bytes], victim: str, draw: random.Random) -> bool:
    """Whether there was one to be killed."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if victim == "all of them":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "coordinator":
            process.kill()
        elif children := psutil.Process(process.pid).children(recursive=True):
            draw.choice(sorted(children, key=lambda child: child.pid)).kill()
        else:
            return False
        return True
    return False


def run_under_fire(
    command: list[str], store: Store, log: Path, draw: random.Random, longest: float, kills: Counter[str]
) -> None:
    """Start the command again and again until it ends; kill it at random moments, KILLS times in all."""
    began, code = time.monotonic(), None
    while code != 0:
        with started(command, store, log) as process:
            while process.poll() is None and kills.total() < KILLS:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0, longest / 2))
                victim = draw.choice(VICTIMS)
                if process.poll() is None and kill(process, victim, draw):
                    kills[victim] += 1
                    if victim != "one of its processes":
                        break
            code = process.wait(HANGS)
        assert code in (0, -signal.SIGKILL), log.read_text()
        assert time.monotonic() - began < 3 * HANGS, log.read_text()


def content(stage: Stage) -> dict[str, Any]:
    """What a stage has found; times left out."""
    result = stage.result() or {}
    weights = stage.checkpoints / "model.safetensors"
    return {
        "state": result.get("state"),
        "metrics": {name: value for name, value in result.get("metrics", {}).items() if "throughput" not in name},
        "weights": weights.read_bytes() if weights.exists() else None,
        "losses": [
            (line["step"], value)
            for line in (read_metrics(stage.metrics_file) if stage.metrics_file.exists() else [])
            for name, value in line["metrics"].items()
            if name.endswith("/loss")
        ],
        "rows": [(stage.folder / name).read_bytes() for name in ("losses.jsonl", "rows.jsonl")
                 if (stage.folder / name).exists()],
    }  # fmt: skip


def stages(store: Store) -> dict[str, Stage]:
    return {folder.name: store.stage(folder.name) for folder in sorted((store.root / "stages").iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["study", "two stages", "sweep"])
def test_ten_kills_change_no_byte_and_double_no_run(kind: str, commands: dict[str, list[str]], tmp_path: Path) -> None:
    log, whole = tmp_path / "log.txt", Store(tmp_path / "whole")
    began = time.monotonic()
    with started(commands[kind], whole, log) as process:
        assert process.wait(HANGS) == 0, log.read_text()
    longest, expected = time.monotonic() - began, {name: content(stage) for name, stage in stages(whole).items()}
    assert {each["state"] for each in expected.values()} == {"done"}
    assert set(mirrored(whole.root).values()) == {1}
    draw, kills = random.Random(kind), Counter[str]()
    for number in itertools.count():
        store = Store(tmp_path / f"store{number}")
        run_under_fire(commands[kind], store, log, draw, longest, kills)
        found = stages(store)
        assert found.keys() == expected.keys()
        assert [name for name, stage in found.items() if content(stage) != expected[name]] == []
        assert mirrored(store.root) == mirrored(whole.root)
        if kills.total() >= KILLS:
            break
    print(f"{number + 1} stores, killed: {dict(kills)}; undisturbed {longest:.0f} s")


def results(store: Store) -> dict[str, tuple[int, int]]:
    """{stage: (inode, time) of its result}, which change when it is written again."""
    files = {path.parent.name: path.stat() for path in store.root.glob("stages/*/result.json")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in files.items()}


@pytest.mark.slow
def test_two_hosts_that_are_killed_share_a_study(commands: dict[str, list[str]], tmp_path: Path) -> None:
    """On a disk where kernel locks keep nobody out. A host that has died comes back under another name, so that only
    the end of its leases tells the other one."""
    log, whole = tmp_path / "log.txt", Store(tmp_path / "whole")
    began = time.monotonic()
    with started(commands["study"], whole, log) as process:
        assert process.wait(HANGS) == 0, log.read_text()
    longest, expected = time.monotonic() - began, {name: content(stage) for name, stage in stages(whole).items()}
    draw, kills, names = random.Random("hosts"), Counter[str](), itertools.count()
    network = {**NETWORK_DISK, "PYTHONPATH": str(HOSTS), "LIT_LLM_LOCKS": "lease:4"}

    for number in itertools.count():
        store, first_results = Store(tmp_path / f"store{number}"), dict[str, tuple[int, int]]()
        began = time.monotonic()
        with ExitStack() as stack:

            def host(stack: ExitStack = stack, store: Store = store) -> subprocess.Popen[bytes]:
                environment = {**network, "TEST_HOST": f"host{next(names)}"}
                return stack.enter_context(started(commands["study"], store, log, environment))

            hosts = [host(), host()]
            while any(process.poll() is None for process in hosts):
                time.sleep(draw.uniform(0, longest / 3))
                first_results = results(store) | first_results
                if kills.total() < KILLS // 2:
                    at, victim = draw.randrange(2), draw.choice(VICTIMS)
                    if hosts[at].poll() is None and kill(hosts[at], victim, draw):
                        kills[victim] += 1
                        if victim != "one of its processes":
                            hosts[at].wait(HANGS)
                            hosts[at] = host()
                assert time.monotonic() - began < 3 * HANGS, log.read_text()
            assert [process.wait() for process in hosts] == [0, 0], log.read_text()
        assert results(store) | first_results == results(store)  # no stage has two results
        assert {name: content(stage) for name, stage in stages(store).items()} == expected
        if kills.total() >= KILLS // 2:
            break
    print(f"{number + 1} stores, killed: {dict(kills)}; undisturbed {longest:.0f} s")
