"""On one GPU: training steps of the 150M and 1B presets by the trainer, and their memory beside the plan's.

    python benchmarks/gpu.py [--presets decllm-150m redllm-150m decllm-1b redllm-1b] [--steps 6]

bf16, random weights and tokens of sequence_length 2048, four micro-batches of eight. A step is `lit_llm.training.fit`'s
own: as configured, with bf16 masters, and with activation checkpointing. For each: tokens/s, MFU of useful FLOPs (masks
as they are), peak memory and that over the plan's `memory_bytes`. One JSON object a line; a part that fails says so and
the next one goes on. `lit-llm bench` has steps and generation beside peers.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
import traceback
from typing import Any

import torch

from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.runs.step_timing import train_on_random_tokens
from lit_llm.training.throughput import peak_flops


def say(**found: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps(rounded), flush=True)


def experiment_of(preset: str, steps: int, *overrides: str) -> Experiment:
    how = [f"max_steps={steps}", "optimizer=adamw", "schedule={kind: constant, warmup_steps: 1}"]
    keys = [*(f"pretrain.training.{key}" for key in how), "pretrain.data.batch_size=32", *overrides]
    return load_experiment(preset, keys)


def random_model(experiment: Experiment, device: str) -> LanguageModel:
    """Drawn on the device itself, which for a billion parameters is quicker than the seeded way; for timing only."""
    model = build_model(experiment.model, device="meta").to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter) if parameter.dim() < 2 else torch.nn.init.normal_(parameter, std=0.02)
    return model


def reset() -> None:
    gc.collect()  # a trainer and its model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def train(name: str, experiment: Experiment, device: str) -> None:
    """Seconds between the ends of `fit`'s steps, the first two left out."""
    ends: list[float] = []

    def after_each_step() -> bool:
        ends.append(time.perf_counter())
        return False

    reset()
    before, cost = memory(), cost_of(experiment)
    train_on_random_tokens(random_model(experiment, device), experiment, "pretrain", after_each_step)
    found = memory() - before
    step = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    report_step(name, experiment, step, device)
    precision, checkpointing = experiment.pretrain.training.precision, experiment.pretrain.training.execution
    say(
        memory=name,
        precision=precision,
        checkpointing=checkpointing.activation_checkpointing,
        measured_gb=found / 1e9,
        planned_gb=cost.memory_bytes / 1e9,
        planned_over_measured=cost.memory_bytes / found if found else None,
    )


def report_step(name: str, experiment: Experiment, step: float, device: str) -> None:
    data, cost = experiment.pretrain.data, cost_of(experiment)
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    say(
        train=name,
        precision=experiment.pretrain.training.precision,
        step_seconds=step,
        tokens_per_second=data.batch_size * data.sequence_length / step,
        tflops_per_second=cost.flops_per_step / step / 1e12,
        mfu=cost.flops_per_step / step / peak if peak else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["decllm-150m", "redllm-150m", "decllm-1b", "redllm-1b"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("-o", "--override", nargs="*", default=[], help="of every experiment")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps: at least 4, of which the first two and the last are not timed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else device
    say(device=where, torch=torch.__version__, cuda=torch.version.cuda)
    masters = "pretrain.training.precision=bf16_master"
    recomputed = "pretrain.training.execution.activation_checkpointing=true"
    variants = {"": [], " bf16_master": [masters], " recomputed": [recomputed]}
    for preset in options.presets:
        for variant, overrides in variants.items():
            name = f"{preset}{variant}"
            try:
                train(name, experiment_of(preset, options.steps, *overrides, *options.override), device)
            except Exception:
                say(failed=name, why=traceback.format_exc().splitlines()[-4:])


if __name__ == "__main__":
    main()
