"""Studies kept in a store, to be opened by name without their files, texts or machine.

```
<store>/studies/<study>/study.json     the study with its arms, the identities of its texts, the stages of its runs
<store>/studies/<study>@1/, @2/ ...    earlier versions, each with everything that it had
```

A study becomes another version when one of its arms trains something else. Other seeds, added or removed arms, another
analysis or another evaluation make no new version.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Problem, SourceLocation, did_you_mean
from lit_llm.config.section import validate
from lit_llm.config.tree import difference, merge_all, split_path, tree, under
from lit_llm.experiment.load import changed, file_names, is_preset, load_experiment, preset_names, read_overrides
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import digest_of_examples, identities, identity_of_data, reset_identities
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.store.files import Damaged
from lit_llm.store.store import Store, read_json, write_json
from lit_llm.studies.load import Ablation, Arm, file_and_arm, is_study, load_study
from lit_llm.studies.schema import Study

STORED, SWEEP = "study.json", "sweep.json"
PLAIN_NAME = r"[\w.@-]+"
"""Pattern of a name of a study or a sweep in a store; all else is a path."""
MOST_KEYS = 12
"""Most keys of a changed plan that a message names."""

Stages = Mapping[str, Mapping[int, Mapping[str, str]]]
"""{arm: {seed: {stage that trains: its fingerprint}}}."""


# --- keeping and opening --------------------------------------------------------------------------------------------


def keep(store: Store, ablation: Ablation, stages: Stages) -> None:
    """Write a study into its folder."""
    name = ablation.study.study.partition("@")[0]  # the folder's name has the version
    study = ablation.study.model_dump(mode="json", exclude_unset=True) | {"study": name}
    content = {"study": study, **content_of(ablation), "stages": stages}
    write_json(store.study(ablation.study.study) / STORED, content, signed=True)


def content_of(ablation: Ablation) -> dict[str, Any]:
    """A study's arms and the identities of the texts read so far, as plain data."""
    arms = [
        {
            **{name: getattr(arm, name) for name in ("name", "group", "baseline", "residual")},
            "levels": dict(arm.levels),
            "declared": sorted(arm.intervened_keys),
            "derived": dict(arm.matched_keys),
            "experiment": arm.experiment.model_dump(mode="json"),
        }
        for arm in ablation.arms
    ]
    header = {"source": ablation.source, "overrides": list(ablation.overrides), "file": ablation.file}
    return {**header, "arms": arms, "texts": identities()}


def ablation_of(study: Study, content: Mapping[str, Any]) -> Ablation:
    """A study from the plain data of `content_of`.

    The stored identities of its texts hold from now on, whatever the files contain.

    Raises InputError, LookupError, TypeError or ValueError for content that this version cannot read.
    """
    arms = tuple(_arm(given) for given in content["arms"])
    texts = tuple((tuple(request), identity) for request, identity in content["texts"])
    ablation = Ablation(study, arms, tuple(content["overrides"]), content["source"], content["file"], texts)
    reset_identities(texts)
    return ablation


def open_study(source: str | Path, overrides: Sequence[str] = (), store: Store | None = None) -> Ablation:
    """Open a study's file, a preset, an experiment's file, or a study in a store by its name or folder.

    Raises InputError with every problem.
    """
    name = str(source)
    if store is None or is_preset(name) or os.path.isfile(name):
        return load_study(source, overrides)
    if (name := name_in(store, name)) not in studies_in(store):
        if re.fullmatch(PLAIN_NAME, name) and (store.study(name) / SWEEP).exists():
            raise InputError(Problem("is a sweep, which `sweep`, `status`, `plan` and `report` take", name))
        if "/" in name or name.endswith((".yaml", ".yml")):
            return load_study(source, overrides)  # raises that there is no such file
        near = did_you_mean(name, [*preset_names(), *studies_in(store), *file_names(Path())])
        raise InputError(
            Problem(f"there is no preset and no file {name!r}, nor a study of this name in {store.root}{near}")
        )
    return _opened(store, name, overrides)


def _opened(store: Store, name: str, overrides: Sequence[str]) -> Ablation:
    """The stored study of this name as it last ran, with overrides of `-o` in every arm."""
    file = store.study(name) / STORED
    try:
        content = read_json(file) or {}
        study = validate(Study, tree(content["study"])).model_copy(update={"study": name})
        ablation = ablation_of(study, content)
    except (InputError, LookupError, TypeError, ValueError) as error:
        raise unreadable_error(file, error) from None
    return with_overrides(ablation, overrides)


def unreadable_error(file: Path, error: Exception) -> InputError:
    """The error for a study or a sweep whose file in the store is damaged, or was written by another version."""
    if isinstance(error, Damaged):
        message = f"{error.problems[0].message}; the command that made it writes it again: give it the file"
    else:
        message = f"cannot be read by this version ({str(error).splitlines()[0]}); give the file that it was made from"
    return InputError(Problem(message, location=SourceLocation(str(file))))


def _arm(given: Mapping[str, Any]) -> Arm:
    experiment = validate(Experiment, tree(given["experiment"]))
    names = {"declared": "intervened_keys", "derived": "matched_keys"}
    fields = {names.get(key, key): value for key, value in given.items()}
    return Arm(**{**fields, "experiment": experiment, "intervened_keys": frozenset(given["declared"])})


def with_overrides(ablation: Ablation, overrides: Sequence[str]) -> Ablation:
    """A stored study with overrides of `-o` in every arm. Raises InputError."""
    if not overrides:
        return ablation
    problems: list[Problem] = []
    keys = merge_all(read_overrides(overrides, problems))
    if problems:
        raise InputError(*problems)
    if ablation.study.match.by != "none" and {"model", "pretrain"} & set(keys.value):
        message = f"the arms were matched by {ablation.study.match.by} before; give the study's file, {ablation.source}"
        raise InputError(Problem(message, "-o"))
    if {"model", "pretrain"} & set(keys.value) and any(arm.experiment.adapt for arm in ablation.arms):
        message = f"decides what arms are adapted from, too; give the study's file, {ablation.source}"
        raise InputError(Problem(message, "-o"))
    arms = tuple(replace(arm, experiment=changed(arm.experiment, keys), keys=keys) for arm in ablation.arms)
    added = [option for option in overrides if option not in ablation.overrides]
    return replace(ablation, arms=arms, overrides=(*ablation.overrides, *added), added=tuple(added))


def name_in(store: Store, name: str) -> str:
    """The name of a study or a sweep in a store, from its name or its folder."""
    folder = Path(name).absolute()
    return folder.name if folder.parent == store.root / "studies" and folder.is_dir() else name


def studies_in(store: Store) -> list[str]:
    """Names of the studies that a store keeps."""
    return sorted(file.parent.name for file in (store.root / "studies").glob(f"*/{STORED}"))


def open_experiment(name: str, overrides: Sequence[str] = (), store: Store | None = None) -> Experiment:
    """Open a preset, an experiment's file, `STUDY:ARM`, or a study of one arm in a store."""
    source, arm_name = file_and_arm(name)
    if not arm_name and (is_preset(name) or (os.path.isfile(name) and not is_study(name))):
        return load_experiment(name, overrides)
    ablation = open_study(source, overrides, store)
    if not arm_name and len(ablation.arms) > 1:
        arms = ", ".join(f"{name}:{arm.name}" for arm in ablation.arms)
        raise InputError(Problem(f"{name} is a study; name one of its arms: {arms}"))
    for arm in ablation.arms:
        if arm.name == (arm_name or ablation.arms[0].name):
            return arm.experiment
    hint = did_you_mean(arm_name, [arm.name for arm in ablation.arms])
    raise InputError(Problem(f"{source} has no arm {arm_name!r}{hint}"))


# --- versions -------------------------------------------------------------------------------------------------------


def changes(store: Store, ablation: Ablation) -> list[Problem]:
    """Keys in which arms train otherwise than the stored results of this name, as problems; empty where none does."""
    try:
        content = read_json(store.study(ablation.study.study) / STORED)
    except Damaged:  # which `damage_of` reports
        return []
    if content is None:
        return []
    arms = {arm.name: arm for arm in ablation.arms}
    kept = {given["name"]: given for given in content["arms"]}
    texts = {tuple(request): identity for request, identity in content["texts"]}
    if not arms.keys() & content["stages"].keys():
        count = sum(_finished(store, seeds) for seeds in content["stages"].values())
        names = ", ".join(list(kept)[:3]) + ", ..." * (len(kept) > 3)
        message = f"{_count_results(count)} arms that are not here ({names}), and no arm that is"
        return [Problem(message, "arms", SourceLocation(ablation.source))] if count else []
    results: Counter[tuple[str, str]] = Counter()
    marks: dict[tuple[str, str], SourceLocation | None] = {}
    for name, seeds in content["stages"].items():
        if name not in arms or not seeds:
            continue
        seed, before = next(iter(seeds.items()))
        now = {
            node.name: node.fingerprint for node in stage_graph(arms[name].seeded(int(seed))) if node.kind != "evaluate"
        }
        gone = [stage for stage, fingerprint in before.items() if now.get(stage) != fingerprint]
        if gone and (count := _finished(store, seeds, gone)):
            for key, message in _training_differences(arms[name], kept[name]["experiment"], texts):
                results[key, message] += count
                marks.setdefault((key, message), arms[name].keys.location_of(split_path(key)) if key else None)
    problems = [
        Problem(f"{_count_results(count)} {message}", key, marks[key, message])
        for (key, message), count in list(results.items())[:MOST_KEYS]
    ]
    more = len(results) - MOST_KEYS
    return [*problems, *[Problem(f"{more} more keys differ")] * (more > 0)]


def damage_of(store: Store, name: str) -> list[str]:
    """Damages of a stored study's file, as sentences; `keep` writes it again."""
    try:
        read_json(store.study(name) / STORED)
    except Damaged as error:
        return [f"{error.problems[0]}; `lit-llm run` with the study's file writes it again"]
    return []


def _training_differences(
    arm: Arm, before: Mapping[str, Any], texts: Mapping[tuple[str, ...], Any]
) -> Iterator[tuple[str, str]]:
    """(key, old and new value) of the keys and texts in which an arm trains otherwise than its results."""
    seedless = {key: value for key, value in before.items() if key != "seed"}
    differing = {
        key: pair
        for key, pair in difference(seedless, arm.flat).items()
        if under(key, "model", "adapt", "pretrain", "finetune") and ".execution." not in f"{key}."
    }
    for key, (old, new) in differing.items():
        yield key, f"{_format_value(old)}, here it is {_format_value(new)}"
    other_texts = 0
    for key, request, digest in _texts_of(arm.experiment):
        identity = texts.get(request)
        was = identity["digest"] if isinstance(identity, dict) else identity
        if was is not None and was != digest:
            other_texts += 1
            yield key, f"another text: its digest is {was}, that of the text which is there now {digest}"
    if not differing and not other_texts:
        yield "", "been made by a version of lit-llm that told stages apart otherwise"


def _texts_of(experiment: Experiment) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(key, request of its identity, digest) of each text that an experiment trains on."""
    identity = identity_of_data(experiment)
    yield "pretrain.data.corpus", ("data", experiment.pretrain.data.model_dump_json()), identity.digest
    if (tuned := experiment.finetune) is not None:
        request = ("examples", tuned.data.model_dump_json(), identity.tokenizer)
        yield "finetune.data", request, digest_of_examples(experiment)


def _finished(store: Store, seeds: Mapping[str, Mapping[str, str]], stages: Sequence[str] = ()) -> int:
    """Number of runs of an arm with a result of one of these stages; of any stage when empty."""
    return sum(
        any(store.stage(name).result() is not None for stage, name in by_name.items() if stage in stages or not stages)
        for by_name in seeds.values()
    )


def _count_results(count: int) -> str:
    return "1 result has" if count == 1 else f"{count:,} results have"


def _format_value(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def version_of(store: Store, ablation: Ablation) -> Ablation:
    """The study, named as the stored version that trained these arms. Raises InputError where no version did."""
    if problems := changes(store, ablation):
        for name in reversed(_earlier_versions(store, ablation.study.study)):
            older = replace(ablation, study=ablation.study.model_copy(update={"study": name}))
            if (store.study(name) / STORED).exists() and not changes(store, older):
                return older
        raise another_version(store, ablation, problems)
    return ablation


class AnotherVersion(InputError):
    """A study differs from the results under its name."""


def another_version(store: Store, ablation: Ablation, problems: Sequence[Problem]) -> InputError:
    """The error for a study that differs from the results under its name."""
    name = ablation.study.study
    source = str(store.study(name)) if is_preset(name) else name
    shows = shlex.join(["lit-llm", "report", source, *store.option()])
    anew = f"{ablation.command('run', store)} --new-version"
    return AnotherVersion(*problems, hint=f"`{shows}` shows them; `{anew}` keeps them as {_next_version(store, name)}.")


def set_aside(store: Store, name: str) -> str:
    """Rename a study's folder to an earlier version; returns its name. The caller holds the lock."""
    earlier = _next_version(store, name)
    store.study(name).rename(store.study(earlier))
    return earlier


def _earlier_versions(store: Store, name: str) -> list[str]:
    """The earlier versions of a study, oldest first."""
    matches = (
        re.fullmatch(rf"{re.escape(name)}@(\d+)", path.name) for path in (store.root / "studies").glob(f"{name}@*")
    )
    return [f"{name}@{number}" for number in sorted(int(match[1]) for match in matches if match)]


def _next_version(store: Store, name: str) -> str:
    last = next(reversed(_earlier_versions(store, name)), "@0")
    return f"{name}@{int(last.rpartition('@')[2]) + 1}"
