"""Who a stage is: fingerprints that form a chain, and where a result came from."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_llm.config.fingerprint import digest_of_files, fingerprint
from lit_llm.data.sources import Identity, identify
from lit_llm.experiment.config import Experiment
from lit_llm.models.config import resolve_model

COMPUTES = ("components", "models", "objectives", "data", "training", "evaluation", "experiment/run.py")
"""The code that decides what a result is. A change elsewhere makes no result stale."""


@cache
def _cached_identity(text: str) -> Identity:
    from lit_llm.data.config import DataConfig

    return identify(DataConfig.model_validate_json(text))


def read_corpora_again() -> None:
    """Look at the files anew when an identity is next asked for: a notebook may have edited its corpus."""
    _cached_identity.cache_clear()


def identity_of_data(experiment: Experiment) -> Identity:
    """Identity of the stage's tokens. Reads the corpus, once until `read_corpora_again`. Raises InputError if it cannot
    be read."""
    return _cached_identity(experiment.pretrain.data.model_dump_json())


def digest_of_data(experiment: Experiment) -> str:
    """The same in one word."""
    return identity_of_data(experiment).digest


def pretrain_fingerprint(experiment: Experiment) -> str:
    """H(resolved model, pretrain, data, seed). Names, paths and how the machine does it are not in it."""
    pretrain, length = experiment.pretrain, experiment.pretrain.data.sequence_length
    stage = pretrain.model_dump(mode="json")
    stage["objective"] = pretrain.objective.resolved(length).model_dump(mode="json")
    stage["validation"]["prefix_length"] = pretrain.validation.prefix(length)
    del stage["training"]["execution"]
    for key in ("corpus", "tokenizer", "validation_fraction"):
        del stage["data"][key]
    return fingerprint(
        {
            "stage": "pretrain",
            "model": resolve_model(experiment.model).model_dump(mode="json"),
            "pretrain": stage,
            "data": digest_of_data(experiment),
            "seed": experiment.seed,
        }
    )


def _code_digest() -> str:
    root = Path(__file__).parents[1]
    files = [
        path for name in COMPUTES for path in ([root / name] if "." in name else sorted((root / name).rglob("*.py")))
    ]
    return digest_of_files((path.relative_to(root).as_posix(), path) for path in files)


CODE = _code_digest()
"""Hash of the sources that compute, as they were when this process (or the server it was forked from) read them: a file
edited while runs wait is not what they execute."""


def provenance(experiment: Experiment) -> dict[str, Any]:
    """What a result computed by this process depends on beside its configuration."""
    from lit_llm import __version__

    execution = experiment.pretrain.training.execution
    return {
        "version": __version__,
        "code": CODE,
        "torch": version("torch"),
        "python": platform.python_version(),
        "device": _device(execution.accelerator),
        "precision": experiment.pretrain.training.precision,
        "kernels": "torch",
        "threads": execution.threads,
        "micro_batch_size": execution.micro_batch_size,
    }


COMPARABLE = ("code", "torch", "device", "kernels", "threads")
"""Parts of the provenance that have to be equal for two results to be compared."""


def same_origin(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two provenances belong into one comparison."""
    return all(left.get(key) == right.get(key) for key in COMPARABLE)


def has_gpu() -> bool:
    """Whether there is a device for which torch is worth asking; torch takes seconds to import."""
    return Path("/dev/nvidiactl").exists()


@cache
def _device(accelerator: str) -> str:
    if accelerator != "cpu" and has_gpu():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"cpu ({_instruction_set()})"


def _instruction_set() -> str:
    """What decides which kernels a CPU takes, and so the last bits of a result."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    except OSError:
        flags = set()
    found = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return f"{platform.machine()} {found}".strip()
