"""What a run costs beside its training steps: 20 two-step runs here, and as a plain Lightning script started for each.

    python benchmarks/run_overhead.py [--runs 20] [--peer-runs 3]

Overhead of a run = its wall time in a study (from the fork to the written result, one at a time) minus the time of its
two training steps and its validation, timed in the run's own process. The peer is the script that people write first:
Lightning, MLFlowLogger on sqlite, one process per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.runs import Run

STUDY = """
study: overhead
question: What does a run cost beside its steps?
extends: decllm-tiny
base:
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}"]}}, tokenizer: bytes}}
    training: {{max_steps: 2, schedule: {{warmup_steps: 1}}, stability: {{logit_every: 0}}}}
    validation: {{times: 1, sequences: 16}}
seeds: {seeds}
"""

PEER = """
import os, sys
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
import lightning as L, torch
from lightning.pytorch.loggers import MLFlowLogger
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
torch.set_num_threads(1)
class Plain(L.LightningModule):
    def __init__(self, seed):
        super().__init__()
        self.net = build_model(load_experiment("decllm-tiny").model, seed)
    def training_step(self, tokens, k):
        logits = self.net(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss)
        return loss
    def validation_step(self, tokens, k):
        logits = self.net(tokens[:, :-1])
        self.log("val", torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
seed, folder = int(sys.argv[1]), sys.argv[2]
L.seed_everything(seed)
loader = torch.utils.data.DataLoader(torch.randint(258, (32, 129)), batch_size=16)
logger = MLFlowLogger("peer", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=f"file://{folder}/artifacts")
trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=logger, default_root_dir=folder, enable_progress_bar=False)
trainer.fit(Plain(seed), loader, loader)
"""


def write_corpus(folder: Path) -> None:
    """Text of which each split gets some."""
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"it was the best of times number {number} " * 40)


def study(folder: Path, first: int, count: int) -> list[dict[str, float]]:
    """Run `count` seeds one at a time; for each the time it finished at, and its seconds of work."""
    path = folder / "overhead.yaml"
    path.write_text(STUDY.format(corpus=f"{folder}/*.txt", seeds=list(range(first, first + count))))
    finished = run_study(load_study(path), Store(folder / "store"), observer=Observer(), max_parallel=1)
    return [timing(run) for run in finished.runs]


def timing(run: Run) -> dict[str, float]:
    result, folder = run.last.result(), run.last.folder
    assert result is not None
    return {"finished": (folder / "result.json").stat().st_mtime, "work": sum(result["seconds"].values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peer-runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        study(folder, 0, 1)  # tokenises, opens MLflow, starts the fork server
        runs = study(folder, 1, options.runs)
        # One at a time, so each run's wall time is from the end of the one before it.
        ends = sorted(run["finished"] for run in runs)
        walls = [late - early for early, late in itertools.pairwise(ends)]
        works = [run["work"] for run in runs]
        peers = []
        script = folder / "peer.py"
        script.write_text(PEER)
        for seed in range(options.peer_runs + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, script, str(seed), name], check=True, capture_output=True)
            peers.append(time.perf_counter() - began)
    wall, work, peer = statistics.median(walls), statistics.median(works), statistics.median(peers[1:])
    found = {
        "run_seconds": wall,
        "steps_and_validation_seconds": work,
        "overhead_seconds": wall - work,
        "peer_run_seconds": peer,
        "peer_over_ours": peer / wall,
    }
    print(json.dumps({key: round(value, 3) for key, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
