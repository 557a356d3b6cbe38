"""Kernels and strategy of a stage: those of its configuration, as far as this machine has them.

The answer depends on the configuration and the machine alone. So it is the same for every seed, for a plan, a run and
a resumed run. Loads no torch, but to read the memory of a GPU.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lit_llm.config.machine import compiler, compiler_name
from lit_llm.experiment.cost import memory_of
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.launch.devices import has_gpu
from lit_llm.models.resolve import resolve_model
from lit_llm.training.config import TrainingConfig
from lit_llm.training.memory import Shared


class Kernels(NamedTuple):
    """Kernels of a stage on this machine."""

    name: str
    """The value of `training.execution.kernels` that is computed."""
    obstacle: str = ""
    """Reason why blocks are not compiled although they should be; '' otherwise."""


COMPILE_SECONDS = 60.0
"""Seconds that a run waits for its blocks to compile when no earlier run has compiled them, on a busy machine."""
SAVED = 0.04
"""Share of a CPU step that compiled blocks save, the least of those in `docs/speed.md`."""


def kernels_of(experiment: Experiment, stage: Trained) -> Kernels:
    """The kernels of a stage's training: `auto` in place of `compiled` where something is in the way."""
    execution = experiment.section(stage).training.execution
    if execution.kernels != "compiled":
        return Kernels(execution.kernels)
    obstacle = _no_compiler(execution.accelerator != "cpu" and has_gpu()) or _uncompiled_part(experiment, stage)
    if strategy_of(experiment, stage) == "fsdp":
        obstacle = "with fsdp a block gathers its parameters, which torch does not compile"
    return Kernels("auto" if obstacle else "compiled", obstacle)


def kernels_note(experiment: Experiment, stage: Trained) -> str:
    """Line on what the kernels of a stage's configuration do not compute; '' where there is nothing to say."""
    name, obstacle = kernels_of(experiment, stage)
    if obstacle:
        return f"blocks are not compiled: {obstacle}"
    if name not in ("flex", "fla"):
        return ""
    parts = resolve_model(experiment.model).parts
    of_parts = (part.without_flex if name == "flex" else part.without_fla for part in parts)
    reasons = [reason for reason in of_parts if reason is not None]
    left = [reason for reason in reasons if reason]
    if not left:
        return ""
    kinds, by = ("attention", "FlexAttention") if name == "flex" else ("recurrent mixers", "flash-linear-attention")
    return f"{len(left)} of {len(reasons)} kinds of {kinds} are not computed by {by}: {left[0]}"


def compiled_saves(experiment: Experiment, stage: Trained, step: float) -> float:
    """Seconds that `kernels: compiled` saves in a stage of `auto`; 0 where it is unmeasured, impossible or slower.

    step: seconds of an eager step. Savings are known for a CPU alone.
    """
    training = experiment.section(stage).training
    execution = training.execution
    if execution.kernels != "auto" or (execution.accelerator != "cpu" and has_gpu()):
        return 0.0
    if _no_compiler(gpu=False) or _uncompiled_part(experiment, stage):
        return 0.0
    return max(0.0, SAVED * training.max_steps * step - COMPILE_SECONDS)


def strategy_of(experiment: Experiment, stage: Trained) -> Shared | None:
    """Strategy of a stage's training on several devices, `ddp` or `fsdp`; None for one device."""
    training = experiment.section(stage).training
    execution = training.execution
    if execution.ranks == 1:
        return None
    if execution.strategy != "auto":
        return execution.strategy
    if resolve_model(experiment.model).tie_layers:
        return "ddp"
    memory = gpu_memory() if execution.accelerator != "cpu" else None
    too_small = memory is not None and memory_of(experiment, stage, "ddp") > memory
    return "fsdp" if too_small and not training.eight_bit else "ddp"


@cache
def gpu_memory() -> int | None:
    """Bytes of memory of this machine's first GPU; None without one."""
    if has_gpu():
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def training_of(experiment: Experiment, stage: Trained) -> TrainingConfig:
    """Settings of a stage's training with the kernels and the strategy of this machine."""
    training = experiment.section(stage).training
    chosen = {"kernels": kernels_of(experiment, stage).name, "strategy": strategy_of(experiment, stage) or "auto"}
    return training.model_copy(update={"execution": training.execution.model_copy(update=chosen)})


def lengths_vary(experiment: Experiment, stage: Trained) -> bool:
    """True where the numbers of tokens in a row of source or target differ between the batches of a stage."""
    pretrain = experiment.pretrain
    if stage == "finetune" or pretrain.training.sequence_warmup is not None:
        return True
    return len(set(pretrain.objective.extremes(pretrain.data.sequence_length))) > 1


def _uncompiled_part(experiment: Experiment, stage: Trained) -> str:
    """Reason why a part of the model cannot be compiled for this stage, or ''."""
    vary = lengths_vary(experiment, stage)
    parts = resolve_model(experiment.model).parts
    reasons = (part.not_compiled or (part.one_length if vary else "") for part in parts)
    return next(filter(None, reasons), "")


def _no_compiler(gpu: bool) -> str:
    """Reason why nothing can be compiled on this machine, or ''."""
    if compiler() is None:
        return f"there is no C++ compiler {compiler_name()!r}; install one, or name one program by CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are absent; install them (on Debian python3-dev)"
    if gpu and importlib.util.find_spec("triton") is None:
        return "triton is absent; `pip install triton`"
    return ""
