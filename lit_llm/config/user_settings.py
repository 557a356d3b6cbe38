"""Settings of the user and of a store, in TOML: how and where work is done, never what is computed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from lit_llm.config.problems import InputError, Problem, SourceLocation
from lit_llm.config.tree import ConfigNode, merge_all, tree

FILE = "settings.toml"


def user_file() -> Path:
    """The user's file: `~/.config/lit-llm/settings.toml`, or under `XDG_CONFIG_HOME`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lit-llm" / FILE


def read_settings(store: Path) -> ConfigNode:
    """The user's settings with those of a store, which win. Raises InputError for a file that is not TOML."""
    return merge_all(_read(file) for file in (user_file(), store / FILE) if file.is_file())


def _read(file: Path) -> ConfigNode:
    try:
        return tree(tomllib.loads(file.read_text(encoding="utf-8")), SourceLocation(str(file)))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(Problem(f"cannot be read: {error}", location=SourceLocation(str(file)))) from None
