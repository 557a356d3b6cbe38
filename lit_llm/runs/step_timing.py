"""Seconds of an optimiser step, from three real steps or from finished runs of a study. Loads no torch.

`python -m lit_llm.runs.step_timing` is one measuring process. `measure` starts as many as there will be parallel runs,
all together, so that the figures include what runs take from each other (cores, caches, memory bandwidth). Timings are
kept in the user's cache directory, by machine and by all that decides a step's time. `steps_per_second` measures the
throughput of parallel processes by the wall clock; it is not kept.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import TypeAdapter

from lit_llm.config.hashing import fingerprint, user_cache, write_cached
from lit_llm.config.problems import InputError, Problem
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.launch.devices import cores, has_gpu
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.kernels import kernels_of, lengths_vary, training_of
from lit_llm.training.config import TrainingConfig

if TYPE_CHECKING:
    from lit_llm.models.families import LanguageModel
    from lit_llm.objectives.collate import Batch

SCHEMA = 3
"""Version of the measurement."""
MOST_PROCESSES = 16
"""Most processes measured at once; further runs, each on cores of its own, are assumed not to slow them."""
WARM_UP, TIMED = 2, 3
"""Steps before the measurement, and measured steps, of which the median counts."""
WINDOW_SECONDS = 1.5
"""Shortest time over which steps are counted for a throughput."""
UNTIMED = {"max_steps", "schedule", "batch_warmup", "sequence_warmup"}
"""Keys of a training that do not decide the time of a step."""
MANY_STEPS = 10**6
"""Steps of a training that the time window ends earlier."""


@dataclass(frozen=True)
class StepTiming:
    """Seconds of one optimiser step on one machine, beside the other parallel runs."""

    seconds: float
    resident_bytes: int = 0
    """Resident memory of a process without a model: Python, torch and its kernels. 0 where unknown."""
    device_bytes: int | None = None
    """Memory of the GPU; None on the CPU, whose free memory is read when needed."""
    load: float = 0.0
    """Load average of the last minute per core, before the measurement."""
    measured: str = ""
    """Date of the measurement; '' for timings from finished runs."""


@dataclass(frozen=True)
class Setting:
    """Execution settings that decide the speed of runs."""

    device: str
    """cpu or cuda."""
    threads: int
    at_once: int
    """Processes timed beside each other: the parallel runs, at most as many as have cores of their own."""

    @property
    def uses_cpu_time(self) -> bool:
        """True where CPU time is measured, not wall time: for one CPU thread, so that other load does not count."""
        return self.device == "cpu" and self.threads == 1


@dataclass(frozen=True)
class TimedStep:
    """A step to be timed."""

    experiment: Experiment
    stage: Trained
    setting: Setting

    @cached_property
    def key(self) -> str:
        """Fingerprint of all that decides a step's time: model, objective, batch, training and machine."""
        section = self.experiment.section(self.stage)
        data, training = section.data, section.training.model_dump(mode="json", exclude=UNTIMED)
        training["optimizer"] = section.training.optimizer.kind
        training["execution"]["kernels"] = kernels_of(self.experiment, self.stage).name
        sizes = ("batch_size", "sequence_length", "input_length", "target_length", "packing")
        content = {
            "stage": self.stage,
            "model": resolve_model(self.experiment.model).model_dump(mode="json"),
            "objective": self.experiment.pretrain.objective.model_dump(mode="json"),
            "masks": section.masks.model_dump(mode="json"),
            "data": {size: getattr(data, size, None) for size in sizes},
            "training": training,
        }
        return fingerprint({**content, **asdict(self.setting), **machine(), "schema": SCHEMA})


def setting_of(training: TrainingConfig, max_parallel: int) -> Setting:
    """The setting of a run beside max_parallel - 1 others."""
    execution = training.execution
    device = "cuda" if execution.accelerator != "cpu" and has_gpu() else "cpu"
    processes = max_parallel * (execution.devices if device == "cpu" else 1)
    return Setting(device, execution.threads, min(processes, MOST_PROCESSES, max(1, cores() // execution.threads)))


@cache
def machine() -> dict[str, Any]:
    """Host, CPU, cores, GPUs and version of torch."""
    gpus = sorted(file.read_text() for file in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    model = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"host": platform.node(), "cpu": model, "cores": cores(), "gpus": gpus, "torch": version("torch")}


# The cache ---------------------------------------------------------------------------------------------------------


def _file(timed: TimedStep) -> Path:
    return user_cache() / "steps" / f"{timed.key}.json"


def cached(timed: TimedStep) -> StepTiming | None:
    """The cached timing of this step on this machine; None where absent or unreadable."""
    try:
        return TypeAdapter(StepTiming).validate_python(json.loads(_file(timed).read_text()))
    except (OSError, ValueError):
        return None


def keep(timed: TimedStep, timing: StepTiming) -> None:
    """Write a timing to the cache, atomically. A cache that cannot be written is no error."""
    with suppress(OSError):
        write_cached(_file(timed), json.dumps(asdict(timing)))


# Measuring ---------------------------------------------------------------------------------------------------------


def measure(
    steps: Sequence[TimedStep], progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[TimedStep, StepTiming]]:
    """Time steps one after the other, each in `setting.at_once` processes, and cache the means.

    Starting takes some seconds, mostly to import torch; then each takes five steps. progress: called with (timed steps,
    all steps). Raises InputError where a measuring process fails.
    """
    done = 0
    for setting in dict.fromkeys(timed.setting for timed in steps):
        mine = [timed for timed in steps if timed.setting == setting]
        for timed, timing in zip(mine, _together(mine, setting), strict=True):
            keep(timed, timing)
            done += 1
            progress(done, len(steps))
            yield timed, timing


def steps_per_second(timed: TimedStep, window: float = WINDOW_SECONDS) -> float:
    """Training steps per second of wall time in all `setting.at_once` processes together, which run at the same time.

    window: seconds that each process measures, much longer than their starts are apart.

    Raises InputError where a measuring process fails.
    """
    (answers,) = _answers([_request(timed) | {"window": window}], timed.setting)
    return sum(answer["steps_per_second"] for answer in answers)


def _together(steps: Sequence[TimedStep], setting: Setting) -> Iterator[StepTiming]:
    """Timings of steps with one setting, from processes that run them together."""
    about = {"load": os.getloadavg()[0] / cores(), "measured": time.strftime("%Y-%m-%d")}
    for answers in _answers([_request(each) for each in steps], setting):
        first = answers[0] | {"seconds": statistics.fmean(answer["seconds"] for answer in answers)}
        yield TypeAdapter(StepTiming).validate_python({**first, **about})


def _request(timed: TimedStep) -> dict[str, Any]:
    return {"experiment": timed.experiment.model_dump(mode="json"), "stage": timed.stage}


def _answers(requests: Sequence[dict[str, Any]], setting: Setting) -> Iterator[list[dict[str, Any]]]:
    """The answers of all measuring processes to each request."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(setting.threads))
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", "-m", __name__, setting.device, str(setting.threads)]
    environment, pipe = {**os.environ, **threads, "PYTHONPATH": path}, subprocess.PIPE
    with ExitStack() as stack:
        children = []
        for _ in range(setting.at_once):
            error = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=error, text=True, env=environment)
            stack.callback(_end, child)
            children.append((child, error))
        for child, error in children:
            _line(child, error)  # wait until it has imported torch
        for child, _ in children:
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(requests) + "\n")
                child.stdin.flush()
        for _ in requests:
            yield [json.loads(_line(*child)) for child in children]


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def _line(child: subprocess.Popen[str], error: IO[str]) -> str:
    """The next line of a measuring process. Raises InputError where it has ended without one."""
    assert child.stdout is not None
    if line := child.stdout.readline():
        return line
    child.wait()
    error.seek(0)
    reason = error.read().strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
    raise InputError(Problem(f"a step could not be timed: {reason[0]}", "--measure"))


class RandomBatches:
    """Batches of random tokens, collated as for a stage, in place of a prepared corpus: the share of one device."""

    def __init__(self, experiment: Experiment, stage: Trained) -> None:
        import numpy as np

        self.experiment, self.stage, self.seed = experiment, stage, experiment.seed
        self.rank, self.ranks = 0, 1
        pretrain = experiment.pretrain
        extra = sum(pretrain.objective.extra_ids(pretrain.data.sequence_length).values())
        self.vocabulary = experiment.model.vocabulary - extra
        self.random = np.random.default_rng(0)

    def __getitem__(self, number: int) -> Batch:
        return self._whole(number).share(0, self.experiment.section(self.stage).training.execution.ranks)

    def _whole(self, number: int) -> Batch:
        from lit_llm.data.batches import WindowCollator
        from lit_llm.objectives.collate import collate

        family: Any = self.experiment.model.family
        if self.stage == "finetune":
            tuned = self.experiment.finetune
            assert tuned is not None
            data = tuned.data
            sources, targets = (
                [self._ids(length) for _ in range(data.batch_size)]
                for length in (data.input_length, data.target_length)
            )
            return collate(sources, targets, family, tuned.masks)
        pretrain = self.experiment.pretrain
        rows, length = pretrain.data.batch_size, pretrain.data.sequence_length
        collator = WindowCollator(pretrain.objective, family, pretrain.masks, self.vocabulary)
        return collator.batch(self._ids((rows, length)), number * rows)

    def _ids(self, size: int | tuple[int, int]) -> Any:
        return self.random.integers(2, self.vocabulary, size)


def train_on_random_tokens(
    model: LanguageModel,
    experiment: Experiment,
    stage: Trained,
    after_step: Callable[[], bool],
    steps: int | None = None,
) -> None:
    """Train as a stage does, on random tokens and without keeping anything: of several devices, as one of them.

    Args:
        model: The model, whose parameters are changed.
        experiment: Its training, batches and objective.
        stage: Which of its trainings.
        after_step: Called after each step; returns True to stop.
        steps: Number of steps; the training's own when absent.
    """
    from lit_llm.training.fit import fit
    from lit_llm.training.throughput import StepCost

    training = training_of(experiment, stage)
    alone = training.execution.model_copy(update={"devices": 1, "nodes": 1})
    training = training.model_copy(update={"execution": alone})
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            training if steps is None else training.model_copy(update={"max_steps": steps}),
            RandomBatches(experiment, stage),  # type: ignore[arg-type]
            lengths_vary=lengths_vary(experiment, stage),
            step_cost=StepCost(1, 1.0),
            evaluate=lambda model: {},
            evaluate_times=1,
            metrics_file=Path(folder) / "metrics.jsonl",
            checkpoints=Path(folder) / "checkpoints",
            should_stop=after_step,
            log=lambda line: None,
        )


def time_step(experiment: Experiment, stage: Trained, clock: Callable[[], float]) -> float:
    """Seconds of a training step in this process: the median of some steps on random tokens."""
    from lit_llm.models.build import build_model

    ends: list[float] = []

    def after_each_step() -> bool:
        ends.append(clock())
        return False

    train_on_random_tokens(build_model(experiment.model), experiment, stage, after_each_step, WARM_UP + TIMED)
    return statistics.median(after - before for before, after in itertools.pairwise(ends[-TIMED - 1 :]))


def steps_per_second_here(experiment: Experiment, stage: Trained, window: float) -> float:
    """Training steps per second of wall time in this process, on random tokens and over at least `window` seconds."""
    from lit_llm.models.build import build_model

    ends: list[float] = []

    def after_each_step() -> bool:
        ends.append(time.perf_counter())
        return len(ends) >= WARM_UP + TIMED and ends[-1] - ends[WARM_UP - 1] >= window

    train_on_random_tokens(build_model(experiment.model), experiment, stage, after_each_step, MANY_STEPS)
    return (len(ends) - WARM_UP) / (ends[-1] - ends[WARM_UP - 1])


def _main() -> None:
    device, threads = sys.argv[1], int(sys.argv[2])
    import psutil
    import torch

    from lit_llm.models import build  # noqa: F401
    from lit_llm.training import fit  # noqa: F401

    torch.set_num_threads(threads)
    on_gpu = device == "cuda" and torch.cuda.is_available()
    clock = time.process_time if Setting(device, threads, 1).uses_cpu_time else time.perf_counter
    about: Mapping[str, Any] = {
        "resident_bytes": psutil.Process().memory_info().rss,
        "device_bytes": torch.cuda.mem_get_info()[1] if on_gpu else None,
    }
    print("ready", flush=True)
    for each in json.loads(sys.stdin.readline()):
        experiment, stage = Experiment.model_validate(each["experiment"]), each["stage"]
        answer = (
            {"steps_per_second": steps_per_second_here(experiment, stage, each["window"])}
            if "window" in each
            else {"seconds": time_step(experiment, stage, clock), **about}
        )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
