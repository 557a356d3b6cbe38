"""Datasets in the form of the Hugging Face Hub, from a folder or the Hub's cache on this machine, never the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.data.config import HuggingFace

_KINDS = {"parquet": "parquet", "json": "jsonl", "arrow": "arrow"}
"""{kind of `datasets`: our format}."""


def find_files(config: HuggingFace) -> tuple[str, list[Path]]:
    """(format, files) of a split, in order. Raises InputError for a dataset that is not on this machine or unusable."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise _input_error("", "a dataset of the Hub needs the `datasets` library: pip install 'lit-llm[hf]'") from None
    folder = Path(config.path)
    if not folder.is_dir():
        folder = _hub_folder(config)
    for name in ("dataset_dict.json", "state.json"):
        if (folder / name).is_file():
            return "arrow", _saved_files(folder, config)
    return _data_files(folder, config)


def _input_error(key: str, message: str) -> InputError:
    return InputError(Problem(message, f"corpus.{key}" if key else "corpus"))


def _hub_folder(config: HuggingFace) -> Path:
    """The folder in the Hub's cache, which `datasets.load_dataset` uses too."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(config.path, repo_type="dataset", revision=config.revision, local_files_only=True)
        )
    except HFValidationError:
        raise _input_error("path", f"{config.path!r} is no folder, and no ORG/NAME of the Hub") from None
    except (LocalEntryNotFoundError, OSError):
        revision = f" --revision {config.revision}" if config.revision else ""
        command = f"hf download --type dataset {config.path}{revision}"
        message = f"{config.path} is no folder here and not in the Hub's cache; `{command}` fetches it"
        raise _input_error("path", message) from None


def _saved_files(folder: Path, config: HuggingFace) -> list[Path]:
    """Files that `save_to_disk` has written, for one split or several."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            if config.split not in splits:
                raise _input_error("split", f"{config.split!r} is not possible{did_you_mean(config.split, splits)}")
            folder = folder / config.split
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / item["filename"] for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _input_error("path", f"{folder} is damaged: {type(error).__name__}: {error}") from None


def _data_files(folder: Path, config: HuggingFace) -> tuple[str, list[Path]]:
    """Files that `datasets` takes for the split: by the card's configurations, or by their names."""
    from datasets import load_dataset_builder

    if remote := next((file for file in _card_files(folder, config.name) if "://" in file), ""):
        raise _input_error("path", f"{config.path}: its files {remote} are not on this machine; download them first")
    try:
        with TemporaryDirectory() as work:
            builder: Any = load_dataset_builder(str(folder), config.name, cache_dir=work)
    except Exception as error:  # its exceptions are not documented
        key = "name" if "onfig" in str(error) else "path"
        raise _input_error(key, f"{config.path}: {' '.join(str(error).split())[:300]}") from None
    kind = type(builder).__module__.rpartition(".")[2]
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if config.split not in splits:
        raise _input_error("split", f"{config.split!r} is not possible{did_you_mean(config.split, splits)}")
    if kind not in _KINDS:
        message = f"its files are read as {kind!r}; read here are Parquet, JSON lines and Arrow: convert them first"
        raise _input_error("path", f"{config.path}: {message}")
    return _KINDS[kind], [Path(file) for file in splits[config.split]]


def _card_files(folder: Path, name: str | None) -> Iterator[str]:
    """Paths of a configuration's files in the dataset's card. `datasets` would request network addresses at once."""
    import yaml
    from huggingface_hub import metadata_load

    cards: list[Any] = []
    with suppress(OSError, ValueError, yaml.YAMLError):  # `datasets` reports a broken card
        cards.append(metadata_load(folder / "README.md"))
    with suppress(OSError, ValueError, yaml.YAMLError):
        cards.append(yaml.safe_load((folder / ".huggingface.yaml").read_text()))
    waiting = [
        item.get("data_files")
        for card in cards
        for item in (card.get("configs") or [] if isinstance(card, dict) else [])
        if isinstance(item, dict) and (name is None or item.get("config_name", "default") == name)
    ]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
