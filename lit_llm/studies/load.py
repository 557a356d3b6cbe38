"""Reads a study file into its arms, each with its experiment."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llm.config.hashing import fingerprint
from lit_llm.config.metrics import EVALUATED, FINETUNED, SPLITS
from lit_llm.config.problems import InputError, Problem, collect_errors, did_you_mean, unknown_key
from lit_llm.config.section import validate
from lit_llm.config.tree import ConfigNode, leaves, merge, read_file, under, without
from lit_llm.data.config import Mixture
from lit_llm.evaluation.config import primary_metric
from lit_llm.experiment.load import MOST_LAYERS, file_names, is_preset, is_stage, read_experiment, validate_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import reset_identities
from lit_llm.runs.stage_graph import stage_graph, validation_metric
from lit_llm.store.store import Store
from lit_llm.studies.compared_metrics import OF_SOURCE
from lit_llm.studies.design.factors import label_of
from lit_llm.studies.design.points import design_points
from lit_llm.studies.label_check import check_labels
from lit_llm.studies.matching import matched
from lit_llm.studies.schema import Compare, Study


@dataclass(frozen=True)
class Arm:
    """One arm of a study: an experiment without its seed."""

    name: str
    group: str
    """The named arm that was crossed with the factors."""
    levels: Mapping[str, str]
    """The label of each factor's level; empty where the grid does not apply."""
    baseline: str
    """Name of the arm to compare with; a baseline names itself."""
    experiment: Experiment
    intervened_keys: frozenset[str] = frozenset()
    """Keys that the factors set."""
    matched_keys: Mapping[str, list[Any]] = field(default_factory=dict)
    """{key: [before, after]} of the keys that matching with the baseline has moved."""
    residual: float = 0.0
    """Difference in the matched quantity after matching, relative to the baseline's."""
    keys: ConfigNode = field(default=ConfigNode({}), compare=False, repr=False)
    """Tree of the experiment's keys, with the file and line of each for later errors."""

    def seeded(self, seed: int) -> Experiment:
        """The arm's experiment with this seed."""
        return self.experiment.model_copy(update={"seed": seed})

    @property
    def may_use_gpu(self) -> bool:
        """A stage of it takes a GPU where there is one."""
        sections = [self.experiment.section(stage) for stage in self.experiment.trained]
        return any(section.training.execution.accelerator != "cpu" for section in sections)

    @cached_property
    def computation(self) -> str:
        """Fingerprint of the computation, independent of names and seeds; reads the corpus for its digest."""
        return fingerprint([node.fingerprint for node in stage_graph(self.experiment)])

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The arm's configuration as plain data, without the seed."""
        return self.experiment.model_dump(mode="json", exclude={"seed"})


@dataclass(frozen=True)
class SearchedKeys:
    """Keys that a sweep searches in one arm, for the audit."""

    ranges: Mapping[str, str]
    """{key: its values as written in the file}; several where parameters under different conditions set one key."""
    ends: tuple[tuple[str, Experiment], ...] = ()
    """(key, experiment) at both ends of each parameter, within the constraints; empty where nothing is trained."""
    traded: bool = False
    """Whether a cost is one of several goals, so that the result is a Pareto front."""


@dataclass(frozen=True)
class Ablation:
    """A study file with its arms."""

    study: Study
    arms: tuple[Arm, ...]
    overrides: tuple[str, ...] = ()
    """Keys and values given by `-o`."""
    source: str = ""
    """The file's absolute path, or a preset's name."""
    file: str = field(default="", repr=False)
    """Text of the file."""
    identities: tuple[tuple[tuple[str, ...], Any], ...] = field(default=(), repr=False)
    """Identities of the texts as stored; empty where the texts are read."""
    added: tuple[str, ...] = ()
    """Overrides of a study opened by its name that its store does not keep."""
    searches: Mapping[str, SearchedKeys] = field(default_factory=dict)
    """{arm: keys that a sweep searches in it}; empty for a study."""

    def arm(self, name: str) -> Arm:
        """The arm with this name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.arms}

    def command(self, name: str, store: Store | None = None) -> str:
        """Shell command for the working directory: `lit-llm run ablations/quickstart.yaml -o ...`.

        store: adds its option where it is not the default store.
        """
        source, where = Path(self.source), store.option() if store is not None else []
        if self.identities:  # opened from its store by name
            options = [word for each in self.added for word in ("-o", each)]
            return shlex.join(["lit-llm", name, self.study.study, *where, *options])
        near = source.relative_to(Path.cwd()) if source.is_relative_to(Path.cwd()) else source
        options = [word for each in self.overrides for word in ("-o", each)]
        return shlex.join(["lit-llm", name, str(near), *where, *options])

    @property
    def baselines(self) -> dict[str, str]:
        """{arm: its baseline} of all arms, in their order."""
        return {arm.name: arm.baseline for arm in self.arms}

    @property
    def is_experiment(self) -> bool:
        """True for a single experiment, without arms to compare."""
        return not self.study.arms and self.study.grid is None

    def root(self, arm: Arm) -> Arm:
        """The first baseline of the chain of comparisons that leads to this arm."""
        while arm.baseline != arm.name:
            arm = self.arm(arm.baseline)
        return arm

    @cached_property
    def factors(self) -> dict[str, list[str]]:
        """{factor: labels of its levels}, the baseline's first."""
        grid = self.study.grid
        return {
            name: list(dict.fromkeys(map(label_of, levels) if isinstance(levels, tuple) else levels))
            for name, levels in (grid.factors if grid else {}).items()
        }


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """Read a study; a preset or an experiment file is a study of one arm.

    Args:
        source: Path of a study or an experiment, or name of a preset.
        overrides: Keys with values that hold for every arm, as `["pretrain.training.max_steps=50"]`.

    Returns:
        The study with its arms. `lit_llm.studies.plan.plan` costs and audits them.

    Raises:
        InputError: The file or an override is wrong. The message holds every problem, each with its file and line.
    """
    reset_identities()
    path = Path(source)
    if is_preset(str(source)) or not os.path.isfile(path):
        return _single(str(source), str(source), overrides)
    document = _read(path)
    if not _STUDY_KEYS & document.value.keys():
        if is_stage(document):
            return _single(path.absolute().parent.name, str(path.absolute()), overrides)
        if "pretrain" in document.value or "model" in document.value or "extends" in document.value:
            return _single(str(source), str(path.absolute()), overrides)
        raise InputError(
            Problem("is neither a study (no `study`) nor an experiment (no `model`)", location=document.location)
        )
    try:
        study = validate(Study, document)
    except InputError as error:
        problems = [*error.problems, *_further_problems(document, error.problems, path.parent, overrides)]
        raise InputError(*problems, hint=error.hint) from None
    return build_ablation(study, document, path, overrides)


def build_ablation(study: Study, document: ConfigNode, path: Path, overrides: Sequence[str]) -> Ablation:
    """Build the arms of a study. Raises InputError with every problem of the arms.

    document: the tree that `study` was validated from; path: its file.
    """
    arms = tuple(
        Arm(
            point.name,
            point.group,
            point.labels,
            point.baseline,
            point.experiment,
            point.intervened_keys,
            keys=point.node,
        )
        for point in design_points(study, document, path.parent, overrides)
    )
    _check_metric(study, arms, document)
    ablation = Ablation(study, arms, tuple(overrides), str(path.absolute()), _text_of(path))
    names = dict.fromkeys([*(arm.group for arm in arms), *(arm.name for arm in arms)])
    check_labels(study.compare.labels, list(names), ablation.factors, document)
    return _matched(ablation, document)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> ConfigNode:
    """A study file merged over the study that it extends."""
    document = read_file(path)
    if "like" in document.value:  # else each key of the other study would be reported as missing
        raise InputError(Problem(unknown_key("like", Study.model_fields), "like", document.location_of(["like"])))
    other = document.value.get("extends_study")
    if other is None or not isinstance(other.value, str):
        return document
    below = path.parent / other.value
    if Path(other.value).name != other.value or not os.path.isfile(below):
        near = did_you_mean(other.value, file_names(path.parent))
        raise InputError(
            Problem(f"there is no study {other.value!r} in the same folder{near}", "extends_study", other.location)
        )
    if len(seen) >= MOST_LAYERS:
        raise InputError(Problem(f"stands on more than {MOST_LAYERS} studies", "extends_study", other.location))
    if path in seen:
        raise InputError(
            Problem(f"extends itself: {' -> '.join(p.name for p in (*seen, path))}", "extends_study", other.location)
        )
    parent = without(_read(below, (*seen, path)), ["study"])  # a name belongs to one study
    # `base` and each factor are replaced whole: parts of another's budget or levels make no sense.
    replaced = [["base"], *(["grid", "factors", name] for name in _names(document, ["grid", "factors"]))]
    for address in replaced:
        if document.find(address) and parent.find(address):
            parent = without(parent, address)
    return merge(parent, document)


def _names(document: ConfigNode, address: list[str]) -> list[str]:
    node = document.find(address)
    return list(node.value) if node is not None and isinstance(node.value, dict) else []


def _check_metric(study: Study, arms: Sequence[Arm], document: ConfigNode) -> None:
    """Raise InputError if an arm does not measure the primary metric."""
    name, location = study.compare.metric, document.location_of(["compare", "metric"])
    base_metric, stage = name.removeprefix(FINETUNED), "finetune" if name.startswith(FINETUNED) else "pretrain"
    source = next((base_metric.removeprefix(begin) for begin in OF_SOURCE if base_metric.startswith(begin)), "")
    evaluation = base_metric.partition(EVALUATED)[2].partition("/")[0]
    for arm in arms:
        corpus = arm.experiment.pretrain.data.corpus
        names = corpus.sources if isinstance(corpus, Mixture) else ()
        message = ""
        if stage not in arm.experiment.trained:
            message = "it has no finetuning"
        elif evaluation and evaluation not in arm.experiment.evaluations(stage):
            message = f"it is not evaluated so after {stage}: `evaluate: {{after: [{stage}], {evaluation}: ...}}`"
        elif source and stage == "pretrain" and source not in names:
            message = f"its corpus has no source {source!r}{did_you_mean(source, names)}"
        elif base_metric.startswith(SPLITS["test"]) and not _has_test(arm.experiment, stage):
            key = f"{stage}.data.test_fraction"
            message = f"{key} is 0, so no text is held out for a test; set it above 0, or compare on the text that "
            message += f"choices are made by: `metric: {validation_metric(name)}`"
        if message:
            raise InputError(Problem(f"{arm.name}: {message}", "compare.metric", location))


def _has_test(experiment: Experiment, stage: str) -> bool:
    """True where a stage's data has a test split."""
    if stage == "finetune":
        return experiment.finetune is not None and experiment.finetune.data.has_test
    return experiment.pretrain.data.has_test


def _matched(ablation: Ablation, document: ConfigNode) -> Ablation:
    """The study with every arm matched to its baseline in the quantity of `match.by`."""
    by = ablation.study.match.by
    location = document.location_of(["match", "by"])
    if by not in ("none", "parameters") and any(arm.experiment.pretrain.training.trunks for arm in ablation.arms):
        message = (
            f"{by} moves max_steps, and so the step where the decay begins, which `branch_at` sets; use `by: none`"
        )
        raise InputError(Problem(message, "match.by", location))
    arms, undone = [], dict[str, None]()
    for arm in ablation.arms:
        if arm.name != arm.baseline:
            # In a chain of baselines all arms match the first one, so that residuals do not add up.
            match = matched(arm.experiment, ablation.root(arm).experiment, by)
            undone |= dict.fromkeys(key for key in match.moved if _is_level(key, arm, ablation.root(arm)))
            arm = replace(arm, experiment=match.experiment, matched_keys=match.moved, residual=match.residual)
        arms.append(arm)
    if undone:
        factors = "which is a factor" if len(undone) == 1 else "which are factors"
        raise InputError(
            Problem(f"{by} moves {' and '.join(undone)}, {factors} of the study too", "match.by", location)
        )
    return replace(ablation, arms=tuple(arms))


def _is_level(key: str, arm: Arm, root: Arm) -> bool:
    """True for a key that a factor sets to another value than the baseline's."""
    value, root_value = (dict(leaves(each.flat)).get(key) for each in (arm, root))
    return under(key, *arm.intervened_keys) and value != root_value


def _single(name: str, extends: str, overrides: Sequence[str]) -> Ablation:
    keys = read_experiment(extends, overrides)
    experiment = validate_experiment(keys, changes_checked=True)
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem).lstrip("_.-") or "experiment"
    question, metric = f"What does {short} cost, and where does it end?", primary_metric(experiment.model.family)
    study = Study(study=short, question=question, seeds=(experiment.seed,), compare=Compare(metric=metric))
    arm = Arm(short, short, {}, short, experiment, keys=keys)
    return Ablation(study, (arm,), tuple(overrides), extends, "" if is_preset(extends) else _text_of(Path(extends)))


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


_STUDY_KEYS = {"study", "extends_study"}
"""Keys that mark a file as a study."""

_KEYS_THAT_ARMS_IGNORE = {"study", "question", "seeds", "compare", "allow"}
"""Keys of a study that its arms do not depend on."""


def _further_problems(
    document: ConfigNode, reported: Sequence[Problem], folder: Path, overrides: Sequence[str]
) -> Sequence[Problem]:
    """Problems of the arms, as far as they can be checked without the invalid keys of the study."""
    wrong = {key for key in document.value for problem in reported if under(problem.key, key)}
    if not wrong:
        return []
    meant = {near for key in wrong for near in difflib.get_close_matches(key, Study.model_fields, n=1)}
    if meant - _KEYS_THAT_ARMS_IGNORE:
        return []
    items = {key: node for key, node in document.value.items() if key not in wrong}
    rest = ConfigNode({"study": ConfigNode("x"), "question": ConfigNode("x")} | items, document.location)
    problems: list[Problem] = []
    try:
        study = validate(Study, rest)
    except InputError as error:  # from checks that run only once the keys are valid
        return [*error.problems, *_further_problems(rest, error.problems, folder, overrides)]
    with collect_errors(problems):
        design_points(study, rest, folder, overrides)
    return problems


def is_study(source: str) -> bool:
    """True where `source` is a study file, not a preset or an experiment."""
    return not is_preset(source) and os.path.isfile(source) and bool(_STUDY_KEYS & read_file(Path(source)).value.keys())


def file_and_arm(source: str) -> tuple[str, str]:
    """(STUDY, ARM) of `STUDY:ARM`; the arm is empty where none is named."""
    if ":" in source and not os.path.exists(source):
        file, _, arm = source.rpartition(":")
        return file, arm
    return source, ""
