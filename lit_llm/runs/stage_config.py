"""The frozen configuration of a stage, which later edits of files do not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_llm.config.problems import InputError, Problem
from lit_llm.config.section import validate
from lit_llm.config.tree import read_file, to_yaml
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.runs.fingerprints import (
    digest_of_data,
    digest_of_examples,
    digest_of_tasks,
    digests_of_texts,
    source_fingerprints,
)
from lit_llm.runs.provenance import provenance
from lit_llm.runs.stage_graph import PRETRAINS, Kind, StageNode
from lit_llm.store.files import Damaged, is_signed, read_verified, with_digest
from lit_llm.store.store import Stage, Store, write_text


@dataclass(frozen=True)
class StageConfig:
    """Configuration of a stage."""

    kind: Kind
    after: Trained
    """The stage that an evaluation follows; for a stage that trains, itself; for a trunk, the one that it begins."""
    evaluation: str
    """Name of the evaluation; empty for a stage that trains."""
    parent: str
    """Fingerprint of the stage with the initial weights, the decoder's of two, or of the trunk to go on from; empty
    without one."""
    origins: Mapping[str, str]
    """{side: fingerprint or checkpoint digest of its initial weights} of an adapted pretraining."""
    data: str
    """Digest of the pretraining's text, whose tokenizer all stages use."""
    examples: str
    """Digest of the instruction data; empty without any."""
    texts: Mapping[str, str]
    """{name: digest} of the texts that only an evaluation reads."""
    tasks: str
    """Digest of the user's task files; empty without any."""
    experiment: Experiment


def save_stage_config(store: Store, node: StageNode, experiment: Experiment) -> Stage:
    """Write a stage's configuration into the store. experiment: the run's; the node of a source has its own."""
    stage, experiment = store.stage(node.fingerprint), node.source or experiment
    content = {
        "stage": node.kind,
        "after": node.after,
        "evaluation": node.evaluation,
        "parent": node.parent,
        "origins": dict(source_fingerprints(experiment)) if node.kind in PRETRAINS else {},
        "data": digest_of_data(experiment),
        "examples": digest_of_examples(experiment) if node.kind not in PRETRAINS else "",
        "texts": digests_of_texts(experiment) if node.evaluation == "likelihood" else {},
        "tasks": digest_of_tasks(experiment) if node.evaluation == "tasks" else "",
        "experiment": experiment.model_dump(mode="json"),
    }
    write_text(stage.config_file, with_digest(to_yaml(content)))
    return stage


def halve_micro_batch(stage: Stage) -> int | None:
    """Halve the micro-batch size of a stage that trains; the batch size stays.

    Returns the new size. Returns None and changes nothing for an evaluation, for a micro-batch of one, and where the
    size decides the result (dropout, bf16_master, balanced experts): the user has to choose it for all arms.
    """
    frozen = load_stage_config(stage)
    section = frozen.experiment.section(frozen.after)
    now = section.training.execution.rows_at_once(section.data.batch_size)
    if frozen.kind == "evaluate" or now == 1 or provenance(frozen.experiment, frozen.after)["cut"] is not None:
        return None
    content = read_file(stage.config_file).plain()
    content["experiment"][frozen.after]["training"]["execution"]["micro_batch_size"] = now // 2
    write_text(stage.config_file, with_digest(to_yaml(content)))
    return now // 2


def is_frozen(stage: Stage) -> bool:
    """True where a stage's configuration exists, undamaged."""
    try:
        return is_signed(read_verified(stage.config_file))
    except (FileNotFoundError, Damaged):
        return False


def load_stage_config(stage: Stage) -> StageConfig:
    """Read a stage's configuration. Raises InputError for a damaged file."""
    try:
        read_verified(stage.config_file)
        content = read_file(stage.config_file)
        if "experiment" not in content.value:
            raise Damaged(stage.config_file, "is damaged: it holds no experiment")
    except Damaged as damage:
        raise InputError(Problem(f"{damage}; `lit-llm run STUDY` writes it again")) from None
    experiment = validate(Experiment, content.value["experiment"])
    rest = {key: node.plain() for key, node in content.value.items() if key != "experiment"}
    return StageConfig(kind=rest.pop("stage"), experiment=experiment, **rest)
