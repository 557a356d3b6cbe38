"""From a study file to its arms: every point of the study, each with the experiment it stands for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llm.ablation.config import OF_SOURCE, Compare, Study
from lit_llm.ablation.factors import Level, combinations, label_of, read_factors, short_names
from lit_llm.ablation.fraction import LETTERS
from lit_llm.ablation.match import matched
from lit_llm.config.fingerprint import fingerprint
from lit_llm.config.problems import InputError, Problem, did_you_mean, noted, some
from lit_llm.config.section import validate
from lit_llm.config.tree import Node, leaves, merge, merge_all, read_file, split_path, under, without
from lit_llm.data.config import Mixture
from lit_llm.evaluation.config import yardstick_of
from lit_llm.experiment.chain import EVALUATED, FINETUNED, chain
from lit_llm.experiment.config import Experiment
from lit_llm.experiment.identity import read_corpora_again
from lit_llm.experiment.load import (
    changes_nothing,
    idle_overrides,
    is_preset,
    load_experiment,
    read_experiment,
    read_layers,
    read_overrides,
    validate_experiment,
    with_sources,
)


@dataclass(frozen=True)
class Arm:
    """One point of a study without its seed."""

    name: str
    group: str
    """The named arm that it was crossed from."""
    levels: Mapping[str, str]
    """The label of each factor's level; empty where the grid does not apply."""
    baseline: str
    """Name of the arm it is compared with; its own for a baseline."""
    experiment: Experiment
    declared: frozenset[str] = frozenset()
    """Keys that its factors set."""
    derived: Mapping[str, list[Any]] = field(default_factory=dict)
    """{key: [before, after]} of what matching it with its baseline has moved."""
    residual: float = 0.0
    """What is left of the difference in the matched quantity, relative to the baseline's."""
    keys: Node = field(default=Node({}), compare=False, repr=False)
    """What the experiment was made of, for the places of what turns out to be wrong only later."""

    def seeded(self, seed: int) -> Experiment:
        return self.experiment.model_copy(update={"seed": seed})

    @cached_property
    def computation(self) -> str:
        """What it computes, whatever its name and its seeds; needs the corpus's digest."""
        return fingerprint([link.fingerprint for link in chain(self.experiment)])

    @cached_property
    def flat(self) -> dict[str, Any]:
        return self.experiment.model_dump(mode="json", exclude={"seed"})


@dataclass(frozen=True)
class Ablation:
    """A study file, understood."""

    study: Study
    arms: tuple[Arm, ...]
    overrides: tuple[str, ...] = ()
    """What `-o` has changed beside the file."""
    source: str = ""
    """The file's absolute path, or a preset's name."""

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def root(self, arm: Arm) -> Arm:
        """The first of the chain of baselines that ends with this arm."""
        while arm.baseline != arm.name:
            arm = self.arm(arm.baseline)
        return arm

    @property
    def factors(self) -> dict[str, list[str]]:
        """The labels of each factor's levels, the baseline's first."""
        grid = self.study.grid
        return {
            name: list(dict.fromkeys(map(label_of, levels) if isinstance(levels, tuple) else levels))
            for name, levels in (grid.factors if grid else {}).items()
        }


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """Read a study; a preset or an experiment file is a study of one arm.

    Raises InputError with every problem that was found, each at its file and line.
    """
    read_corpora_again()
    path = Path(source)
    if is_preset(str(source)) or not os.path.isfile(path):
        return _single(str(source), str(source), overrides)
    document = _read(path)
    if not _STUDY & document.value.keys():
        if "pretrain" in document.value or "model" in document.value or "extends" in document.value:
            return _single(str(source), str(path.absolute()), overrides)
        raise InputError(Problem("is neither a study (no `study`) nor an experiment (no `model`)", mark=document.mark))
    try:
        study = validate(Study, document)
    except InputError as error:
        problems = [*error.problems, *_further_problems(document, error.problems, path.parent, overrides)]
        raise InputError(*problems, hint=error.hint) from None
    return understood(study, document, path, overrides)


def understood(study: Study, document: Node, path: Path, overrides: Sequence[str]) -> Ablation:
    """A study with its arms. Raises InputError with every problem of theirs.

    document: the tree that `study` was validated from; path: of its file.
    """
    arms = tuple(_arms(study, document, path.parent, overrides))
    _check_metric(study, arms, document)
    return _matched(Ablation(study, arms, tuple(overrides), str(path.absolute())), document)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Node:
    """A study file over the one that it is `like`."""
    document = read_file(path)
    like = document.value.get("like")
    if like is None or not isinstance(like.value, str):
        return document
    below = path.parent / like.value
    if Path(like.value).name != like.value or not os.path.isfile(below):
        near = did_you_mean(like.value, [file.name for file in path.parent.glob("*.yaml")])
        raise InputError(Problem(f"there is no study {like.value!r} in the same folder{near}", "like", like.mark))
    if path in seen:
        raise InputError(Problem(f"is like itself: {' -> '.join(p.name for p in (*seen, path))}", "like", like.mark))
    parent = without(_read(below, (*seen, path)), ["study"])  # a name is one study's
    # A base is one budget and a factor one list of levels: half of another's would be neither.
    replaced = [["base"], *(["grid", "factors", name] for name in _names(document, ["grid", "factors"]))]
    for address in replaced:
        if document.find(address) and parent.find(address):
            parent = without(parent, address)
    return merge(parent, document)


def _names(document: Node, address: list[str]) -> list[str]:
    node = document.find(address)
    return list(node.value) if node is not None and isinstance(node.value, dict) else []


def _check_metric(study: Study, arms: Sequence[Arm], document: Node) -> None:
    """Raise InputError if an arm does not measure what is compared."""
    name, mark = study.compare.metric, document.mark_of(["compare", "metric"])
    own, stage = name.removeprefix(FINETUNED), "finetune" if name.startswith(FINETUNED) else "pretrain"
    source, evaluation = own.partition(OF_SOURCE)[2], own.partition(EVALUATED)[2].partition("/")[0]
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
        if message:
            raise InputError(Problem(f"{arm.name}: {message}", "compare.metric", mark))


def _matched(ablation: Ablation, document: Node) -> Ablation:
    """Every arm made equal to its baseline in the quantity that the study matches by."""
    by = ablation.study.match.by
    moves = "model.feed_forward.d_ff" if by == "parameters" else "pretrain.training.max_steps"
    if by != "none" and any(_undoes(moves, arm, ablation.root(arm)) for arm in ablation.arms):
        mark = document.mark_of(["match", "by"])
        raise InputError(Problem(f"{by} moves {moves}, which is a factor of the study too", "match.by", mark))
    found = []
    for arm in ablation.arms:
        if arm.name != arm.baseline:
            # Along a chain of baselines all are made equal to its first, so that what is left does not add up.
            match = matched(arm.experiment, ablation.root(arm).experiment, by)
            arm = replace(arm, experiment=match.experiment, derived=match.moved, residual=match.residual)
        found.append(arm)
    return replace(ablation, arms=tuple(found))


def _undoes(moves: str, arm: Arm, root: Arm) -> bool:
    """Whether matching would take from an arm what a factor has given it: not where its baseline has the same."""
    own, its = (dict(leaves(found.flat)).get(moves) for found in (arm, root))
    return under(moves, *arm.declared) and own != its


def _single(name: str, extends: str, overrides: Sequence[str]) -> Ablation:
    keys = read_experiment(extends, overrides)
    experiment = validate_experiment(keys, changes_checked=True)
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem).lstrip("_.-") or "experiment"
    question, metric = f"What does {short} cost, and where does it end?", yardstick_of(experiment.model.family)
    study = Study(study=short, question=question, seeds=(experiment.seed,), compare=Compare(metric=metric))
    return Ablation(study, (Arm(short, short, {}, short, experiment, keys=keys),), tuple(overrides), extends)


_STUDY = {"study", "like"}
"""Keys by which a file is known as a study."""

ARM_KEYS = ("extends", "grid", "against")
"""Keys of a named arm that are not the experiment's."""

_ASIDE = {"study", "question", "seeds", "compare", "allow"}
"""Keys of a study that its arms do not depend on."""


def _further_problems(
    document: Node, found: Sequence[Problem], folder: Path, overrides: Sequence[str]
) -> Sequence[Problem]:
    """What is wrong with the arms besides, where that can be told without the keys of the study that are wrong."""
    wrong = {problem.key.split(".")[0] for problem in found}
    meant = {near for key in wrong for near in difflib.get_close_matches(key, Study.model_fields, n=1)}
    if meant - _ASIDE:
        return []
    items = {key: node for key, node in document.value.items() if key not in wrong}
    rest = Node({"study": Node("x"), "question": Node("x")} | items, document.mark)
    problems: list[Problem] = []
    try:
        study = validate(Study, rest)
    except InputError as error:  # of what is only looked at where nothing else is wrong
        return [*error.problems, *_further_problems(rest, error.problems, folder, overrides)]
    with noted(problems):
        list(_arms(study, rest, folder, overrides))
    return problems


@dataclass(eq=False)
class _Cell:
    group: str
    levels: tuple[Level, ...]
    node: Node
    name: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    experiment: Experiment | None = None

    @property
    def declared(self) -> frozenset[str]:
        return frozenset(path for level in self.levels for path in level.paths)


def _arms(study: Study, document: Node, folder: Path, overrides: Sequence[str]) -> Iterator[Arm]:
    problems: list[Problem] = []
    factors, crossed = read_factors(study.grid, document, problems), study.grid
    if problems:  # what is wrong with the arms can be said all the same
        factors, crossed = {}, None
    groups = _groups(study, document, folder, problems)
    against = _against(study, document, problems)
    after = read_overrides(overrides, problems)
    seeded = [node for node in after if node.find(["seed"])]
    problems += [Problem("seeds are the study's, change them there", "seed", node.mark) for node in seeded]
    problems += _overridden(factors, after)
    base = document.find(["base"]) or Node({})
    cells = []
    for group, (node, in_grid) in groups.items():
        for levels in combinations(crossed if in_grid else None, factors):
            with noted(problems):
                above = [*(level.keys for level in levels), *after]
                # A level reaches a source as the base does: else it would switch how much is fresh as well.
                cells.append(_Cell(group, levels, with_sources(merge_all([node, *above]), merge_all([base, *above]))))
    _name(cells, study, factors)
    problems += _build(cells, complete=crossed is study.grid)
    if not problems and not cells:
        problems.append(Problem("every combination is excluded", "grid.exclude", document.mark_of(["grid", "exclude"])))
    baselines = {cell.name: _baseline_of(cell, cells, against, study.compare, factors) for cell in cells}
    alone = [name for name, baseline in baselines.items() if baseline is None]
    if not problems and alone:
        message = f"{some(alone)} would be compared with an arm that is excluded"
        problems.append(Problem(message, "grid.exclude", document.mark_of(["grid", "exclude"])))
    if problems:
        raise InputError(*problems, hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.")
    for cell in cells:
        baseline = baselines[cell.name]
        assert baseline is not None
        assert cell.experiment is not None
        yield Arm(cell.name, cell.group, cell.labels, baseline, cell.experiment, cell.declared, keys=cell.node)


def _overridden(factors: Mapping[str, Sequence[Level]], overrides: Sequence[Node]) -> Iterator[Problem]:
    """Overrides that would set what a factor sets: its arms would no longer be what they are called."""
    owners = {
        path: name for name, levels in factors.items() for level in levels for path, _ in leaves(level.keys.plain())
    }
    for node in overrides:
        for key, _ in leaves(node.plain()):
            name = next((name for path, name in owners.items() if under(key, path) or under(path, key)), None)
            if name is not None:
                message = f"is set by the factor {name!r}; change its levels in the study, or choose arms by --only"
                yield Problem(message, key, node.mark_of(split_path(key)))


def _build(cells: Sequence[_Cell], complete: bool) -> list[Problem]:
    """Give every cell its experiment. What is wrong is said once, with the arms where it is.

    complete: the cells have their factors; only then can it be said that an override changes nothing.
    """
    found: dict[Problem, list[_Cell]] = {}
    for cell in cells:
        try:
            cell.experiment = validate_experiment(cell.node)
        except InputError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(cell)
    for name in dict.fromkeys(cell.group for cell in cells) if complete else ():
        group = [cell for cell in cells if cell.group == name]
        for problem in _idle(group):
            found.setdefault(problem, []).extend(group)
    in_grid, wrong = {cell.group for cell in cells if cell.declared}, dict[str, set[str]]()
    for problem, where in found.items():
        wrong.setdefault(problem.key, set()).update(cell.group for cell in where)
    return [
        _in_arms(problem, where, cells, elsewhere=bool(in_grid - wrong[problem.key]))
        for problem, where in found.items()
    ]


def _idle(group: Sequence[_Cell]) -> list[Problem]:
    """Overrides that change nothing in any cell of a named arm. A factor's own levels may repeat what holds already."""
    built = [(cell, cell.experiment) for cell in group if cell.experiment is not None]
    if not built:
        return []
    return [
        problem
        for problem in idle_overrides(built[0][0].node, built[0][1])
        if not under(problem.key, *built[0][0].declared)
        and all(changes_nothing(cell.node, experiment, problem.key) for cell, experiment in built[1:])
    ]


def _in_arms(problem: Problem, where: Sequence[_Cell], cells: Sequence[_Cell], elsewhere: bool) -> Problem:
    """The problem with the arms that have it, unless all have, or all that a factor gives this key.

    elsewhere: there are arms of the grid in which this key is no problem.
    """
    of_factor = all(under(problem.key, *cell.declared) for cell in where)  # a wrong level is wrong wherever it is used
    factors = [path for path in where[0].declared if under(path, problem.key)]
    if problem.message.startswith("unknown key") and factors and elsewhere:
        # The key is there in other arms: not a slip of the pen, but a factor that these do not have.
        lacking = some(list(dict.fromkeys(cell.group for cell in where)))
        message = f"a factor that the arm {lacking} does not have; keep that arm out of the grid by `grid: false`"
        return Problem(message, factors[0], problem.mark)
    whole = {c.group for c in where if of_factor or all(other in where for other in cells if other.group == c.group)}
    names = list(dict.fromkeys(cell.group if cell.group in whole else cell.name for cell in where))
    if set(names) == {cell.group for cell in cells if cell.declared or not of_factor}:
        return problem
    return Problem(f"{problem.message} (in arm {some(names)})", problem.key, problem.mark)


def _against(study: Study, document: Node, problems: list[Problem]) -> dict[str, str]:
    """{named arm: the one that it is compared with}."""
    names = list(study.arms or {"baseline": None})
    first = study.compare.baseline or names[0]
    if first not in names:
        where = document.mark_of(["compare", "baseline"])
        problems.append(Problem(f"there is no arm {first!r}{did_you_mean(first, names)}", "compare.baseline", where))
    found = dict.fromkeys(names, first)
    for name, own in study.arms.items():
        if "against" not in (own or {}):
            continue
        wanted, where = (own or {})["against"], document.mark_of(["arms", name, "against"])
        if wanted in names:
            found[name] = wanted
        else:
            hint = did_you_mean(str(wanted), names)
            problems.append(Problem(f"there is no arm {wanted!r}{hint}", f"arms.{name}.against", where))
    for name in found:
        seen = [name]
        while (below := found.get(seen[-1], seen[-1])) != seen[-1] and below not in seen:
            seen.append(below)
        if below in seen[:-1]:
            where = document.mark_of(["arms", name, "against"])
            message = f"is compared with itself in a circle: {' -> '.join([*seen, below])}"
            problems.append(Problem(message, f"arms.{name}.against", where))
            break
    return found


def _groups(study: Study, document: Node, folder: Path, problems: list[Problem]) -> dict[str, tuple[Node, bool]]:
    """{named arm: (its tree before the factors, whether the grid applies)}."""
    base = document.find(["base"]) or Node({})
    shared = None
    if not study.arms or any("extends" not in (arm or {}) for arm in study.arms.values()):
        with noted(problems):
            shared = read_layers(document.find(["extends"]), folder)
    groups = {}
    for name in study.arms or {"baseline": None}:
        own = document.find(["arms", name]) or Node({})
        items = own.value or {}
        below = shared
        if "extends" in items:
            below = None
            with noted(problems):
                below = read_layers(items["extends"], folder)
        in_grid = items.get("grid", Node(True)).value
        if not isinstance(in_grid, bool):
            problems.append(Problem("should be true or false", f"arms.{name}.grid", own.mark_of(["grid"])))
        keys = Node({key: value for key, value in items.items() if key not in ARM_KEYS}, own.mark)
        if below is not None:
            groups[name] = (merge(merge(below, base), keys), bool(in_grid))
    return groups


def _name(cells: list[_Cell], study: Study, factors: dict[str, list[Level]]) -> None:
    """`red/output_norm=none`: the named arm and each factor that is not at its first level; in a fraction `red/ACE`."""
    short = short_names(list(factors))
    for cell in cells:
        cell.labels = {level.factor: level.label for level in cell.levels}
        first = {name: levels[0].label for name, levels in factors.items()}
        moved = [name for name, label in cell.labels.items() if label != first[name]]
        if moved and study.grid and study.grid.fraction:  # of so many factors, too long to be read otherwise
            parts = ["".join(letter for letter, name in zip(LETTERS, factors, strict=False) if name in moved)]
        else:
            parts = [f"{short[name]}={cell.labels[name]}" for name in moved]
        # A study without named arms calls its cells by what is switched.
        cell.name = "/".join([cell.group, *parts])


def _baseline_of(
    cell: _Cell, cells: list[_Cell], against: Mapping[str, str], compare: Compare, factors: dict[str, list[Level]]
) -> str | None:
    """The arm that this one is against, at its own levels of the `within` factors and the first level of all others."""
    group = against.get(cell.group)
    wanted = {name: levels[0].label for name, levels in factors.items()}
    wanted |= {name: cell.labels[name] for name in compare.within if name in cell.labels}
    for other in cells:
        if other.group == group and (not other.labels or other.labels == wanted):
            return other.name
    return None


def is_study(source: str) -> bool:
    """Whether this is a study file, not a preset or an experiment."""
    return not is_preset(source) and os.path.isfile(source) and bool(_STUDY & read_file(Path(source)).value.keys())


def file_and_arm(source: str) -> tuple[str, str]:
    """(STUDY, ARM) of `STUDY:ARM`; the arm is empty where none is named."""
    if ":" in source and not os.path.exists(source):
        file, _, arm = source.rpartition(":")
        return file, arm
    return source, ""


def load_experiment_or_arm(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """A preset, an experiment file, or `STUDY:ARM`."""
    source, arm_name = file_and_arm(name)
    if not arm_name:
        if is_study(name):
            arms = ", ".join(f"{name}:{arm.name}" for arm in load_study(name).arms)
            raise InputError(Problem(f"{name} is a study; name one of its arms: {arms}"))
        return load_experiment(name, overrides)
    ablation = load_study(source, overrides)
    for arm in ablation.arms:
        if arm.name == arm_name:
            return arm.experiment
    hint = did_you_mean(arm_name, [arm.name for arm in ablation.arms])
    raise InputError(Problem(f"{source} has no arm {arm_name!r}{hint}"))
