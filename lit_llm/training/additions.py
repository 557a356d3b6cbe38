"""Objects that a user adds to Lightning's Trainer, and what a run does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from lit_llm.config.problems import InputError, Problem


@dataclass(frozen=True)
class TrainerAdditions:
    """Objects for one training; see `lit_llm.runs.trainer_parts`."""

    callbacks: Sequence[L.Callback] = ()
    loggers: Sequence[Logger] = ()
    plugins: Sequence[Any] = ()
    strategy: Strategy | str | None = None
    profiler: Profiler | str | None = None
    folder: Path | None = None
    """Folder for what they write; None: the working directory."""

    @property
    def empty(self) -> bool:
        return not (self.callbacks or self.loggers or self.plugins or self.strategy or self.profiler)

    def added_to(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of Lightning's Trainer with these objects. Raises InputError for one that a run cannot have."""
        if any(isinstance(plugin, AsyncCheckpointIO) for plugin in self.plugins):
            message = "AsyncCheckpointIO writes a checkpoint later, but a run adds its digest at once; leave it out"
            raise InputError(Problem(message, "trainer.plugins"))
        added: dict[str, Any] = {
            **options,
            "logger": list(self.loggers) or False,
            "plugins": [*options.get("plugins", ()), *self.plugins],
            "strategy": options["strategy"] if self.strategy is None else self.strategy,
            "profiler": self.profiler,
            "default_root_dir": self.folder,
            # Lightning refuses these callbacks where they are switched off.
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in self.callbacks),
            "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in self.callbacks),
        }
        if any(isinstance(plugin, Precision) for plugin in self.plugins):
            del added["precision"]
        return added


class ValidationHooks:
    """Calls the hooks of the user's callbacks around an evaluation, as Lightning does around its validation loop."""

    def __init__(self, callbacks: Sequence[L.Callback]) -> None:
        self.callbacks = callbacks
        self.stopped_by = ""
        """The callback that ended the training after an evaluation; '' for none."""

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for callback in self.callbacks:
            callback.on_validation_start(trainer, module)
            callback.on_validation_epoch_start(trainer, module)

    def end(self, trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float]) -> None:
        """metrics: of the evaluation, which callbacks read in `trainer.callback_metrics`."""
        if not self.callbacks:
            return
        module.log_dict(dict(metrics), logger=False)
        for callback in self.callbacks:
            callback.on_validation_epoch_end(trainer, module)
            callback.on_validation_end(trainer, module)
            if trainer.should_stop and not self.stopped_by:
                self.stopped_by = type(callback).__name__

    @property
    def names(self) -> str:
        return " or ".join(type(callback).__name__ for callback in self.callbacks)
