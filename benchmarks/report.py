"""How long `lit-llm report` takes for a large study: tables and figures of 3,000 finished runs that were never trained.

    python benchmarks/report.py [--seeds 3] [--lines 400]

1,000 arms (three crossed factors, ten levels each) are read from a store of made-up results and courses. Reading the
study and naming its stages is timed apart: it is the same work for `plan` and `status`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from lit_llm.ablation.arms import load_study
from lit_llm.ablation.plan import plan
from lit_llm.ablation.runs import Run, comparison_of, runs_of
from lit_llm.report.study import write_report
from lit_llm.report.terminal import compared
from lit_llm.tracking.store import Store

STUDY = """
study: large
question: How long does a report take?
extends: decllm-tiny
base:
  pretrain: {{data: {{corpus: {{kind: text, files: ["{corpus}"]}}, tokenizer: bytes}}}}
grid:
  design: factorial
  factors:
    pretrain.training.optimizer.lr: {rates}
    pretrain.training.optimizer.weight_decay: {decays}
    pretrain.training.optimizer.eps: {scales}
seeds: {seeds}
"""


def study_in(folder: Path, seeds: int) -> Path:
    """A study of 1,000 arms over a text of a few words."""
    corpus, path = folder / "corpus.txt", folder / "large.yaml"
    corpus.write_text("a few words " * 1000)
    rates, decays, scales = ([round(step * (i + 1), 6) for i in range(10)] for step in (1e-3, 1e-2, 1e-5))
    path.write_text(STUDY.format(corpus=corpus, rates=rates, decays=decays, scales=scales, seeds=list(range(seeds))))
    return path


def finish(run: Run, lines: int) -> None:
    """Write what a run would have left: a course of so many lines, and a result."""
    stage, draw = run.last, random.Random(run.name)
    stage.folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    course = []
    for step in range(10, 10 * lines + 1, 10):
        loss = 3 + 5 * step**-0.3 + draw.gauss(0, 0.01)
        metrics = {
            "train/loss": loss,
            "stability/grad_norm": 1 + draw.random(),
            "stability/loss_spikes": 0.0,
            "stability/max_attention_logit": 4.0 + step / 1000,
            "tokens_seen": 1024.0 * step,
            "flops": 1e9 * step,
            **({"val/target_nll": loss} if step % (lines // 2) == 0 or step == 10 * lines else {}),
        }
        course.append(json.dumps({"step": step, "time": float(step), "metrics": metrics}))
    stage.metrics_file.write_text("\n".join(course) + "\n")
    result = {
        "state": "done",
        "metrics": metrics,
        "initial": {"val/target_nll": 8.0},
        "flops": metrics["flops"],
        "parameters": 328_000,
        "finished": 0.0,
        "provenance": {},
    }
    (stage.folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs are a thousand times as many")
    parser.add_argument("--lines", type=int, default=400, help="of each run's metrics.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, path = Store(folder / "store"), study_in(folder, options.seeds)
        began = time.perf_counter(), time.process_time()

        def told(what: str) -> None:
            nonlocal began
            now = time.perf_counter(), time.process_time()
            print(f"{what:34} {now[0] - began[0]:7.1f} s   {now[1] - began[1]:7.1f} s of CPU", flush=True)
            began = time.perf_counter(), time.process_time()

        ablation = load_study(path)
        told("the study file")
        runs = runs_of(ablation, store)
        told(f"{len(runs)} runs named")
        for run in runs:
            finish(run, options.lines)
        told("(made-up results written)")
        shutil.copytree(folder / "store", folder / "again")
        comparison = comparison_of(ablation, runs)
        told("comparison")
        with (folder / "tables.txt").open("w") as file:
            Console(file=file, width=120).print(compared(ablation, comparison, 120))
        told("tables in the terminal")
        planned = plan(ablation, built=False, runs=runs)
        told("costs and audit")
        files = write_report(planned, runs, comparison, store)
        told(f"{len(files)} files and folders written")
        # The command itself, in a process of its own: Python's start and all imports are in it.
        (folder / "again" / "studies" / "large").mkdir(parents=True)
        command = [sys.executable, "-m", "lit_llm.cli", "report", str(path), "--store", str(folder / "again")]
        told("(made ready once more)")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        told("lit-llm report, whole")


if __name__ == "__main__":
    main()
