"""The card of a pushed model: what the run was for, what it is, what it has measured, and how to load it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.config.markup import code_span, markdown_text
from lit_llm.config.metrics import EVALUATED, FINETUNED, SPLITS, metric_of
from lit_llm.models.resolve import resolve_model
from lit_llm.report import text
from lit_llm.report.paper import printed_answer
from lit_llm.report.tables.table import Table, in_markdown
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.statistics.paired import mean_spread
from lit_llm.statistics.run_results import of_newest_provenance, values_by_arm
from lit_llm.studies.audit.findings import differs
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.runs import Run, StoredStage

PROVENANCE = (
    *("version", "code", "torch", "python", "device", "precision", "kernels", "threads", "devices", "strategy"),
    "changing_parts",
)
NAMES = {"version": "lit-llm", "code": "digest of its code", "changing_parts": "own callbacks and plugins"}
PROMPT = "Once"
SHOWN = (*SPLITS.values(), EVALUATED)
"""Beginnings of the metrics that a card shows; the others are of the training's course."""


@dataclass(frozen=True)
class Pushed:
    """A model to be pushed."""

    ablation: Ablation
    runs: Sequence[Run]
    """All runs of the study."""
    run: Run
    step: StoredStage
    """The stage whose weights are pushed."""
    folder: Path
    """The exported folder."""
    repo: str

    @property
    def earlier(self) -> list[StoredStage]:
        """The stages that have trained the weights, in their order."""
        trained = self.run.trained
        return trained[: trained.index(self.step) + 1]


def model_card(pushed: Pushed) -> str:
    """README.md of the repository."""
    from huggingface_hub import ModelCardData

    config = _config(pushed.folder)
    kind = dict.fromkeys(("decoder", "decoder_decoder", "double_decoder"), "text-generation")
    kind["encoder_only"] = "fill-mask"
    family = pushed.run.experiment.model.family
    data = ModelCardData(
        library_name="transformers" if config else "lit-llm",
        pipeline_tag=kind.get(family),
        tags=[
            "lit-llm",
            *([config["model_type"]] if config else []),
            *(["custom_code"] if "auto_map" in config else []),
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(_sections(pushed, config)) + "\n"


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of an export for transformers; empty for a folder of lit-llm."""
    path = folder / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _sections(pushed: Pushed, config: dict[str, Any]) -> Iterator[str]:
    study, arm = pushed.ablation.study, pushed.run.arm
    name = study.study if arm.name == study.study else f"{study.study}: {arm.name}"
    yield f"# {markdown_text(name)}"
    yield markdown_text(study.question)
    after = {"pretrain": "pretraining", "finetune": "finetuning"}[pushed.step.node.after]
    yield f"Weights after {after} with seed {pushed.run.seed}, trained and exported by lit-llm."
    yield _difference(pushed)
    yield in_markdown(Table("model", "Model", ["", "value"], [*_model(pushed)], 2, left=2))
    yield in_markdown(Table("training", "Training", ["", "value"], [*_training(pushed)], 2, left=2))
    yield from _results(pushed)
    yield f"## Load\n\n{_load(pushed, config)}"
    yield in_markdown(Table("provenance", "Provenance", ["", "value"], [*_provenance(pushed)], 2, left=2))


def _difference(pushed: Pushed) -> str:
    """Keys in which the arm differs from its baseline."""
    ablation, arm = pushed.ablation, pushed.run.arm
    if arm.baseline == arm.name:
        others = [markdown_text(other.name) for other in ablation.arms if other.name != arm.name]
        of = f"The baseline of the study's other arms: {', '.join(others)}." if others else "The study's only arm."
        return f"## What differs\n\n{of}"
    rows = [
        [key, text_of(old), text_of(new)]
        for key, (old, new) in differs(arm, ablation.arm(arm.baseline)).items()
        if (old, new) != (None, None)
    ]
    head = ["key", f"baseline ({arm.baseline})", "here"]
    return in_markdown(Table("differs", "What differs", head, rows, 3, left=3))


def text_of(value: Any) -> str:
    """A value of a configuration, files without their folders, which are of one machine."""
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {text_of(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return "–" if value is None else str(value)


def _model(pushed: Pushed) -> Iterator[list[str]]:
    from lit_llm.models.cost import count_parameters

    model = resolve_model(pushed.run.experiment.model)
    layers = [f"{len(side)} ({name})" for name, side in model.stacks if side]
    yield ["family", model.family.replace("_", "-")]
    yield ["parameters", f"{count_parameters(model).total:,}"]
    yield ["layers", " + ".join(layers)]
    yield ["d_model", f"{model.d_model:,}"]
    yield ["vocabulary", f"{model.vocabulary:,}"]


def _training(pushed: Pushed) -> Iterator[list[str]]:
    data = pushed.run.experiment.pretrain.data
    corpus = data.corpus.model_dump(mode="json", exclude_defaults=True)
    settings = ", ".join(f"{key}: {text_of(value)}" for key, value in corpus.items() if key != "kind")
    yield ["data", f"{data.corpus.kind}{settings and f' ({settings})'}"]
    yield ["tokenizer", data.tokenizer.kind]
    yield ["objective", pushed.run.experiment.pretrain.objective.kind]
    for step in pushed.earlier:
        result = step.stage.result() or {}
        figures = [
            f"{result['steps']:,} steps" if result.get("steps") else "",
            f"{text.count(result['tokens'])} tokens" if result.get("tokens") else "",
            f"{text.short(result['flops'])} FLOPs" if result.get("flops") else "",
        ]
        yield [step.node.name, ", ".join(filter(None, figures))]


def _results(pushed: Pushed) -> Iterator[str]:
    """Metrics of this run, and of the arm's seeds with the interval of their mean."""
    kept, arm = of_newest_provenance([run.result() for run in pushed.runs], []), pushed.run.arm.name
    rows, several = [], False
    for name, value in pushed.run.metrics().items():
        if value is None or not _is_of(name, pushed.step.node.after):
            continue
        values, metric = values_by_arm(kept, [arm], name)[arm], metric_of(name)
        several |= len(values) > 1
        row = [name, metric.unit if metric else "", text.value(value), str(len(values))]
        if values:
            spread, mean = mean_spread(values), statistics.fmean(values.values())
            half = None if spread is None else spread.half_width()
            interval = "" if half is None else f"[{text.value(mean - half)}, {text.value(mean + half)}]"
            rows.append([*row, text.value(mean), interval])
        else:
            rows.append([*row, "–", ""])
    if not rows:
        return
    head = ["metric", "unit", f"seed {pushed.run.seed}", "seeds", "mean", "95% interval"]
    if several:
        notes = (
            "The mean is over the seeds that did not diverge and whose results agree in code, device and kernels; the "
            "interval is of other seeds on the same documents.",
        )
        yield in_markdown(Table("results", "Results", head, rows, 6, notes, left=2))
    else:
        yield in_markdown(Table("results", "Results", head[:3], [row[:3] for row in rows], 3, left=2))
    comparison = comparison_of(pushed.ablation, pushed.runs)
    if comparison.has_results and len(pushed.ablation.arms) > 1:
        yield "\n".join(f"> {markdown_text(sentence)}" for sentence in printed_answer(pushed.ablation, comparison))


def _is_of(name: str, stage: str) -> bool:
    """True for a metric of a split or an evaluation that was measured on these weights."""
    tuned = name.startswith(FINETUNED)
    return tuned == (stage == "finetune") and name.removeprefix(FINETUNED).startswith(SHOWN)


def _load(pushed: Pushed, config: dict[str, Any]) -> str:
    repo = pushed.repo
    if not config:
        local = repo.rpartition("/")[2]
        lines = [f"hf download {repo} --local-dir {local}", f'lit-llm generate {local} "{PROMPT}"']
        return f"transformers has no such architecture; lit-llm reads the folder:\n\n{_code('bash', lines)}"
    remote = "auto_map" in config
    model_class = next(key for key in config["auto_map"] if "ForC" in key or "Seq2Seq" in key) if remote else ""
    model_class = model_class or config["architectures"][0]
    trust = ", trust_remote_code=True" if remote else ""
    tokens = pushed.folder / "tokenizer_config.json"
    tokenizer = json.loads(tokens.read_text(encoding="utf-8")) if tokens.is_file() else {}
    lines = [
        f"from transformers import {model_class}{', AutoTokenizer' * bool(tokenizer)}",
        "",
        f'model = {model_class}.from_pretrained("{repo}"{trust})',
    ]
    writes = pushed.run.experiment.model.family != "encoder_only"
    if tokenizer:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})',
            f'inputs = tokenizer("{PROMPT}", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
            if writes
            else "print(model(**inputs).logits.shape)",
        ]
    notes = [_code("python", lines)]
    if remote:
        path = config["auto_map"]["AutoConfig"].partition(".")[0]
        notes.append(f"The code is {code_span(f'{path}.py')} in this repository; it needs transformers 5.24 or later.")
    if pushed.run.experiment.section(pushed.step.node.after).masks.prefix == "bidirectional":
        notes.append("It was trained to see its prefix both ways, which transformers' causal mask hides.")
    return "\n\n".join(notes)


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _provenance(pushed: Pushed) -> Iterator[list[str]]:
    result = pushed.step.stage.result() or {}
    yield ["study", pushed.ablation.study.study]
    yield ["stage", pushed.step.node.fingerprint]
    if result.get("weights"):
        yield ["digest of the weights", result["weights"]]
    yield ["digest of the text", identity_of_data(pushed.run.experiment).digest]
    for key in PROVENANCE:
        if (value := result.get("provenance", {}).get(key)) is not None:
            yield [NAMES.get(key, key), str(value)]
    if result.get("stopped_by"):
        yield ["stopped by", str(result["stopped_by"])]
