"""The graph of an experiment's stages: pretrain, finetune, and evaluations after either.

```
[source ─] [trunk ─] pretrain ─┬─ likelihood after pretrain, tasks after pretrain ...
                               └─ finetune ── likelihood after finetune, tasks after finetune ...
```
A stage's fingerprint includes its parent's, so experiments that agree up to a stage share all stages before it. A
source is the pretraining of a model that an experiment is adapted from. It may have a source too; an encoder-decoder
may have one for each side. A trunk is the first part of a pretraining that other experiments share
(`schedule.branch_at`), with one stage for each step where they branch off. Its fingerprint says where it ends, not
where the stages before it end, which decide nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lit_llm.config.hashing import Template
from lit_llm.config.metrics import EVALUATED, FINETUNED, SPLITS
from lit_llm.data.config import DataConfig, InstructionConfig
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.runs.fingerprints import (
    digest_of_examples,
    digest_of_tasks,
    digests_of_texts,
    from_template,
    pretrain_fingerprint,
    source_fingerprints,
    trunk_fingerprint,
    version_or_none,
)

Kind = Literal["trunk", "pretrain", "finetune", "evaluate"]
PRETRAINS: tuple[Kind, ...] = ("trunk", "pretrain")
"""Kinds of the stages of a pretraining."""


SOURCE, ENCODER_SOURCE = "source/", "encoder_source/"
"""Prefixes of the metrics of an adaptation's sources, among the metrics of all stages."""


def validation_metric(name: str) -> str:
    """The validation metric of a test metric: `val/...` for `test/...`. Other metrics are returned unchanged.

    Learning rates, settings and further seeds are chosen by it.
    """
    return _in_other_split(name, "test", "validation")


def final_metric(name: str) -> str:
    """The test metric of a validation metric; other metrics are returned unchanged."""
    return _in_other_split(name, "validation", "test")


def _in_other_split(name: str, split: str, other: str) -> str:
    stage = _STAGES.match(name)
    assert stage is not None
    begin, rest = SPLITS[split], name[stage.end() :]
    return f"{stage[0]}{SPLITS[other]}{rest.removeprefix(begin)}" if rest.startswith(begin) else name


_STAGES = re.compile(f"(?:{ENCODER_SOURCE}|{SOURCE}|{FINETUNED})*")


@dataclass(frozen=True)
class StageNode:
    """One stage of the graph."""

    kind: Kind
    fingerprint: str
    parent: str = ""
    """Fingerprint of the stage with the initial weights, the decoder's of two sources; empty for the first."""
    after: Trained = "pretrain"
    """The stage that an evaluation follows; for a stage that trains, itself; for a trunk, the one that it begins."""
    evaluation: str = ""
    """Section of the evaluation; empty for a stage that trains."""
    parents: tuple[str, ...] = ()
    """Fingerprints of all stages that it needs, `parent` included."""
    source: Experiment | None = field(default=None, repr=False, compare=False)
    """The experiment of a source or of a trunk; None for a stage of the run's own experiment."""
    place: str = ""
    """Prefix of a source's metrics: `source/`, or `encoder_source/` for a source of the encoder alone."""
    begin: int = 0
    """Step of a trunk from which it goes on; 0 without one."""
    steps_after_trunk: int = 0
    """Steps that it trains after that step; 0 without a trunk."""

    @property
    def name(self) -> str:
        """Name of the stage in tables, and its key in `plan --json`."""
        if self.kind == "trunk" and self.source is not None:
            return f"{self.place}trunk_{self.source.pretrain.training.max_steps}"
        if self.source is not None:
            return self.place.rstrip("/")
        return f"{self.evaluation} after {self.after}" if self.kind == "evaluate" else self.kind

    @property
    def scope(self) -> str:
        """Prefix of the stage's metrics among those of all stages, evaluation included."""
        if self.kind == "trunk":  # of none, as they are also the pretraining's
            return f"{self.name}/"
        return f"{self.prefix}{self.evaluation}/" if self.kind == "evaluate" else self.prefix

    @property
    def prefix(self) -> str:
        """Prefix that is added to the names of the stage's metrics."""
        return self.place + FINETUNED * (self.after == "finetune") + EVALUATED * (self.kind == "evaluate")


def stage_graph(experiment: Experiment) -> tuple[StageNode, ...]:
    """The stages of an experiment, parents first. Reads the data for digests; raises InputError where it cannot."""
    nodes = _sources(experiment)
    parents = _parents(experiment)
    for stage in experiment.trained:
        if stage == "pretrain":
            nodes += _pretraining(experiment, parents)
        else:
            tuned = _finetune_fingerprint(experiment, parents[0])
            nodes.append(StageNode(stage, tuned, parents[0], stage, parents=parents))
        trained = nodes[-1].fingerprint
        for name in experiment.evaluations(stage):
            evaluated = _evaluate_fingerprint(experiment, trained, name)
            nodes.append(StageNode("evaluate", evaluated, trained, stage, name, parents=(trained,)))
        parents = (trained,)
    return tuple(nodes)


def _pretraining(
    experiment: Experiment, sources: tuple[str, ...], source: Experiment | None = None, place: str = ""
) -> list[StageNode]:
    """The stages of a pretraining: its trunk, where it has one, and the rest.

    sources: fingerprints of its sources. source, place: those of the rest's node.
    """
    nodes, parents, begin = list[StageNode](), sources, 0

    def node(kind: Kind, name: str, source: Experiment | None, end: int) -> StageNode:
        node = StageNode(kind, name, parents[0] if parents else "", parents=parents, source=source, place=place)
        return replace(node, begin=begin, steps_after_trunk=end - begin) if begin else node

    training = experiment.pretrain.training
    for steps in training.trunks:
        name, trunk = trunk_fingerprint(experiment, steps), experiment.trunk(steps, experiment.seed)
        nodes.append(node("trunk", name, trunk, steps))
        parents, begin = (name, *sources), steps
    parents = parents[:1] if nodes else parents  # the trunk stands for its sources
    return [*nodes, node("pretrain", pretrain_fingerprint(experiment), source, training.max_steps)]


def _sources(experiment: Experiment, place: str = "") -> list[StageNode]:
    """Source pretrainings of an experiment, each once, after its own sources."""
    nodes: dict[str, StageNode] = {}
    for side, given in (experiment.adapt.experiments if experiment.adapt else {}).items():
        source, at = given.seeded(experiment.seed), f"{place}{ENCODER_SOURCE if side == 'encoder' else SOURCE}"
        for each in (*_sources(source, at), *_pretraining(source, _parents(source), source, at)):
            nodes.setdefault(each.fingerprint, each)
    return list(nodes.values())


def _parents(experiment: Experiment) -> tuple[str, ...]:
    """Fingerprints of the source pretrainings, the decoder's first."""
    names = source_fingerprints(experiment)
    return tuple(dict.fromkeys(names[side] for side in (experiment.adapt.experiments if experiment.adapt else ())))


def _finetune_fingerprint(experiment: Experiment, parent: str) -> str:
    """Hash of the parent, the finetuning section and the examples."""
    assert experiment.finetune is not None
    sections = (experiment.pretrain, experiment.finetune)
    return from_template(sections, lambda: Template(_finetuning(experiment), "parent"), parent)


def _finetuning(experiment: Experiment) -> dict[str, Any]:
    """Settings and data that a finetuning depends on, but for its parent."""
    assert experiment.finetune is not None
    stage = experiment.finetune.model_dump(mode="json")
    stage["data"] = {"batch_size": stage["data"]["batch_size"]}  # the examples' digest covers the rest
    stage["validation"]["final_examples"] = experiment.finetune.validation.most_examples
    del stage["training"]["execution"]
    return {"stage": "finetune", "finetune": stage, "data": digest_of_examples(experiment)}


def _evaluate_fingerprint(experiment: Experiment, parent: str, name: str) -> str:
    """Hash of the parent, the evaluation's section and the further data that it reads."""
    assert experiment.evaluate is not None
    sections = (experiment.pretrain, experiment.finetune, experiment.evaluate, name)
    return from_template(sections, lambda: Template(_evaluation(experiment, name), "parent"), parent)


def _evaluation(experiment: Experiment, name: str) -> dict[str, Any]:
    """Settings and data that an evaluation depends on, but for its parent."""
    config, window = experiment.evaluate, experiment.pretrain.data.sequence_length
    assert config is not None
    section: dict[str, Any] = getattr(config, name).model_dump(mode="json")
    reads: Any = None
    data: DataConfig | InstructionConfig | None = experiment.pretrain.data
    if name == "examples" and experiment.finetune is not None:
        reads, data = digest_of_examples(experiment), experiment.finetune.data
    elif config.likelihood is not None and name == "likelihood":
        section = config.likelihood.resolved(window).model_dump(mode="json", exclude={"corpora"})
        reads = digests_of_texts(experiment)
    elif config.tasks is not None and name == "tasks":
        section |= {"folder": None, "max_length": config.tasks.max_length or window}
        reads, data = {"files": digest_of_tasks(experiment), "lm_eval": version_or_none("lm_eval")}, None
    content = {"evaluation": name, "section": section, "precision": config.precision, "data": reads}
    if data is not None:
        content["split"] = config.split if data.has_test else "validation"
    return {"stage": "evaluate", **content}
