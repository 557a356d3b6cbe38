"""Who a stage is: fingerprints that form a chain, and where a result came from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lit_llm.config.fingerprint import digest_of_files, fingerprint
from lit_llm.data.corpora import data_digest
from lit_llm.experiment.config import Experiment
from lit_llm.models.config import resolve_model

COMPUTES = ("components", "models", "objectives", "data", "training", "evaluation")
"""Packages whose code decides what a result is. A change elsewhere makes no result stale."""


@cache
def _cached_data_digest(text: str) -> str:
    from lit_llm.data.config import DataConfig

    return data_digest(DataConfig.model_validate_json(text))


def digest_of_data(experiment: Experiment) -> str:
    """Identity of the stage's tokens. Reads the corpus, once per process. Raises InputError if it cannot be read."""
    return _cached_data_digest(experiment.pretrain.data.model_dump_json())


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
    files = [path for package in COMPUTES for path in sorted((root / package).rglob("*.py"))]
    return digest_of_files((path.relative_to(root).as_posix(), path) for path in files)


CODE = _code_digest()
"""Hash of the sources that compute, as they were when this process (or the server it was forked from) read them: a file
edited while runs wait is not what they execute."""


def provenance(experiment: Experiment) -> dict[str, Any]:
    """What a result depends on beside its configuration. Loads torch."""
    import platform

    import torch

    from lit_llm import __version__

    execution = experiment.pretrain.training.execution
    cuda = execution.accelerator != "cpu" and torch.cuda.is_available()
    return {
        "version": __version__,
        "code": CODE,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "devices": execution.devices,
        "precision": experiment.pretrain.training.precision,
        "kernels": "torch",
        "threads": execution.threads,
    }


COMPARABLE = ("code", "torch", "device", "devices", "kernels", "threads")
"""Parts of the provenance that have to be equal for two results to be compared."""
