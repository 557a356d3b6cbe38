"""What a trial of a sweep costs beside its training: here, by Optuna with Lightning, and by Hydra's Optuna sweeper.

    python benchmarks/sweep_overhead.py [--trials 20] [--peer-trials 20] [--without-hydra]

All three search the learning rate of decllm-tiny with TPE, one trial at a time: two steps of 16 sequences, then a
validation on 16. Overhead of a trial = the time from the end of the trial before it to its own end, minus the time
inside its training steps and its validation. So the first trial is left out, and with it what only a start costs.

- Ours: `run_sweep`, each trial in a process of its own, with all that a run writes and its mirror in MLflow.
- Optuna + Lightning: the script that people write first. All trials in one process, Optuna's and MLflow's SQLite. Its
  validation before the first step, Lightning's default, counts as validation.
- Hydra's sweeper: the same function, as the job of `hydra/sweeper=optuna`. It wants an Optuna older than ours, so it
  is installed into a virtual environment of its own, in a temporary directory; about a minute and 2 GB. Where torch
  does not install there, the job is an empty one; where the sweeper itself does not, the output says so.

Medians, since other work may share the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lit_llm
from lit_llm.store.store import Store
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import run_sweep
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trial import Trial

SWEEP = """
sweep: {name}
question: What does a trial cost beside its steps?
extends: decllm-tiny
base:
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}"]}}, tokenizer: bytes}}
    training: {{max_steps: 2, schedule: {{warmup_steps: 1}}, stability: {{logit_every: 0}}}}
    validation: {{times: 1, sequences: 16}}
space:
  pretrain.training.optimizer.lr: {{log_uniform: [1e-4, 3e-2]}}
sampler: tpe
trials: {trials}
winners: {{seeds: []}}
"""

# What the peers train. Each trial appends when it ended, and its seconds inside steps and validation, to ENDS.
PLAIN = """
import json, os, time
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
import lightning as L, torch
from lightning.pytorch.loggers import MLFlowLogger
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
torch.set_num_threads(1)
MODEL, FOLDER, ENDS = load_experiment("decllm-tiny").model, os.environ["FOLDER"], os.environ["ENDS"]
class Plain(L.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.lr, self.seconds = build_model(MODEL, 0), lr, 0.0
    def loss(self, tokens):
        return torch.nn.functional.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    def training_step(self, tokens, k):
        loss = self.loss(tokens)
        self.log("loss", loss)
        return loss
    def validation_step(self, tokens, k):
        self.log("val", self.loss(tokens))
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
    def start(self, *_):
        self.began = time.perf_counter()
    def stop(self, *_):
        self.seconds += time.perf_counter() - self.began
    on_train_batch_start = on_validation_batch_start = start
    on_train_batch_end = on_validation_batch_end = stop
def train(lr):
    L.seed_everything(0)
    tokens = torch.randint(258, (48, 129))
    training = torch.utils.data.DataLoader(tokens[:32], batch_size=16)
    validation = torch.utils.data.DataLoader(tokens[32:], batch_size=16)
    database, artifacts = f"sqlite:///{FOLDER}/mlflow.db", f"file://{FOLDER}/artifacts"
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=MLFlowLogger("peer", tracking_uri=database, artifact_location=artifacts),
        default_root_dir=FOLDER,
        enable_progress_bar=False,
    )
    model = Plain(lr)
    trainer.fit(model, training, validation)
    assert trainer.global_step == 2 and model.seconds > 0
    with open(ENDS, "a") as file:
        file.write(json.dumps([time.perf_counter(), model.seconds]) + "\\n")
    return float(trainer.callback_metrics["val"])
"""

OPTUNA = """
import os, sys
import optuna
from plain import train
study = optuna.create_study(study_name="peer", storage=f"sqlite:///{os.environ['FOLDER']}/optuna.db")
study.optimize(lambda trial: train(trial.suggest_float("lr", 1e-4, 3e-2, log=True)), n_trials=int(sys.argv[1]))
"""

HYDRA = """
import hydra
from plain import train
@hydra.main(version_base=None, config_path=None)
def main(config):
    return train(config.lr)
main()
"""

EMPTY = """
import json, os, time
def train(lr):
    with open(os.environ["ENDS"], "a") as file:
        file.write(json.dumps([time.perf_counter(), 0.0]) + "\\n")
    return lr
"""

# Optuna 2.10, the newest that the sweeper takes, runs with neither SQLAlchemy 2 nor NumPy 2; and the sweeper's own
# requirement of Hydra lets pip take a pre-release.
SWEEPER = ("hydra-optuna-sweeper==1.3.0", "hydra-core==1.3.2", "sqlalchemy<2", "numpy<2")
TRAINING = ("torch>=2.10,<2.14", "lightning>=2.6.4", "mlflow>=3.13", "pydantic", "pyyaml", "filelock", "safetensors")


def measured(ends: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of the trials after the first; ends: when each ended, and its seconds of training and validation."""
    walls = [late - early for (early, _), (late, _) in itertools.pairwise(ends)]
    works = [work for _, work in ends[1:]]
    return {
        "trial_seconds": statistics.median(walls),
        "steps_and_validation_seconds": statistics.median(works),
        "overhead_seconds": statistics.median(wall - work for wall, work in zip(walls, works, strict=True)),
    }


class Ends(SweepObserver):
    """Notes when each trial ended."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def ended(self, trial: Trial) -> None:
        assert trial.state == "done", f"{trial.name}: {trial.state}: {trial.error}"
        self.found.append((time.perf_counter(), trial.seconds))


def ours(folder: Path, trials: int) -> dict[str, float]:
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"it was the best of times number {number} " * 200)
    observer = Ends()
    # The first tokenises, opens MLflow and starts the fork server.
    for name, count in (("first", 1), ("overhead", trials)):
        observer = Ends()
        path = folder / f"{name}.yaml"
        path.write_text(SWEEP.format(name=name, corpus=f"{folder}/*.txt", trials=count))
        run_sweep(load_sweep(path), Store(folder / "store"), observer=observer, max_parallel=1)
    assert len(observer.found) == trials
    return measured(observer.found)


def peer(folder: Path, command: Sequence[str], plain: str) -> dict[str, float]:
    """Run a script that imports `train` from plain.py. Raises CalledProcessError."""
    folder.mkdir()
    (folder / "plain.py").write_text(plain)
    (folder / "script_optuna.py").write_text(OPTUNA)
    (folder / "script_hydra.py").write_text(HYDRA)
    ends = folder / "ends.jsonl"
    package = Path(lit_llm.__file__).parents[1]
    environment = {**os.environ, "FOLDER": str(folder), "ENDS": str(ends), "PYTHONPATH": str(package)}
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
    return measured([(ended, work) for ended, work in map(json.loads, ends.read_text().splitlines())])


def with_hydra(folder: Path, trials: int) -> tuple[dict[str, float], str]:
    """What was measured, nothing where it could not be; and with what."""
    python = folder / "hydra" / "bin" / "python"
    try:
        subprocess.run([sys.executable, "-m", "venv", folder / "hydra"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return {}, f"no virtual environment: {last_line(error)}"
    said = ""
    for job, plain, packages in (("plain Lightning", PLAIN, (*SWEEPER, *TRAINING)), ("an empty job", EMPTY, SWEEPER)):
        place = folder / f"hydra-{job.split()[-1]}"
        command = [str(python), "script_hydra.py", "--multirun", "hydra/sweeper=optuna"]
        command += [f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=1", "hydra.sweeper.study_name=peer"]
        command += [f"hydra.sweeper.storage=sqlite:///{place}/optuna.db", f"hydra.sweep.dir={place}/multirun"]
        command += ["+lr=tag(log, interval(1e-4, 3e-2))"]
        began = time.perf_counter()
        try:
            pip = [str(python), "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(pip, check=True, capture_output=True, text=True, timeout=600)
            seconds = time.perf_counter() - began
            return peer(place, command, plain), f"{said}{job}; installed in {seconds:.0f} s: {', '.join(packages)}"
        except subprocess.CalledProcessError as error:
            said += f"not with {job}: {last_line(error)}; "
        except subprocess.TimeoutExpired:
            said += f"not with {job}: its installation takes longer than 10 minutes; "
    return {}, f"{said}nothing was measured"


def last_line(error: subprocess.CalledProcessError) -> str:
    return (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--peer-trials", type=int, default=20)
    parser.add_argument("--without-hydra", action="store_true")
    options = parser.parse_args()
    if min(options.trials, options.peer_trials) < 2:
        parser.error("two trials at least: each is timed from the end of the one before it")
    found: dict[str, dict[str, float]] = {}
    hydra_job = "left out"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["ours"] = ours(folder, options.trials)
        command = [sys.executable, "script_optuna.py", str(options.peer_trials)]
        found["optuna_lightning"] = peer(folder / "optuna", command, PLAIN)
        if not options.without_hydra:
            found["hydra_sweeper"], hydra_job = with_hydra(folder, options.peer_trials)
    mine = found["ours"]["overhead_seconds"]
    shown = {kind: {key: round(value, 3) for key, value in figures.items()} for kind, figures in found.items()}
    ratios = {f"{kind}_over_ours": round(them["overhead_seconds"] / mine, 2) for kind, them in found.items() if them}
    del ratios["ours_over_ours"]
    print(json.dumps({**shown, "hydra_job": hydra_job, "overhead_ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
