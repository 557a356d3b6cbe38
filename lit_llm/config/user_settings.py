"""Settings of the user and of a store, in TOML: how and where work is done, never what is computed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from lit_llm.config.problems import InputError, Problem, SourceLocation
from lit_llm.config.tree import ConfigNode, merge_all, tree

FILE = "settings.toml"
TRAINER = "trainer"
"""Section that names code, which is imported: a store may be somebody else's, so that only the user's file has it."""


def user_file() -> Path:
    """The user's file: `~/.config/lit-llm/settings.toml`, or under `XDG_CONFIG_HOME`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lit-llm" / FILE


def read_settings(store: Path | None) -> ConfigNode:
    """The user's settings, with those of a store, which win.

    Raises InputError for a file that is not TOML, and for a store's file that names code.
    """
    files = [user_file()] if store is None else [user_file(), store / FILE]
    nodes = {file: _read(file) for file in files if file.is_file()}
    if store is not None and (given := nodes.get(store / FILE)) is not None and TRAINER in given.value:
        message = f"names code, which only your own settings may: {user_file()}"
        raise InputError(Problem(message, TRAINER, SourceLocation(str(store / FILE))))
    return merge_all(nodes.values())


def _read(file: Path) -> ConfigNode:
    try:
        return tree(tomllib.loads(file.read_text(encoding="utf-8")), SourceLocation(str(file)))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(Problem(f"cannot be read: {error}", location=SourceLocation(str(file)))) from None
