"""The chain of an experiment's stages: pretrain, finetune, and evaluations after either, each a stage of its own.

```
pretrain ─┬─ likelihood after pretrain, tasks after pretrain ...
          └─ finetune ── likelihood after finetune, tasks after finetune ...
```
A stage's fingerprint holds its parent's, so experiments that agree up to a stage share all that comes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.config.fingerprint import fingerprint
from lit_llm.experiment.config import Experiment, Trained
from lit_llm.experiment.identity import (
    digest_of_examples,
    digest_of_tasks,
    digests_of_texts,
    pretrain_fingerprint,
    version_or_none,
)

Kind = Literal["pretrain", "finetune", "evaluate"]


FINETUNED, EVALUATED = "finetune/", "eval/"
"""Put before the names of metrics where those of a whole chain stand together: `finetune/eval/examples/nll`."""


@dataclass(frozen=True)
class Link:
    """One stage of a chain."""

    kind: Kind
    fingerprint: str
    parent: str = ""
    """Fingerprint of the stage whose weights it begins with; empty for the first."""
    after: Trained = "pretrain"
    """The stage that an evaluation follows; of one that trains, itself."""
    evaluation: str = ""
    """Which one, as its section is called; empty for a stage that trains."""

    @property
    def name(self) -> str:
        """For people, and the key in `plan --json`."""
        return f"{self.evaluation} after {self.after}" if self.kind == "evaluate" else self.kind

    @property
    def scope(self) -> str:
        """How the names of its metrics begin, among those of the whole chain."""
        return f"{self.prefix}{self.evaluation}/" if self.kind == "evaluate" else self.prefix

    @property
    def prefix(self) -> str:
        """Put before the names of its metrics."""
        return FINETUNED * (self.after == "finetune") + EVALUATED * (self.kind == "evaluate")


def chain(experiment: Experiment) -> tuple[Link, ...]:
    """Its stages, each after its parent. Reads the data, for their digests; raises InputError where it cannot."""
    links: list[Link] = []
    parent = ""
    for stage in experiment.trained:
        own = pretrain_fingerprint(experiment) if stage == "pretrain" else _finetune_fingerprint(experiment, parent)
        links.append(Link(stage, own, parent, stage))
        for name in experiment.evaluations(stage):
            links.append(Link("evaluate", _evaluate_fingerprint(experiment, own, name), own, stage, name))
        parent = own
    return tuple(links)


def _finetune_fingerprint(experiment: Experiment, parent: str) -> str:
    """H(parent, finetune, examples)."""
    assert experiment.finetune is not None
    stage = experiment.finetune.model_dump(mode="json")
    stage["data"] = {"batch_size": stage["data"]["batch_size"]}  # the rest is in the examples' digest
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
    if name == "examples":
        reads = digest_of_examples(experiment)
    elif config.likelihood is not None and name == "likelihood":
        section = config.likelihood.resolved(window).model_dump(mode="json", exclude={"corpora"})
        reads = digests_of_texts(experiment)
    elif config.tasks is not None and name == "tasks":
        section |= {"folder": None, "max_length": config.tasks.max_length or window}
        reads = {"files": digest_of_tasks(experiment), "lm_eval": version_or_none("lm_eval")}
    content = {"evaluation": name, "section": section, "precision": config.precision, "data": reads}
    return fingerprint({"stage": "evaluate", "parent": parent, **content})
