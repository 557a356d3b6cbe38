"""Fingerprints of stages, and digests of the texts that enter them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from lit_llm.config.hashing import Template, fingerprint
from lit_llm.data.instructions import identify_examples
from lit_llm.data.sources import Identity, Source, error_context, identify, identify_held_out
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.experiment.schema import Checkpoint, Experiment
from lit_llm.models.adapt import Side
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.provenance import installed_version

_identities: dict[tuple[str, ...], Any] = {}
"""{request: identity of a text}, as plain data, so that a store can keep it."""
_templates: dict[tuple[int, ...], tuple[Sequence[object], Template]] = {}
"""{ids of sections: (the sections, which live as long as their ids are used, template)}."""
_TEMPLATES = 64


def reset_identities(stored: Sequence[Sequence[Any]] = ()) -> None:
    """Forget all identities, so that files are read again: a notebook may have edited its corpus.

    stored: earlier return value of `identities`; these texts are not read.
    """
    _identities.clear()
    _templates.clear()
    _identities.update({tuple(request): identity for request, identity in stored})


def from_template(sections: Sequence[object], make: Callable[[], Template], value: Any) -> str:
    """A fingerprint by a template that is made once for these sections, so that an arm's seeds share it.

    sections: all that the template depends on. Seeded copies of an experiment have the same sections.
    """
    key = tuple(map(id, sections))
    _, template = _templates.get(key, (None, None))
    if template is None:
        template = make()
        if len(_templates) >= _TEMPLATES:
            _templates.clear()
        _templates[key] = (sections, template)
    return template.fingerprint(value)


def identities() -> list[list[Any]]:
    """[request, identity] of every text since `reset_identities`, as plain data."""
    return [[list(request), identity] for request, identity in _identities.items()]


def _identity(request: tuple[str, ...], find: Callable[[], Any]) -> Any:
    """The identity of a request, computed once until `reset_identities`."""
    if request not in _identities:
        _identities[request] = find()
    return _identities[request]


def identity_of_data(experiment: Experiment) -> Identity:
    """Identity of the pretraining's tokens. Reads the corpus, once until `reset_identities`.

    Raises InputError if it cannot be read.
    """
    data = experiment.pretrain.data
    fields = _identity(("data", data.model_dump_json()), lambda: asdict(identify(data)))
    return Identity(fields["digest"], fields["tokenizer"], tuple(Source(**source) for source in fields["sources"]))


def digest_of_data(experiment: Experiment) -> str:
    """Digest of the pretraining's tokens; see `identity_of_data`."""
    return identity_of_data(experiment).digest


def digest_of_examples(experiment: Experiment) -> str:
    """Identity of the instruction data, read like `identity_of_data`; empty without any."""
    if experiment.finetune is None:
        return ""
    data, tokenizer = experiment.finetune.data, identity_of_data(experiment).tokenizer
    return _identity(("examples", data.model_dump_json(), tokenizer), lambda: identify_examples(data, tokenizer))


def digests_of_texts(experiment: Experiment) -> dict[str, str]:
    """{name: identity} of texts that only the evaluation reads; read like `identity_of_data`."""
    evaluate, data = experiment.evaluate, experiment.pretrain.data
    if evaluate is None or evaluate.likelihood is None or not evaluate.likelihood.corpora:
        return {}
    likelihood, tokenizer = evaluate.likelihood, identity_of_data(experiment).tokenizer

    def find() -> dict[str, str]:
        with error_context("evaluate.likelihood.corpora", instead_of="corpora"):
            return identify_held_out(likelihood.corpora, data, tokenizer)

    return _identity(("texts", likelihood.model_dump_json(), data.model_dump_json(), tokenizer), find)


def digest_of_tasks(experiment: Experiment) -> str:
    """Identity of the user's task files; empty without any. Raises InputError as `read_task_files`."""
    tasks = experiment.evaluate.tasks if experiment.evaluate is not None else None
    folder = None if tasks is None else tasks.folder
    return "" if folder is None else _identity(("tasks", str(folder)), lambda: read_task_files(Path(folder)))


def pretrain_fingerprint(experiment: Experiment) -> str:
    """Hash of the resolved model, the pretraining, its data, the seed and the adaptation.

    Names, paths and execution settings do not count.
    """
    return _seeded_fingerprint(experiment, lambda: _pretraining(experiment))


def trunk_fingerprint(experiment: Experiment, steps: int) -> str:
    """Hash of all that decides the weights at a step of an experiment's trunk, and its loss before the first."""
    return _seeded_fingerprint(experiment, lambda: _trunk(experiment.trunk(steps, experiment.seed)), steps)


def _seeded_fingerprint(experiment: Experiment, content: Callable[[], dict[str, Any]], *part: object) -> str:
    """Hash of the content of a pretraining, of the experiment's seed and its adaptation.

    part: what decides the content besides the experiment's sections; the same object for all seeds.
    """
    if (adapt := experiment.adapt) is None:
        sections = (experiment.model, experiment.pretrain, *part)
        return from_template(sections, lambda: Template(content(), "seed"), experiment.seed)
    distill = adapt.distill.model_dump(mode="json") if adapt.distill else None
    sources = {"from": source_fingerprints(experiment), "warmup_steps": adapt.warmup_steps, "distill": distill}
    return fingerprint({**content(), "seed": experiment.seed, "adapt": sources})


def _pretraining(experiment: Experiment) -> dict[str, Any]:
    """What a pretraining from scratch depends on, but for the seed."""
    pretrain, length = experiment.pretrain, experiment.pretrain.data.sequence_length
    stage = pretrain.model_dump(mode="json")
    stage["objective"] = pretrain.objective.resolved(length).model_dump(mode="json")
    stage["validation"]["prefix_length"] = pretrain.validation.prefix(length)
    stage["validation"]["final_sequences"] = pretrain.validation.most_sequences
    del stage["training"]["execution"]
    for key in ("corpus", "tokenizer", "validation_fraction", "test_fraction", "near_duplicates"):
        del stage["data"][key]
    content: dict[str, Any] = {
        "stage": "pretrain",
        "model": resolve_model(experiment.model).model_dump(mode="json"),
        "pretrain": stage,
        "data": digest_of_data(experiment),
    }
    if trunks := pretrain.training.trunks:
        del stage["training"]["schedule"]["branch_at"]
        content["trunk"] = trunks[-1]  # the other steps decide nothing
    return content


def _trunk(experiment: Experiment) -> dict[str, Any]:
    """What a trunk depends on, but for the seed; it has no validation but that before the first step."""
    content = _pretraining(experiment)
    for later in ("times", "final_sequences"):
        del content["pretrain"]["validation"][later]
    return {**content, "stage": "trunk"}


def source_fingerprints(experiment: Experiment) -> dict[Side, str]:
    """{side: fingerprint of the source pretraining, or digest of the source checkpoint}."""
    return {
        side: given.digest if isinstance(given, Checkpoint) else pretrain_fingerprint(given.seeded(experiment.seed))
        for side, given in (experiment.adapt.sides.items() if experiment.adapt else ())
    }


def version_or_none(library: str) -> str | None:
    """Version of a library that may be missing; kept like the identity of a text, as an evaluation depends on it."""

    def find() -> str | None:
        try:
            return installed_version(library)
        except PackageNotFoundError:
            return None

    return _identity(("library", library), find)
