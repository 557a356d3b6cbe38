"""A model in a folder: `model.yaml`, its configuration, and `weights.safetensors`, both in our names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.config.fingerprint import digest_of_files
from lit_llm.config.section import Section, validate
from lit_llm.config.tree import Node, read_file
from lit_llm.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

MODEL, WEIGHTS = "model.yaml", "weights.safetensors"


class _Model(Section):
    model: ModelConfig


def digest_of_checkpoint(folder: Path) -> str:
    """Of both files. Raises OSError where one is missing."""
    return digest_of_files((name, folder / name) for name in (MODEL, WEIGHTS))


def open_checkpoint(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model's configuration and its state dict. Raises InputError or OSError where they cannot be read."""
    from safetensors.torch import load_file

    return validate(_Model, Node({"model": read_file(folder / MODEL)})).model, load_file(folder / WEIGHTS)
