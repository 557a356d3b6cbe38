"""Provenance of a result: version and code, libraries, device, precision, threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_llm.components.recurrence.config import TRITON_F32, TRITON_F32_IN_FP32
from lit_llm.components.registry import PACKAGES
from lit_llm.config.code_digest import digest_of_code, digest_of_package
from lit_llm.config.hashing import fingerprint
from lit_llm.config.machine import compiler, cpu_flags
from lit_llm.data.config import InstructionConfig
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.launch.devices import has_gpu
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.kernels import kernels_of, strategy_of
from lit_llm.runs.trainer_parts import TrainerParts, in_force

COMPUTES = (
    "components",
    "models",
    "generation",
    "objectives",
    "data",
    "training",
    "evaluation",
    "runs/kernels.py",
    "runs/stage_data.py",
    "runs/stage_training.py",
    "runs/stages.py",
    "runs/warm_start.py",
    "huggingface/checkpoint.py",
    "experiment/cost.py",
    "config/metrics.py",
)
"""Code that decides results and names of metrics. A change elsewhere makes no result stale."""
CODE = digest_of_code(Path(__file__).parents[1], COMPUTES)
"""Digest of that code when this process, or its fork server, read it: edits while runs wait have no effect on them."""
OUTSIDE_CODE = {package: digest_of_package(package) for package in sorted({*PACKAGES.values()})}
"""{package: digest of its code} of installed packages with components, read at the same time."""


def provenance(
    experiment: Experiment,
    stage: Trained = "pretrain",
    evaluates: bool = False,
    weights: str | None = None,
    trainer: TrainerParts | None = None,
) -> dict[str, Any]:
    """Provenance of a result of this process: all that it depends on besides its configuration.

    evaluates: for an evaluation after the stage. weights: digest of the initial weights. trainer: what the user adds to
    the Trainer; the parts in force when absent.
    """
    from lit_llm import __version__

    data, training = experiment.section(stage).data, experiment.section(stage).training
    execution = training.execution
    cut_matters = training.draws or training.precision == "bf16_master"
    cut_matters |= any(part.depends_on_cut for part in resolve_model(experiment.model).parts)
    cut_matters &= not evaluates
    packed = isinstance(data, InstructionConfig) and data.packing == "greedy"
    at_once = execution.rows_at_once(data.batch_size)
    cut = f"{at_once} packed" if packed else at_once
    if execution.ranks > 1:
        cut = f"{cut} on {execution.ranks} devices"
    ranks = 1 if evaluates else execution.ranks
    parts = TrainerParts() if evaluates else in_force() if trainer is None else trainer
    return {
        "version": __version__,
        "code": CODE,
        "components": _outside_code(experiment),
        "torch": installed_version("torch"),
        "python": platform.python_version(),
        "device": _device(execution.accelerator),
        "precision": experiment.evaluate.precision if evaluates and experiment.evaluate else training.precision,
        "kernels": _kernels_of_evaluation(experiment) if evaluates else kernels_of(experiment, stage).name,
        "threads": execution.threads,
        "micro_batch_size": execution.micro_batch_size,
        "packing": "greedy" if packed else None,
        "devices": ranks,
        "nodes": execution.nodes if ranks > 1 else 1,
        "strategy": strategy_of(experiment, stage) if ranks > 1 else None,
        "cut": cut if cut_matters else None,
        "bitsandbytes": installed_version("bitsandbytes") if training.eight_bit and not evaluates else None,
        "liger": _version_or_none("liger-kernel") if not evaluates and execution.kernels == "liger" else None,
        "fla": _fla(training.precision) if not evaluates and execution.kernels == "fla" else None,
        "trainer": parts.names() or None,
        "changing_parts": "; ".join(parts.may_change()) or None,
        "weights": weights,
    }


def _fla(precision: str) -> str:
    """Releases of flash-linear-attention and triton, and how Triton rounds the factors of products in float32."""
    rounding = os.environ.get(TRITON_F32) or (TRITON_F32_IN_FP32 if precision == "fp32" else "tf32")
    return f"fla-core {_version_or_none('fla-core')}, triton {_version_or_none('triton')}, float32 products {rounding}"


def _kernels_of_evaluation(experiment: Experiment) -> str:
    """Evaluations train nothing; tasks generate text, which rounds otherwise without a C++ compiler."""
    tasks = experiment.evaluate is not None and experiment.evaluate.tasks is not None
    return "auto, not compiled" if tasks and compiler() is None else "auto"


def _outside_code(experiment: Experiment) -> dict[str, str] | None:
    """{package: digest of its code} of the external components in a model; None without any."""
    used = {name for layer in resolve_model(experiment.model).layers for name, _ in layer.parts}
    packages = sorted({package for key, package in PACKAGES.items() if key in used})
    return {package: OUTSIDE_CODE[package] for package in packages} or None


def weights_digest(digests: Sequence[str | None]) -> str | None:
    """Digest of a stage's initial weights, from the digests of its one or two parents."""
    present = [digest for digest in digests if digest is not None]
    return present[0] if len(present) == 1 else fingerprint(present) if present else None


installed_version = cache(version)


def _version_or_none(package: str) -> str | None:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


COMPARABLE = ("code", "torch", "device", "kernels", "threads", "changing_parts")
"""Parts of the provenance that have to be equal for two results to be compared. changing_parts: the user's callbacks,
plugins and strategy that may change a training."""
REPEATABLE = (*COMPARABLE, "components", "cut", "bitsandbytes", "liger", "fla")
"""Parts that decide the numbers of one experiment. The last five are None where they have no effect, so arms may
differ in them. components: code of external components. cut: micro-batch size, packing and the number of devices, which
change the draws of dropout and the sum of bfloat16 gradients. Otherwise devices and their strategy change a result by
rounding alone: a note of a comparison names them."""


def same_provenance(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """True where one experiment gives the same numbers under both provenances, from the same weights."""
    return all(left.get(key) == right.get(key) for key in (*REPEATABLE, "weights"))


def provenance_digest(origin: Mapping[str, Any]) -> str:
    """Digest of the parts in `REPEATABLE`."""
    return fingerprint({key: origin.get(key) for key in REPEATABLE})


@cache
def _device(accelerator: str) -> str:
    if accelerator != "cpu" and has_gpu():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"cpu ({_instruction_set()})"


def _instruction_set() -> str:
    """The CPU's instruction set, which selects kernels and so decides the last bits of a result."""
    flags = cpu_flags()
    widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
    bfloat16 = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([platform.machine(), widest, *bfloat16]).strip()
