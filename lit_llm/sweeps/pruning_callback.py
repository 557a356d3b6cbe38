"""A callback that prunes a trial of the user's own search with Optuna, in a Trainer of the user's."""

from __future__ import annotations

import lightning as L
import optuna

from lit_llm.config.metrics import TARGET_NLL, on_validation


class OptunaPruning(L.Callback):
    """Reports a metric to a trial after each validation, by optimiser step, and ends a training that Optuna prunes.

    >>> def objective(trial):
    ...     lit, data = LitExperiment(experiment_of(trial)), LitData(experiment_of(trial))
    ...     trainer = L.Trainer(**lit.trainer_options, callbacks=[OptunaPruning(trial)])
    ...     trainer.fit(lit, datamodule=data)
    ...     return trainer.callback_metrics["val/target_nll"].item()

    A sweep needs none: `pruner` in its file decides, between its own processes.
    """

    def __init__(self, trial: optuna.Trial, monitor: str = on_validation(TARGET_NLL)) -> None:
        """monitor: name of the metric; lower or higher is better as the Optuna study says."""
        self.trial, self.monitor = trial, monitor

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError("OptunaPruning works on one device: the other ranks have no trial to ask")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        measured = trainer.callback_metrics
        if self.monitor not in measured:
            raise ValueError(f"no metric {self.monitor!r} to prune by; there are {', '.join(sorted(measured))}")
        self.trial.report(measured[self.monitor].item(), trainer.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {trainer.global_step}")
