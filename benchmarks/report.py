"""How long `lit-llm report` takes for a large study: tables and figures of 3,000 finished runs that were never trained.

    python benchmarks/report.py [--levels 10] [--seeds 3] [--lines 400] [--documents 200]

1,000 arms (three crossed factors, ten levels each) are read from a store of made-up results: courses, metrics of both
held-out splits, and the losses of their single documents, from which the intervals over documents come. Reading the
study and naming its stages is timed apart: it is the same work for `plan` and `status`. The last line is the command
itself, in a process of its own; the CPU time in it is what a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lit_llm.config.metrics import SPLITS
from lit_llm.evaluation.unit_losses import UnitLosses, write_losses
from lit_llm.report.pages.study import write_report
from lit_llm.report.summary import render_study
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.runs import Run, runs_of

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


def study_in(folder: Path, levels: int, seeds: int) -> Path:
    """A study of levels³ arms over a text of a few words."""
    corpus, path = folder / "corpus.txt", folder / "large.yaml"
    corpus.write_text("a few words " * 1000)
    rates, decays, scales = ([round(step * (i + 1), 6) for i in range(levels)] for step in (1e-3, 1e-2, 1e-5))
    path.write_text(STUDY.format(corpus=corpus, rates=rates, decays=decays, scales=scales, seeds=list(range(seeds))))
    return path


def losses_of(draw: np.random.Generator, mean: float, documents: int) -> Iterator[UnitLosses]:
    """Losses of both splits: documents of all sizes, which are the same for every run, and easier or harder."""
    shared = np.random.default_rng(0)
    for split in SPLITS:
        tokens = np.ceil(shared.lognormal(5, 1, documents))
        losses = mean + shared.normal(0, 0.5, documents) + draw.normal(0, 0.05, documents)
        nats, sizes = (tokens * losses).tolist(), [int(count) for count in tokens]
        yield UnitLosses("", list(range(documents)), nats, sizes, [4 * size for size in sizes], split=split)


def measured(losses: UnitLosses) -> dict[str, float]:
    """The metrics of one split, by the losses of its documents."""
    assert losses.bytes is not None
    begin, nats = SPLITS[losses.split], math.fsum(losses.nats)
    nll = nats / sum(losses.tokens)
    return {
        f"{begin}target_nll": nll,
        f"{begin}objective_loss": nll,
        f"{begin}bits_per_byte": nats / math.log(2) / sum(losses.bytes),
        f"{begin}perplexity": math.exp(nll),
    }


def course_of(name: str, lines: int) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl but for the last evaluation: one in the middle of it."""
    draw, course = random.Random(name), []
    for step in range(10, 10 * lines + 1, 10):
        loss = 3 + 5 * step**-0.3 + draw.gauss(0, 0.01)
        metrics = {
            "train/loss": loss,
            "stability/grad_norm": 1 + draw.random(),
            "stability/loss_spikes": 0.0,
            "stability/max_attention_logit": 4.0 + step / 1000,
            "throughput/tokens_per_second": 1000 + 10 * draw.random(),
            "tokens_seen": 1024.0 * step,
            "flops": 1e9 * step,
            **({"val/target_nll": loss} if step == 10 * (lines // 2) else {}),
        }
        course.append({"step": step, "time": float(step), "metrics": metrics})
    return course


def finish(run: Run, number: int, lines: int, documents: int) -> None:
    """Write what a run would have left: a course of so many lines, the losses of documents, and a result."""
    stage, course = run.last, course_of(run.name, lines)
    stage.folder.mkdir(parents=True, exist_ok=True)
    last = course[-1]["metrics"]
    losses = list(losses_of(np.random.default_rng([1, number]), last["train/loss"], documents))
    for of_split in losses:
        last.update(measured(of_split))
    write_losses(stage.losses_file, losses)
    stage.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in course))
    result = {
        "schema": 1,
        "stage": "pretrain",
        "state": "done",
        "steps": course[-1]["step"],
        "metrics": last,
        "initial": {"val/target_nll": 8.0},
        "tokens": last["tokens_seen"],
        "loss_tokens": last["tokens_seen"] / 2,
        "flops": last["flops"],
        "parameters": 328_000,
        "seconds": {"training": 4.0 * lines, "evaluation": 1.0},
        "started": 0.0,
        "finished": 4.0 * lines,
        "provenance": {"version": "0.1.0", "code": "made up"},
    }
    (stage.folder / "result.json").write_text(json.dumps(result))


def clocks() -> tuple[float, float]:
    """(seconds by the clock, seconds of CPU in user mode of this process and of those that it has waited for)."""
    spent = os.times()
    return spent.elapsed, spent.user + spent.children_user


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=10, help="of each of three factors")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm")
    parser.add_argument("--lines", type=int, default=400, help="of each run's metrics.jsonl")
    parser.add_argument("--documents", type=int, default=200, help="of each held-out split")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, path = Store(folder / "store"), study_in(folder, options.levels, options.seeds)
        began = clocks()

        def told(what: str) -> None:
            nonlocal began
            wall, cpu = (now - before for now, before in zip(clocks(), began, strict=True))
            print(f"{what:34} {wall:7.1f} s   {cpu:7.1f} s of CPU (user)", flush=True)
            began = clocks()

        ablation = load_study(path)
        told("the study file")
        runs = runs_of(ablation, store)
        told(f"{len(runs)} runs named")
        for number, run in enumerate(runs):
            finish(run, number, options.lines, options.documents)
        told("(made-up results written)")
        shutil.copytree(folder / "store", folder / "again")
        comparison = comparison_of(ablation, runs)
        told("comparison")
        with (folder / "tables.txt").open("w") as file:
            Console(file=file, width=120).print(render_study(ablation, comparison, 120, store))
        told("tables in the terminal")
        planned = plan(ablation, built=False, runs=runs)
        told("costs and audit")
        files = write_report(planned, runs, comparison, store)
        told(f"{len(files)} files and folders written")
        # The command itself, in a process of its own: Python's start and all imports are in it.
        (folder / "again" / "studies" / "large").mkdir(parents=True)
        command = [sys.executable, "-m", "lit_llm", "report", str(path), "--store", str(folder / "again")]
        told("(made ready once more)")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        told("lit-llm report, whole")


if __name__ == "__main__":
    main()
