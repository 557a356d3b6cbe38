"""The chain of an experiment's stages: pretrain, finetune, and an evaluation after either.

```
pretrain ─┬─ evaluate after pretrain
          └─ finetune ── evaluate after finetune
```
A stage's fingerprint holds its parent's, so experiments that agree up to a stage share all that comes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.config.fingerprint import fingerprint
from lit_llm.evaluation.config import EVALUATIONS
from lit_llm.experiment.config import Experiment, Trained
from lit_llm.experiment.identity import (
    digest_of_examples,
    digest_of_tasks,
    digests_of_texts,
    pretrain_fingerprint,
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

    @property
    def name(self) -> str:
        """For people, and the key in `plan --json`."""
        return f"evaluate after {self.after}" if self.kind == "evaluate" else self.kind

    @property
    def prefix(self) -> str:
        """Put before the names of its metrics."""
        return FINETUNED * (self.after == "finetune") + EVALUATED * (self.kind == "evaluate")


def chain(experiment: Experiment) -> tuple[Link, ...]:
    """Its stages, each after its parent. Reads the data, for their digests; raises InputError where it cannot."""
    links = [Link("pretrain", pretrain_fingerprint(experiment))]
    if experiment.finetune is not None:
        parent = links[0].fingerprint
        links.append(Link("finetune", _finetune_fingerprint(experiment, parent), parent, "finetune"))
    trained = {link.kind: link.fingerprint for link in links}
    for after in experiment.evaluated:
        link = Link("evaluate", _evaluate_fingerprint(experiment, trained[after]), trained[after], after)
        links.insert(1 + next(i for i, other in enumerate(links) if other.fingerprint == link.parent), link)
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


def _evaluate_fingerprint(experiment: Experiment, parent: str) -> str:
    """H(parent, evaluate, what it reads beside the parent's data)."""
    config, window = experiment.evaluate, experiment.pretrain.data.sequence_length
    assert config is not None
    stage = config.model_dump(mode="json", include={"precision", *EVALUATIONS})
    reads: dict[str, Any] = {}
    if config.examples is not None:
        reads["examples"] = digest_of_examples(experiment)
    if config.likelihood is not None:
        stage["likelihood"] = config.likelihood.resolved(window).model_dump(mode="json", exclude={"corpora"})
        reads["texts"] = digests_of_texts(experiment)
    if config.tasks is not None:
        stage["tasks"] |= {"folder": None, "max_length": config.tasks.max_length or window}
        reads["tasks"] = digest_of_tasks(experiment)
    made = {name: value for name, value in stage.items() if value is not None}
    return fingerprint({"stage": "evaluate", "parent": parent, "evaluate": made, "data": reads})
