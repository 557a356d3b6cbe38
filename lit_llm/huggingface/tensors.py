"""The tensors of a checkpoint: safetensors only, read one by one. A pickle is never opened, for it runs code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.config.problems import InputError, Problem, some

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = {"F64", "F32", "F16", "BF16"}


class Tensors:
    """Names, shapes and values of the tensors of a folder. Raises InputError for what cannot be read, or not safely."""

    def __init__(self, folder: Path) -> None:
        self.where = _files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        problems: list[Problem] = []
        for file in dict.fromkeys(self.where.values()) if self.where else [folder / "model.safetensors"]:
            with _opened(file) as opened:
                stored = set(opened.keys())
                listed = {name for name, at in self.where.items() if at == file} or stored
                if missing := sorted(listed - stored):
                    problems.append(Problem(f"the index says {some(missing)}, which the file does not have", str(file)))
                for name in sorted(listed & stored):
                    part = opened.get_slice(name)
                    self.where[name], self.shapes[name] = file, tuple(part.get_shape())
                    if (kind := part.get_dtype()) not in FLOATS:
                        allowed = "float64, float32, float16 and bfloat16"
                        message = f"holds {kind}; only {allowed}: a quantised model has to be dequantised"
                        problems.append(Problem(message, name))
        if problems:
            raise InputError(*problems)

    def read(self, name: str) -> Tensor:
        with _opened(self.where[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def _files(folder: Path) -> dict[str, Path]:
    """{tensor: file} of a sharded checkpoint; empty where there is one `model.safetensors`, which transformers, too,
    takes before any shards."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return {}
    if index.is_file():
        content = read_json(index)
        shards = content.get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(Problem("has no `weight_map` of tensors to files", str(index)))
        problems = [
            Problem(f"{name!r} " + ("is missing" if plain else "is no file beside it"), str(index))
            for name in dict.fromkeys(shards.values())
            if not (plain := Path(name).name == name and name.endswith(".safetensors")) or not (folder / name).is_file()
        ]
        if problems:
            raise InputError(*problems)
        return {name: folder / file for name, file in shards.items()}
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise InputError(
            Problem(
                f"{some(pickles)}: pickled weights run code when they are read, so they are not. Write safetensors, "
                "where you trust the file: `AutoModel...from_pretrained(folder).save_pretrained(other)`",
                str(folder),
            )
        )
    raise InputError(Problem("has no model.safetensors and no model.safetensors.index.json", str(folder)))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise InputError(Problem(f"is no readable safetensors file: {error}", str(file))) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that is a mapping. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(f"is not JSON: {error}", str(path))) from None
    if not isinstance(content, dict):
        raise InputError(Problem("should be a mapping", str(path)))
    return content


def compare(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], whose: str
) -> Iterator[Problem]:
    """Tensors that are missing, too many, or of another shape."""
    for name in sorted(expected.keys() - stored.keys()):
        yield Problem(f"is missing: {whose} has it, of shape {list(expected[name])}", name)
    for name in sorted(stored.keys() - expected.keys()):
        yield Problem(f"is not known: {whose} has no such tensor", name)
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            yield Problem(f"has the shape {list(stored[name])}; {whose} has {list(expected[name])}", name)
