"""The machine of a benchmark: what it is, and the best that it reached in the minutes of a measurement."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from lit_llm.bench.results import Ceilings, Machine
from lit_llm.bench.settings import BenchSettings
from lit_llm.launch import cores
from lit_llm.models.cost import count_parameters
from lit_llm.models.resolved import ResolvedModel
from lit_llm.runs import step_timing
from lit_llm.runs.step_profile import copy_ceiling, product_ceiling, read_ceiling
from lit_llm.training.heap import keep_freed_memory

PACKAGES = ("lit-llm", "torch", "transformers", "litgpt")


def measure_ceilings(settings: BenchSettings) -> Ceilings:
    """Ceilings of this machine, in a few seconds."""
    device = torch.device(settings.device)
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    return Ceilings(product_ceiling(dtype, device), copy_ceiling(device), read_ceiling(device))


def describe_machine() -> Machine:
    """Processor, devices and library versions of this machine, and how busy it is now."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Machine(
        str(step_timing.machine()["cpu"]),
        cores(),
        psutil.virtual_memory().total,
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        os.getloadavg()[0] / cores(),
        time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        versions,
    )


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def set_heap(heap: str) -> None:
    """Set malloc of this process; nothing sets it back. heap: as in `Comparison`."""
    if heap == "kept":
        keep_freed_memory()


def parameters_of(models: Mapping[str, ResolvedModel]) -> dict[str, int]:
    """{name: number of parameters}."""
    return {name: count_parameters(model).total for name, model in models.items()}
