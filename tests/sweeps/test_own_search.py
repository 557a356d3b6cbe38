"""Optuna's own tools on a sweep's trials: other storages, the dashboard, and pruning in a loop of the user's."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import lightning as L
import optuna
import pytest

from lit_llm import LitData, LitExperiment
from lit_llm.config.problems import InputError
from lit_llm.runs.stage_config import load_stage_config
from lit_llm.store.store import Store
from lit_llm.sweeps import storage
from lit_llm.sweeps.pruning_callback import OptunaPruning
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trials import Trials
from tests.stages_in_parts import prepared_stage
from tests.sweeps.databases import studies_in_dashboard

optuna.logging.set_verbosity(optuna.logging.WARNING)
ROOT = Path(__file__).parents[2]
SPACE = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-3, 1e-2]}}\noptimize: [{metric: val/target_nll}]"


class Worse(optuna.pruners.BasePruner):
    """Prunes at the second report."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return len(trial.intermediate_values) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_training_of_the_users_own_is_pruned_by_the_steps_of_its_validations(tmp_path: Path, corpus: Path) -> None:
    """Three validations in one epoch are three reports: Optuna's own callback for Lightning counts epochs."""
    stage = prepared_stage(Store(tmp_path / "store"), corpus, "decllm-tiny")
    experiment, trainers = load_stage_config(stage).experiment, []

    def objective(trial: optuna.Trial) -> float:
        lit = LitExperiment(experiment)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainers.append(L.Trainer(**lit.trainer_options, **quiet, enable_model_summary=False, accelerator="cpu",
                                  callbacks=[OptunaPruning(trial)]))  # fmt: skip
        trainers[-1].fit(lit, datamodule=LitData(experiment, store=tmp_path / "store"))
        return float(trainers[-1].callback_metrics["val/target_nll"])

    study = optuna.create_study(pruner=Worse())
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state is optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == [4, 8]
    assert trainers[0].global_step == 8
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=1)
    assert list(study.trials[0].intermediate_values) == [4, 8, 12]


def test_a_metric_that_is_not_measured_is_named_with_those_that_are() -> None:
    class Fake:
        sanity_checking, callback_metrics = False, {"val/a": 1, "val/b": 2}

    with pytest.raises(ValueError, match="no metric 'val/c' to prune by; there are val/a, val/b"):
        OptunaPruning(optuna.create_study().ask(), "val/c").on_validation_end(Fake(), None)


def test_the_limits_of_sqlite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.warning_of(None) == storage.warning_of("postgresql://host/db") == ""
    assert "of this machine alone" in storage.warning_of(f"sqlite:///{tmp_path}/trials.db")
    monkeypatch.setattr(storage, "is_network_mount", lambda _: True)
    assert "where sqlite's locks may fail" in storage.warning_of(f"sqlite:///{tmp_path}/trials.db")


@pytest.mark.parametrize("kind", storage.DRIVERS)
def test_a_missing_driver_is_named_with_the_extra_that_has_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = storage.DRIVERS[kind]
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(InputError, match=re.escape(f"needs the package {driver}: pip install 'lit-llm[{kind}]'")):
        storage.database(f"{kind}://tuner@127.0.0.1:1/trials")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [extra.partition(">")[0].partition("[")[0] for extra in extras[kind]] == [driver]


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("mysql://tuner:xyzzy@127.0.0.1:1", "write mysql://USER@HOST/DATABASE"),
        ("mariadb+pymysql://tuner:xyzzy@127.0.0.1:1/trials", "write mysql://"),
        ("postgresql://tuner:xy@xyzzy@127.0.0.1:1/trials", "write %40 for an @"),
        ("sqlite:////no/such/folder/trials.db", "write sqlite:///trials.db"),
        ("sqlite:///:memory:", "write sqlite:///trials.db"),
        ("sqlite+pysqlite:////tmp/trials.db", "write sqlite:///trials.db"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_without_its_password(url: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice) as error:
        storage.database(url)
    assert "--storage" in str(error.value)
    assert "xyzzy" not in str(error.value)


def test_the_name_of_an_sqlite_file_may_hold_any_at_signs(tmp_path: Path, write_sweep: Callable[..., Path]) -> None:
    folder = tmp_path / "a@x" / "b@y"
    folder.mkdir(parents=True)
    url = f"sqlite:///{folder}/trials.db"
    trials = Trials(load_sweep(write_sweep("at_signs", SPACE)), Store(tmp_path / "store"), url)
    with trials.coordinating():
        pass
    assert (folder / "trials.db").exists()
    assert trials.address == url


def test_the_dashboard_opens_the_journal_of_a_sweep(tmp_path: Path, write_sweep: Callable[..., Path]) -> None:
    trials = Trials(load_sweep(write_sweep("shown", SPACE)), Store(tmp_path / "store"))
    with trials.coordinating():
        pass
    assert studies_in_dashboard(trials.address) == ["shown/baseline"]
