"""Predicted against measured seconds per optimiser step, for models of 0.1M to 30M parameters of both families.

    python benchmarks/estimate.py [--steps 12] [--threads 1 2] [--precision fp32 bf16]

Predicted: `lit_llm.runs.time_estimate` over a benchmark of this machine, measured first. Measured: the quickest step of
real training (`lit_llm.training.fit` on random tokens), one run at a time, and the CPU time of its median step per
thread. The ratio is that of predicted to CPU time for one thread, which leaves out what others do on the machine, and
to the quickest step for several.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lit_llm.data.batches import cut
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.models.cost import count_parameters
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.collate import Batch
from lit_llm.runs.machine_benchmark import MachineBenchmark, cached, measure, setting_of
from lit_llm.runs.time_estimate import seconds_of
from lit_llm.training.fit import StepCost, fit

DATA = "pretrain.data."
EXPERIMENTS: dict[str, tuple[str, list[str]]] = {
    "red, d 32, batch 4": ("redllm-tiny", ["model.d_model=32", "model.feed_forward.d_ff=128", DATA + "batch_size=4"]),
    "red-tiny": ("redllm-tiny", []),
    "dec-tiny": ("decllm-tiny", []),
    "dec-tiny, adafactor": ("decllm-tiny", ["pretrain.training.optimizer={kind: adafactor}"]),
    "dec-tiny, muon": ("decllm-tiny", ["pretrain.training.optimizer={kind: muon}"]),
    "dec-tiny, prefix open": ("decllm-tiny", ["pretrain.objective=prefix_lm", "pretrain.masks.prefix=bidirectional"]),
    "red-tiny, T 1024": ("redllm-tiny", [DATA + "sequence_length=1024", DATA + "batch_size=4"]),
    "dec-tiny, T 1024": ("decllm-tiny", [DATA + "sequence_length=1024", DATA + "batch_size=4"]),
    "dec-tiny, micro 2": ("decllm-tiny", ["pretrain.training.execution.micro_batch_size=2"]),
    "red, d 256": ("redllm-tiny", ["model.d_model=256", "model.feed_forward.d_ff=1024", "model.vocabulary=4096"]),
    "dec, d 256": ("decllm-tiny", ["model.d_model=256", "model.feed_forward.d_ff=1024", "model.vocabulary=4096"]),
    "dec, V 16384": ("decllm-tiny", ["model.vocabulary=16384"]),
    "red, d 512 x 4+4": (
        "redllm-tiny",
        [
            "model.d_model=512",
            "model.attention.heads=8",
            "model.feed_forward.d_ff=1365",
            "model.encoder.layers=4",
            "model.decoder.layers=4",
            "model.vocabulary=8192",
            DATA + "batch_size=4",
            DATA + "sequence_length=256",
        ],
    ),
    "dec, d 512 x 6": (
        "decllm-tiny",
        [
            "model.d_model=512",
            "model.attention.heads=8",
            "model.feed_forward.d_ff=2048",
            "model.decoder.layers=6",
            "model.vocabulary=8192",
            DATA + "batch_size=4",
            DATA + "sequence_length=256",
        ],
    ),
}


class Random:
    """Batches of random tokens, cut as the experiment's are; in place of a prepared corpus."""

    def __init__(self, experiment: Experiment) -> None:
        pretrain, model = experiment.pretrain, experiment.model
        shape = (pretrain.data.batch_size, pretrain.data.sequence_length)
        extra = sum(pretrain.objective.extra_ids(shape[1]).values())
        self.vocabulary = model.vocabulary - extra
        self.windows = np.random.default_rng(0).integers(2, self.vocabulary, shape)
        self.objective, self.family = pretrain.objective, model.family
        self.masks, self.seed = pretrain.masks, experiment.seed

    def __getitem__(self, k: int) -> Batch:
        return cut(
            self.windows,
            self.objective,
            self.family,
            self.masks,
            vocabulary=self.vocabulary,
            seed=0,
            first=k * len(self.windows),
        )


def measured_step(experiment: Experiment, folder: Path) -> tuple[float, float]:
    """(wall-clock seconds of the quickest step, median over the steps of the process's CPU seconds per thread)."""
    ends: list[tuple[float, float]] = []

    def after_each_step() -> bool:
        ends.append((time.perf_counter(), time.process_time()))
        return False

    fit(
        build_model(experiment.model),
        experiment.pretrain.training,
        Random(experiment),  # type: ignore[arg-type]
        step_cost=StepCost(1, 1.0),
        evaluate=lambda model: {},
        evaluate_times=1,
        metrics_file=folder / "metrics.jsonl",
        checkpoints=folder / "checkpoints",
        should_stop=after_each_step,
    )
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]
    threads = experiment.pretrain.training.execution.threads
    return min(wall for wall, _ in steps), statistics.median(cpu for _, cpu in steps) / threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--keep", action="store_true", help="take the measurement that is in the cache")
    options = parser.parse_args()
    print(f"{'experiment':<24}{'params':>8} {'':<7}{'predicted':>12}{'quickest':>11}{'CPU':>11}{'ratio':>7}")
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for threads, precision in itertools.product(options.threads, options.precision):
            torch.set_num_threads(threads)
            benchmark: MachineBenchmark | None = None
            for title, (preset, overrides) in EXPERIMENTS.items():
                how = [f"training.max_steps={options.steps}", "training.schedule={kind: constant, warmup_steps: 1}"]
                how += [f"training.precision={precision}", f"training.execution.threads={threads}"]
                experiment = load_experiment(preset, [*overrides, *(f"pretrain.{key}" for key in how)])
                setting = setting_of(experiment.pretrain.training, 1)
                benchmark = benchmark or (cached(setting) if options.keep else None) or measure(setting)
                found, (wall, cpu) = seconds_of(experiment, benchmark).step, measured_step(experiment, Path(name))
                ratios.append(found / (cpu if threads == 1 else wall))
                parameters = count_parameters(resolve_model(experiment.model)).total
                line = f"{title:<24}{parameters / 1e6:>7.2f}M {precision} {threads}"
                times = "".join(f"{1000 * seconds:>8.1f} ms" for seconds in (found, wall, cpu))
                print(f"{line} {times}{ratios[-1]:>7.2f}", flush=True)
    off = [max(ratio, 1 / ratio) for ratio in ratios]
    within = {f"within_{limit}": sum(each <= limit for each in off) for limit in (1.25, 1.5, 2.0)}
    print(json.dumps({"of": len(off), **within, "worst": round(max(off), 2), "median": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
