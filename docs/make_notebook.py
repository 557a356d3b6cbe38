"""Write and execute docs/notebook.ipynb, the example of a study in a notebook: `python docs/make_notebook.py`.

Needs nbformat, nbclient and ipykernel (the extra `dev`).
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
STUDY = """%%writefile qkv_norm.yaml
study: qkv_norm
question: Does a norm on queries, keys and values help a small decoder-only model early in training?
extends: decllm-tiny
base:
  model: {vocabulary: 258, decoder: {layers: 2}}
  pretrain:
    data: {tokenizer: bytes, sequence_length: 64, batch_size: 8}
    training: {max_steps: 60}
grid: {factors: {"model.attention.qkv_norm": [[q, k, v], []]}}
seeds: [0, 1, 2]
compare: {metric: test/target_nll}
"""
CELLS: list[tuple[str, str]] = [
    (
        "markdown",
        "# A study in a notebook\n\nWritten by `python docs/make_notebook.py`. It takes about a minute of two CPU "
        "cores, most of it for the first run. [Python](python-api.md) has the functions.",
    ),
    ("code", STUDY),
    (
        "markdown",
        "The plan, before anything is trained: what differs, and what each arm costs. An unfair study is refused here.",
    ),
    (
        "code",
        "import pandas as pd\n\nfrom lit_llm.studies.load import load_study\nfrom lit_llm.studies.plan import plan\n\n"
        'planned = plan(load_study("qkv_norm.yaml"))\nplanned.check()\n'
        'pd.DataFrame({arm.arm.name: {"parameters": arm.cost.parameters, **dict(arm.differs)} for arm in '
        "planned.arms}).T",
    ),
    ("markdown", "Run it. Each run has a process of its own; the table below is drawn live, and what is done is kept."),
    (
        "code",
        "from lightning.pytorch.loggers import CSVLogger\n\nimport lit_llm\n\n"
        'finished = lit_llm.run("qkv_norm.yaml", trainer=lit_llm.TrainerParts(loggers=[CSVLogger]))',
    ),
    ("markdown", "The arms, each against the baseline, with paired differences over seeds."),
    (
        "code",
        "arms = finished.comparison.to_frame()\n"
        'arms[["arm", "seeds", "mean", "difference", "low", "high", "verdict"]].round(3)',
    ),
    ("markdown", "The runs, and the logged steps of one."),
    ("code", 'finished.to_frame()[["arm", "seed", "state", "val/target_nll", "test/target_nll"]].round(3)'),
    ("code", 'finished.runs[0].to_frame()[["step", "train/loss", "train/lr", "val/target_nll"]].dropna().round(4)'),
    (
        "markdown",
        "One model in a Trainer of your own, with any callback of Lightning's: the same steps and the same data.",
    ),
    (
        "code",
        "import lightning as L\nfrom lightning.pytorch.callbacks import EarlyStopping\n\n"
        'experiment = load_study("qkv_norm.yaml").arms[0].experiment\n'
        "lit, data = lit_llm.LitExperiment(experiment), lit_llm.LitData(experiment)\n"
        'trainer = L.Trainer(\n    **lit.trainer_options,\n    callbacks=[EarlyStopping("val/target_nll")],\n'
        "    logger=False,\n    enable_checkpointing=False,\n    enable_progress_bar=False,\n"
        "    enable_model_summary=False,\n)\ntrainer.fit(lit, datamodule=data)\n"
        'round(float(trainer.callback_metrics["val/target_nll"]), 3)',
    ),
]


def notebook() -> Any:
    """The notebook without outputs."""
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    kinds = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made.cells = [kinds[kind](text, id=f"cell-{number}") for number, (kind, text) in enumerate(CELLS)]
    return made


def executed(folder: Path) -> Any:
    """The notebook with its outputs, executed in a folder. Raises CellExecutionError for a cell that fails."""
    made = notebook()
    NotebookClient(made, timeout=600, resources={"metadata": {"path": str(folder)}}, record_timing=False).execute()
    for cell in made.cells:
        cell.get("metadata", {}).pop("execution", None)
        for output in cell.get("outputs", ()):
            _without_places(output, folder)
    return made


def _without_places(output: Any, folder: Path) -> None:
    """Take this machine's paths and messages on the standard error stream out of an output."""
    if output.output_type == "stream" and output.name == "stderr":
        output.text = ""
    for place in [output, *([output.data] if "data" in output else [])]:
        for key, value in place.items():
            if isinstance(value, str):
                place[key] = re.sub(rf"{re.escape(str(folder))}/?", "", value)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = executed(Path(folder))
    for cell in made.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text", "x")]
    nbformat.write(made, NOTEBOOK)
    sys.stdout.write(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
