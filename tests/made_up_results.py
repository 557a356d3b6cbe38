"""Studies with results that were never trained: what a run would have left, written from a formula."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_llm.store.store import Store
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.runs import Run, runs_of

FACTORIAL = """
study: blocks
question: Where does the norm belong?
extends: decllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training: {{max_steps: 300}}
grid:
  design: factorial
  factors:
    model.attention.output_norm: [none, head]
    model.attention.qkv_norm: [[], [q, k, v]]
    pretrain.training.optimizer.lr: [1e-3, 1e-2]
seeds: [0, 1, 2]
compare:
  stratify_by: [pretrain.training.optimizer.lr]
{compare}
"""

Loss = Callable[[Run], float]


def study_of(folder: Path, corpus: Path, compare: str = "", text: str = FACTORIAL) -> Ablation:
    """A factorial of two norms within two learning rates, written to `folder`. compare: further lines of that key."""
    path = folder / "blocks.yaml"
    path.write_text(text.format(corpus=corpus, compare=compare))
    return load_study(path)


def loss_of(run: Run) -> float:
    """Each norm takes its part off, the learning rate adds to it, and seeds scatter."""
    levels, draw = run.arm.levels, random.Random(run.name)
    loss = 3.0 + 0.1 * run.seed + draw.gauss(0, 0.004)
    loss -= 0.2 * (levels.get("model.attention.output_norm") == "head")
    loss -= 0.1 * (levels.get("model.attention.qkv_norm") == "q+k+v")
    return loss + 0.3 * (levels.get("pretrain.training.optimizer.lr") == "0.01")


def finish(run: Run, loss: float, steps: Sequence[int] = range(10, 301, 10)) -> None:
    """Write the course and the result of a run that ends with a loss."""
    stage = run.last
    stage.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    metrics: dict[str, float] = {}
    for step in steps:
        here = loss + 2.0 / step - 2.0 / steps[-1]
        metrics = {
            "train/loss": here + 0.01,
            "stability/grad_norm": 1.0 + 1.0 / step,
            "stability/loss_spikes": 0.0,
            "tokens_seen": 128.0 * step,
            "flops": 1e6 * step,
            "val/target_nll": here,
            **({"test/target_nll": here} if step == steps[-1] else {}),
        }
        lines.append(json.dumps({"step": step, "time": float(step) + 0.1 * run.seed, "metrics": metrics}))
    stage.metrics_file.write_text("\n".join(lines) + "\n")
    result = {
        "state": "done",
        "metrics": metrics,
        "initial": {"val/target_nll": 8.0},
        "flops": metrics["flops"],
        "parameters": 12_345,
        "steps": steps[-1],
        "finished": 0.0,
        "provenance": {},
    }
    (stage.folder / "result.json").write_text(json.dumps(result))


def finished_runs(ablation: Ablation, store: Store, loss: Loss = loss_of) -> list[Run]:
    """All runs of a study, each with its result."""
    runs = runs_of(ablation, store)
    for run in runs:
        finish(run, loss(run))
    return runs
