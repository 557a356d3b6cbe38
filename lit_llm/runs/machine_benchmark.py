"""What this machine can do, measured once: how fast the code that trains runs here, by itself and beside its like.

`python -m lit_llm.runs.machine_benchmark` is one measuring process. `measure` starts as many of them as runs would go
at once and lets them begin together, so that what runs take from each other (cores, caches, memory bandwidth) is in the
figures. They are kept in the user's cache directory; a plan reads them there and loads no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lit_llm.config.fingerprint import fingerprint
from lit_llm.config.problems import InputError, Problem
from lit_llm.launch import cores
from lit_llm.runs.provenance import has_gpu
from lit_llm.store.store import write_json
from lit_llm.training.config import TrainingConfig

SCHEMA = 2
"""Version of what is measured."""
MOST_PROCESSES = 16
"""Measured at once; of more runs, each on cores of its own, it is taken that they take no more from each other."""

WIDTHS = {"cpu": ((32, 1024), (128, 1024), (512, 256)), "cuda": ((256, 16384), (1024, 16384), (4096, 8192))}
"""(d_model, tokens) at which a layer is timed: its rate grows with the width."""
HEAD_DIMS = (16, 64, 128)
KEYS = (128, 1024)
"""Keys over which attention is timed: the longer the row, the better its kernel does."""
LOGITS = {"cpu": ((512, 1024), (1024, 16384)), "cuda": ((4096, 1024), (1024, 32768))}
"""(positions, vocabulary) at which the loss is timed; tensors of more than 32 MB are memory new from the kernel."""
OPTIMIZERS = ("adamw", "adafactor", "adafactor_factored", "muon")
MUON_WIDTH = 256
"""Its matrices while it is timed: orthogonalising costs FLOPs in proportion to a matrix's narrow side."""


@dataclass(frozen=True)
class MachineBenchmark:
    """Measured on one machine, for one device, precision, number of threads and of processes at once."""

    layer: dict[int, float]
    """{d_model: FLOP/s} of a layer's matrix products, forward and backward; its elementwise work is in the time, and on
    a GPU what its calls cost where that is more."""
    scores: dict[int, dict[int, float]]
    """{keys: {head_dim: FLOP/s}} of causal attention over the visible pairs, forward and backward."""
    layer_seconds: float
    """A layer's forward and backward pass over next to no tokens: what its operator calls cost."""
    cross_seconds: float
    """What cross-attention adds to that."""
    logits: dict[int, float]
    """{logits held at once: logits per second} of the loss without its product, forward and backward."""
    logit_width: float
    """Seconds of that product for each logit and unit of d_model."""
    update: dict[str, tuple[float, float]]
    """{optimiser: (seconds for each tensor, for each parameter)} of clipping and stepping."""
    resident_bytes: int
    """Of the process that measured: what Python, torch and its kernels take before there is a model."""
    device: str
    device_bytes: int | None
    """Memory of the GPU; None on the CPU, whose memory is looked at when it is asked for."""
    load: float
    """Processes that waited for a core before the measuring began (one-minute load average), per core."""
    measured: str
    """The day."""


@dataclass(frozen=True)
class Setting:
    """How runs would be executed, as far as it decides their speed."""

    device: str
    """cpu or cuda."""
    precision: str
    """fp32 or bf16: of the matrix products."""
    threads: int
    at_once: int
    """Processes that are timed beside each other: the runs at once, or as many of them as have cores of their own."""

    @property
    def own_time(self) -> bool:
        """Whether a process's CPU time is what it takes: so for one thread, where nobody else wants the core. Measured
        by that clock, what others do on the machine just now is left out."""
        return self.device == "cpu" and self.threads == 1

    def key(self) -> dict[str, Any]:
        """All that a measurement is of."""
        return {**asdict(self), **_machine(), "schema": SCHEMA}


def setting_of(training: TrainingConfig, slots: int) -> Setting:
    """The setting of a run beside slots - 1 others. Loads no torch."""
    execution = training.execution
    device = "cuda" if execution.accelerator != "cpu" and has_gpu() else "cpu"
    beside = min(slots, MOST_PROCESSES, max(1, cores() // execution.threads))
    # With bfloat16 parameters the products are those of autocast, and so, as measured, is the step.
    precision = "fp32" if training.precision == "fp32" else "bf16"
    return Setting(device, precision, execution.threads, beside)


def _machine() -> dict[str, Any]:
    gpus = sorted(file.read_text() for file in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    model = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"host": platform.node(), "cpu": model, "cores": cores(), "gpus": gpus, "torch": version("torch")}


# The cache ---------------------------------------------------------------------------------------------------------


def cache_file(setting: Setting) -> Path:
    """Where the measurement of this setting, on this machine, is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lit-llm" / f"machine-{fingerprint(setting.key())}.json"


def cached(setting: Setting) -> MachineBenchmark | None:
    """The measurement of this setting, or None: never made, unreadable, or of another machine."""
    try:
        content = json.loads(cache_file(setting).read_text())
        # Keys of JSON are strings; pydantic makes numbers of them again.
        read = TypeAdapter(MachineBenchmark).validate_python
        return read(content["benchmark"]) if content["key"] == setting.key() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(setting: Setting, benchmark: MachineBenchmark) -> None:
    """Write it to the cache, atomically; a cache that cannot be written is no error, it is measured again."""
    with suppress(OSError):
        file = cache_file(setting)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": setting.key(), "benchmark": asdict(benchmark)})


# Measuring ---------------------------------------------------------------------------------------------------------


def measure(setting: Setting) -> MachineBenchmark:
    """Time the machine, in as many processes as `setting` has at once, and keep the mean of what they found.

    Takes some seconds, most of them to import torch. Raises InputError where a measuring process fails.
    """
    load = os.getloadavg()[0] / cores()
    command = [sys.executable, "-P", "-m", __name__, setting.device, setting.precision, str(setting.threads)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(setting.threads))
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, **threads, "PYTHONPATH": path}
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        for _ in range(setting.at_once)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()  # it has imported what it needs
        answers = []
        for child in children:
            with suppress(BrokenPipeError):
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
        for child in children:
            out, error = child.communicate()
            if child.returncode:
                reason = error.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
                raise InputError(Problem(f"this machine could not be timed: {reason[0]}", "--measure"))
            answers.append(json.loads(out))
    finally:
        for child in children:
            child.kill()
            child.wait()
    found = TypeAdapter(MachineBenchmark).validate_python(
        {**_mean(answers), "load": load, "measured": time.strftime("%Y-%m-%d")}
    )
    keep(setting, found)
    return found


def _mean(answers: list[Any]) -> Any:
    """The same structure with the mean of every number."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _mean([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_mean(list(values)) for values in zip(*answers, strict=True)]
    return statistics.fmean(answers) if isinstance(first, float) else first


class Timer:
    """Times work on one device and in one precision."""

    def __init__(self, device: str, precision: str, threads: int, repeats: int = 5) -> None:
        self.device, self.precision, self.repeats = device, precision, repeats
        self.clock = time.process_time if Setting(device, precision, threads, 1).own_time else time.perf_counter

    def seconds(self, work: Callable[[], object]) -> float:
        """The least of some repetitions, after one that warms up: what else the machine does comes and goes.

        A GPU wants more of either: kernels are loaded when they are first called, and its clock rises under load.
        """
        import torch

        found: list[float] = []
        warm = 5 if self.device == "cuda" else 1
        while len(found) < 1 + 2 * warm or (len(found) < warm + self.repeats and sum(found) < 0.2):
            began = self.clock()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                result = work()
            if isinstance(result, torch.Tensor):
                result.backward()
            if self.device == "cuda":
                torch.cuda.synchronize()
            found.append(self.clock() - began)
        return min(found[warm:])

    def scores(self, head_dim: int, tokens: int) -> float:
        """FLOP/s of causal attention."""
        import torch

        heads = max(1, (64 if self.device == "cpu" else 4096) // head_dim)
        rows = max(1, 1024 // tokens)
        q, k, v = (
            torch.randn(rows, heads, tokens, head_dim, device=self.device, requires_grad=True)
            if self.precision == "fp32"
            else torch.randn(
                rows, heads, tokens, head_dim, device=self.device, dtype=torch.bfloat16, requires_grad=True
            )
            for _ in range(3)
        )
        attend = torch.nn.functional.scaled_dot_product_attention
        seconds = self.seconds(lambda: attend(q, k, v, is_causal=True).sum())
        return 3 * 4 * (rows * heads * head_dim) * (tokens * (tokens + 1) / 2) / seconds

    def stack(self, width: int, tokens: int, cross: bool = False) -> float:
        """Seconds of a model of one layer (one on each side, with `cross`), the loss left out."""
        import torch

        from lit_llm.models.build import build_model

        model = build_model(_one_layer(width, cross)).to(self.device)
        rows, length = max(1, tokens // 128), min(tokens, 128)
        ids = torch.zeros(rows, length, dtype=torch.long, device=self.device)
        inputs = (ids, ids) if cross else (ids,)
        return self.seconds(lambda: model.hidden(*inputs).sum())

    def loss(self, width: int, positions: int, vocabulary: int) -> float:
        """Seconds of the loss over that many positions."""
        import torch

        from lit_llm.components.embedding.module import Unembedding
        from lit_llm.components.loss.module import target_loss

        hidden = torch.randn(1, positions, width, device=self.device, requires_grad=True)
        matrix = torch.randn(vocabulary, width, device=self.device, requires_grad=True)
        targets = torch.zeros(1, positions, dtype=torch.long, device=self.device)
        ones = torch.ones(1, positions, device=self.device)
        return self.seconds(lambda: target_loss(hidden, Unembedding(matrix), targets, ones)[0])

    def update(self, kind: str, tensors: int, width: int) -> float:
        """Seconds of clipping and one step over so many square matrices."""
        import torch
        from pydantic import TypeAdapter

        from lit_llm.training.optimizers.build import build_optimizer
        from lit_llm.training.optimizers.config import Optimizer

        holder = torch.nn.ModuleDict({"layers": torch.nn.ParameterList(), "rest": torch.nn.ParameterList()})
        for number in range(tensors + 1):  # Muon wants something outside the layers too
            side = width if number else 1
            parameter = torch.nn.Parameter(torch.randn(side, side, device=self.device))
            holder["layers" if number else "rest"].append(parameter)  # type: ignore[operator]
        parameters = list(holder.parameters())
        optimizer = build_optimizer(TypeAdapter(Optimizer).validate_python({"kind": kind}), holder)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return self.seconds(step)


def _one_layer(width: int, cross: bool) -> Any:
    from lit_llm.models.config import DecoderModel, EncoderDecoderModel

    content: dict[str, Any] = {
        "d_model": width,
        "vocabulary": 2,
        "attention": {"heads": max(2, width // 64), "qkv_norm": ["q", "k", "v"]},
        "feed_forward": {"d_ff": 4 * width},
        "decoder": {"layers": 1},
    }
    if cross:
        return EncoderDecoderModel.model_validate({**content, "encoder": {"layers": 1}})
    return DecoderModel.model_validate(content)


def take(device: str, precision: str, threads: int) -> dict[str, Any]:
    """Measure in this process; the answer lacks what only the parent knows."""
    import psutil
    import torch

    from lit_llm.models.parameters import embedding_shapes, parameter_shapes
    from lit_llm.models.resolve import resolve_model

    torch.set_num_threads(threads)
    timer = Timer(device, precision, threads)
    narrow = WIDTHS[device][0][0]
    if device == "cuda":
        timer.stack(*WIDTHS[device][-1])  # awake
    few = timer.stack(narrow, 8)
    both = timer.stack(narrow, 8, cross=True)
    scores = {keys: {head_dim: timer.scores(head_dim, keys) for head_dim in HEAD_DIMS} for keys in KEYS}
    layer = {}
    for width, tokens in WIDTHS[device]:
        resolved = resolve_model(_one_layer(width, cross=False))
        shapes = parameter_shapes(resolved)
        products = sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if len(shape) > 1 and name not in embedding_shapes(resolved)
        )
        attention = resolved.decoder[0].self_attention
        assert attention is not None
        attending = 3 * attention.score_flops(129 / 2) * tokens / interpolated(scores[128], attention.head_dim)
        # A GPU computes while the calls are made, and so many tokens keep it busy for longer than they take.
        seconds = timer.stack(width, tokens) - (few if device == "cpu" else 0) - attending
        layer[width] = 6.0 * products * tokens / max(seconds, 1e-9)
    # A GPU's time over few logits is that of the calls, whatever the width.
    positions, vocabulary = LOGITS[device][0 if device == "cpu" else 1]
    thin, wide = timer.loss(narrow, positions, vocabulary), timer.loss(8 * narrow, positions, vocabulary)
    logit_width = max(0.0, wide - thin) / (7 * narrow * positions * vocabulary)
    logits = {}
    for positions, vocabulary in LOGITS[device]:
        each = timer.loss(narrow, positions, vocabulary) / (positions * vocabulary) - logit_width * narrow
        logits[positions * vocabulary] = 1 / max(each, 1e-13)
    update = {}
    for kind in OPTIMIZERS:
        small, large = timer.update(kind, 16, 8), timer.update(kind, 16, MUON_WIDTH)
        update[kind] = (small / 17, max(0.0, large - small) / (16 * MUON_WIDTH**2))
    return {
        "layer": layer,
        "scores": scores,
        "layer_seconds": few,
        "cross_seconds": max(0.0, both - 2 * few),
        "logits": logits,
        "logit_width": logit_width,
        "update": update,
        "resident_bytes": psutil.Process().memory_info().rss,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "device_bytes": torch.cuda.mem_get_info()[1] if device == "cuda" else None,
    }


def interpolated(rates: dict[int, float], size: float) -> float:
    """The rate at a size: in proportion to the size below the smallest that was measured, constant above the largest,
    and between two of them a straight line in the logarithms."""
    sizes = sorted(rates)
    if size <= sizes[0]:
        return rates[sizes[0]] * size / sizes[0]
    for low, high in itertools.pairwise(sizes):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(rates[low]) + share * math.log(rates[high]))
    return rates[sizes[-1]]


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("precision")
    parser.add_argument("threads", type=int)
    wanted = parser.parse_args()
    import torch

    from lit_llm.models import build  # noqa: F401

    if wanted.device == "cuda" and not torch.cuda.is_available():
        wanted.device = "cpu"
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(take(wanted.device, wanted.precision, wanted.threads)))


if __name__ == "__main__":
    _main()
