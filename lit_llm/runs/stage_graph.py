"""The chain of an experiment's stages: pretrain, finetune, and evaluations after either, each a stage of its own.

```
[source ─] pretrain ─┬─ likelihood after pretrain, tasks after pretrain ...
                     └─ finetune ── likelihood after finetune, tasks after finetune ...
```
A stage's fingerprint holds its parent's, so experiments that agree up to a stage share all that comes before it. A
source is the pretraining of what an experiment is adapted from, which may have a source of its own; an
encoder-decoder may have one for each side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_llm.config.fingerprint import fingerprint
from lit_llm.config.metrics import EVALUATED, FINETUNED, SPLITS
from lit_llm.data.config import DataConfig, InstructionConfig
from lit_llm.experiment.schema import Experiment, Trained
from lit_llm.runs.fingerprints import (
    digest_of_examples,
    digest_of_tasks,
    digests_of_texts,
    origins,
    pretrain_fingerprint,
    version_or_none,
)

Kind = Literal["pretrain", "finetune", "evaluate"]


SOURCE, ENCODER_SOURCE = "source/", "encoder_source/"
"""How names of metrics begin that are of a source of an adaptation, where those of all stages stand together."""


def validation_metric(name: str) -> str:
    """What is measured on the validation split like this metric of the test split: `val/...` of `test/...`.

    Choices are made by it: of learning rates, settings and further seeds. Other metrics are returned as they are.
    """
    return _in_other_split(name, "test", "validation")


def final_metric(name: str) -> str:
    """What is measured on the test split like this metric of the validation split; others are returned as they are."""
    return _in_other_split(name, "validation", "test")


def _in_other_split(name: str, split: str, other: str) -> str:
    stage = _STAGES.match(name)
    assert stage is not None
    begin, rest = SPLITS[split], name[stage.end() :]
    return f"{stage[0]}{SPLITS[other]}{rest.removeprefix(begin)}" if rest.startswith(begin) else name


_STAGES = re.compile(f"(?:{ENCODER_SOURCE}|{SOURCE}|{FINETUNED})*")


@dataclass(frozen=True)
class StageNode:
    """One stage of a chain."""

    kind: Kind
    fingerprint: str
    parent: str = ""
    """Fingerprint of the stage whose weights it begins with; empty for the first. Of two sources, the decoder's."""
    after: Trained = "pretrain"
    """The stage that an evaluation follows; of one that trains, itself."""
    evaluation: str = ""
    """Which one, as its section is called; empty for a stage that trains."""
    parents: tuple[str, ...] = ()
    """Fingerprints of all stages that have to be there before it, `parent` among them."""
    source: Experiment | None = field(default=None, repr=False, compare=False)
    """The experiment that it belongs to, where that is not the chain's own but what it is adapted from."""
    place: str = ""
    """How the names of a source's metrics begin: `source/`, or `encoder_source/` of the encoder's alone."""

    @property
    def name(self) -> str:
        """For people, and the key in `plan --json`."""
        if self.source is not None:
            return self.place.rstrip("/")
        return f"{self.evaluation} after {self.after}" if self.kind == "evaluate" else self.kind

    @property
    def scope(self) -> str:
        """How the names of its metrics begin, among those of the whole chain."""
        return f"{self.prefix}{self.evaluation}/" if self.kind == "evaluate" else self.prefix

    @property
    def prefix(self) -> str:
        """Put before the names of its metrics."""
        return self.place + FINETUNED * (self.after == "finetune") + EVALUATED * (self.kind == "evaluate")


def stage_graph(experiment: Experiment) -> tuple[StageNode, ...]:
    """Its stages, each after its parent. Reads the data, for their digests; raises InputError where it cannot."""
    nodes = _sources(experiment)
    parents = _parents(experiment)
    for stage in experiment.trained:
        parent = parents[0] if parents else ""
        trained = pretrain_fingerprint(experiment) if stage == "pretrain" else _finetune_fingerprint(experiment, parent)
        nodes.append(StageNode(stage, trained, parent, stage, parents=parents))
        for name in experiment.evaluations(stage):
            evaluated = _evaluate_fingerprint(experiment, trained, name)
            nodes.append(StageNode("evaluate", evaluated, trained, stage, name, parents=(trained,)))
        parents = (trained,)
    return tuple(nodes)


def _sources(experiment: Experiment, place: str = "") -> list[StageNode]:
    """The pretrainings that it begins with, each once and after those that it begins with itself."""
    nodes: dict[str, StageNode] = {}
    for side, given in (experiment.adapt.experiments if experiment.adapt else {}).items():
        source, at = given.seeded(experiment.seed), f"{place}{ENCODER_SOURCE if side == 'encoder' else SOURCE}"
        parents, name = _parents(source), pretrain_fingerprint(source)
        node = StageNode("pretrain", name, parents[0] if parents else "", parents=parents, source=source, place=at)
        for each in (*_sources(source, at), node):
            nodes.setdefault(each.fingerprint, each)
    return list(nodes.values())


def _parents(experiment: Experiment) -> tuple[str, ...]:
    """Fingerprints of the pretrainings that its own begins with, the decoder's first."""
    names = origins(experiment)
    return tuple(dict.fromkeys(names[side] for side in (experiment.adapt.experiments if experiment.adapt else ())))


def _finetune_fingerprint(experiment: Experiment, parent: str) -> str:
    """H(parent, finetune, examples)."""
    assert experiment.finetune is not None
    stage = experiment.finetune.model_dump(mode="json")
    stage["data"] = {"batch_size": stage["data"]["batch_size"]}  # the rest is in the examples' digest
    stage["validation"]["final_examples"] = experiment.finetune.validation.most_examples
    del stage["training"]["execution"]
    return fingerprint(
        {"stage": "finetune", "parent": parent, "finetune": stage, "data": digest_of_examples(experiment)}
    )


def _evaluate_fingerprint(experiment: Experiment, parent: str, name: str) -> str:
    """H(parent, the evaluation's section, what it reads beside the parent's data)."""
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
    return fingerprint({"stage": "evaluate", "parent": parent, **content})
