"""How long `lit-llm report` takes for a large study: tables and figures of 3,000 finished runs that were never trained.

    python benchmarks/report.py [--seeds 3] [--lines 400]

1,000 arms (three crossed factors, ten levels each) are read from a store of made-up results and courses. The last line
is all of it, from reading the study to the files, without the making up; of that, reading the study and naming its
stages is the same work for `plan` and `status`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from rich.console import Console

from lit_llm.ablation.arms import load_study
from lit_llm.ablation.runs import Run, comparison_of, runs_of
from lit_llm.report.figures.study import figures_of, write_figures
from lit_llm.report.tables import comparison_table
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


def clocks() -> tuple[float, float]:
    """Seconds that have passed, and those of them that this process had a processor."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs are a thousand times as many")
    parser.add_argument("--lines", type=int, default=400, help="of each run's metrics.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, path = Store(folder / "store"), study_in(folder, options.seeds)
        began, whole = clocks(), (0.0, 0.0)

        def told(what: str, counts: bool = True) -> None:
            nonlocal began, whole
            wall, cpu = (now - then for now, then in zip(clocks(), began, strict=True))
            print(f"{what:34} {wall:7.1f} s   {cpu:7.1f} s of CPU", flush=True)
            whole = (whole[0] + wall * counts, whole[1] + cpu * counts)
            began = clocks()

        ablation = load_study(path)
        told("the study file")
        runs = runs_of(ablation, store)
        told(f"{len(runs)} runs named")
        for run in runs:
            finish(run, options.lines)
        told("(made-up results written)", counts=False)
        comparison = comparison_of(ablation, runs)
        told("comparison")
        with (folder / "tables.txt").open("w") as file:
            Console(file=file, width=120).print(comparison_table(comparison, 120))
        told("tables")
        drawn = figures_of(ablation, runs, comparison)
        told(f"{len(drawn)} figures drawn")
        write_figures(drawn, folder / "figures")
        told("figures written")
        print(f"report, whole: {whole[0]:.1f} s, {whole[1]:.1f} s of CPU")


if __name__ == "__main__":
    main()
