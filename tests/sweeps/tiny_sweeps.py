"""What the tests of running a sweep share: a observer that remembers, and coordinators that are processes."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_llm.store.store import Stage, Store, read_metrics
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import Searched, run_sweep
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trial import Trial

LR = "pretrain.training.optimizer.lr"
TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"
ONE = "arms: {red: {}}"
ALONE = "winners: {seeds: []}"
"""Without the study of the winners."""
STEP = 4 * 32
"""Tokens of one step of `small_base`: batch_size x sequence_length."""
STEPS = 12


def rates(low: float = 1e-4, high: float = 1e-1) -> str:
    return f"space: {{{LR}: {{log_uniform: [{low}, {high}]}}}}"


class Seen(SweepObserver):
    """A observer that remembers what it was told."""

    def __init__(self, on_poll: Callable[[], None] = lambda: None) -> None:
        self.messages: list[str] = []
        self.begun: list[str] = []
        self.trained: list[str] = []
        """Runs of the study of the winners that were executed."""
        self.on_poll = on_poll

    def message(self, text: str) -> None:
        self.messages.append(text)

    def began(self, trial: Trial) -> None:
        self.begun.append(trial.name)

    def launching(self, runs: Sequence[Any], todo: Sequence[Any], max_parallel: int) -> None:
        self.trained += [run.name for run in todo]

    def poll(self) -> None:
        self.on_poll()


def sweep(
    path: Path,
    store: Store,
    observer: Seen | None = None,
    max_parallel: int = 2,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Searched:
    search = load_sweep(path, overrides)
    return run_sweep(search, store, observer=observer or Seen(), max_parallel=max_parallel, **options)


def beside(store: Store, root: Path) -> tuple[Store, str]:
    """Another store, and the address of the first one's MLflow: making a database of its own would take seconds."""
    return Store(root), f"sqlite:///{store.root}/mlflow.db"


def of(ended: Searched, arm: str) -> list[Trial]:
    return [trial for trial in ended.trials if trial.arm == arm]


def counted(ended: Searched, arm: str) -> list[Trial]:
    return [trial for trial in of(ended, arm) if trial.counts]


def stages(store: Store, trial: Trial) -> list[Stage]:
    return [store.stage(name) for name in trial.fingerprints]


def result(stage: Stage) -> dict[str, Any]:
    found = stage.result()
    assert found is not None
    return found


def validations(stage: Stage) -> dict[int, dict[str, float]]:
    """{step: the line of metrics.jsonl}, where there was a validation."""
    lines = read_metrics(stage.metrics_file)
    return {line["step"]: line["metrics"] for line in lines if "val/target_nll" in line["metrics"]}


def longer(path: Path, steps: int) -> Path:
    """Enough steps for a signal to arrive in the middle, and a checkpoint every eight."""
    text = path.read_text().replace("max_steps: 12", f"max_steps: {steps}")
    path.write_text(text.replace("log_every: 4", "log_every: 4, checkpoint_every: 8"))
    return path


def pid_of(stage: Stage) -> int:
    return int(json.loads((stage.folder / "state.json").read_text())["pid"])


PROGRAM = """
import os, signal, sys
from lit_llm.config.problems import InputError
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import run_sweep
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trials import Trials
from lit_llm.store.store import Store


class Telling(SweepObserver):
    def began(self, trial):
        print("began", trial.name, flush=True)

    def message(self, text):
        print("message", text, flush=True)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# FAULT
if __name__ == "__main__":
    file, store, max_parallel, *storage = sys.argv[1:]
    try:
        ended = run_sweep(
            load_sweep(file),
            Store(store),
            observer=Telling(),
            max_parallel=int(max_parallel),
            storage=next(iter(storage), None),
        )
    except InputError as error:
        sys.exit(str(error))
    sys.exit(ended.exit_code)
"""


class WarmServer:
    """The process of `warm_server.py`, one for a test process."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        program = Path(__file__).with_name("warm_server.py")
        self.process = subprocess.Popen([sys.executable, str(program)], stdin=pipe, stdout=pipe, text=True)

    def ask(self, **request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


warm_server = functools.cache(WarmServer)


class Coordinator:
    """A process of its own that runs a sweep; `fault` is code that breaks it at a certain point.

    cold: its fork server is started anew, as everywhere but in tests.
    """

    def __init__(
        self,
        folder: Path,
        path: Path,
        store: Path,
        max_parallel: int = 1,
        storage: str | None = None,
        fault: str = "",
        cold: bool = False,
    ) -> None:
        number = len(list(folder.glob("coordinator-*.py")))
        program = folder / f"coordinator-{number}.py"
        program.write_text(PROGRAM.replace("# FAULT", fault))
        self.log = folder / f"coordinator-{number}.txt"
        self.log.touch()
        arguments = [str(path), str(store), str(max_parallel), *([storage] if storage else [])]
        self.code: int | None = None
        self.pid: int = warm_server().ask(
            program=str(program), arguments=arguments, environment=dict(os.environ), log=str(self.log), cold=cold
        )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def begun(self) -> list[str]:
        return [line.removeprefix("began ") for line in self.output.splitlines() if line.startswith("began ")]

    def send(self, number: signal.Signals) -> None:
        assert self._ended() is None, self.output
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 400) -> int:
        """Its exit code, as that of a subprocess.Popen."""
        deadline = time.monotonic() + seconds
        while (code := self._ended()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end within {seconds} s:\n{self.output}")
            time.sleep(0.02)
        return code

    def _ended(self) -> int | None:
        if self.code is None:
            self.code = warm_server().ask(ended=self.pid)
        return self.code


def wait_until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """What the condition says once it holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"it did not come true within {seconds} s")
