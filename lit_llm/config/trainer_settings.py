"""Names of a user's own code for Lightning's Trainer, in the user's own settings file alone."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from lit_llm.config.section import Items, Section, config_error

FACTORY = "factory"
"""Key of the factory in a table; the other keys are its arguments."""
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def _is_named(part: str | dict[str, Any]) -> str | dict[str, Any]:
    name = part if isinstance(part, str) else part.get(FACTORY)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        example = 'as "package.module:Factory", or {factory = "package.module:Factory", argument = 3}'
        raise config_error(("", f"names no class or function: give it {example}"))
    return part


NamedPart = Annotated[str | dict[str, Any], AfterValidator(_is_named)]
"""A factory's name, or a table of its name and arguments."""


class TrainerSettings(Section):
    """What is added to Lightning's Trainer in every run. Each run makes its own objects by these factories."""

    callbacks: Items[NamedPart] = ()
    """Callbacks. One that may change the training is part of a result's provenance."""
    loggers: Items[NamedPart] = ()
    """Loggers, which get the lines of metrics.jsonl."""
    plugins: Items[NamedPart] = ()
    """Plugins, such as a precision or an input and output of checkpoints."""
    strategy: NamedPart | None = None
    """Strategy in place of the one that `training.execution` sets."""
    profiler: NamedPart | None = None
    """Profiler of the training."""
