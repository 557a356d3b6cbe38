"""Reads experiments from names, files and overrides.

Precedence: defaults < `extends` < keys of the file < `-o`. A preset is a YAML file in `presets/`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from lit_llm.components.registry import COMPONENTS
from lit_llm.config.problems import InputError, Problem, SourceLocation, collect_errors, did_you_mean
from lit_llm.config.section import validate
from lit_llm.config.tree import (
    KIND,
    ConfigNode,
    leaves,
    merge,
    merge_all,
    read_file,
    read_override,
    split_path,
    tree,
    without,
)
from lit_llm.data.config import expanded
from lit_llm.experiment.schema import Experiment
from lit_llm.huggingface.checkpoint import MODEL, WEIGHTS, digest_of_checkpoint, digest_of_tokenizer
from lit_llm.models.resolve import STACKS, resolve_model

PRESETS = Path(__file__).parent / "presets"


def file_names(folder: Path) -> list[str]:
    """Names of a folder's YAML files, without the hidden ones, for suggestions in messages."""
    return [path.name for path in folder.glob("[!.]*.yaml")]


@cache
def preset_names() -> tuple[str, ...]:
    """Names that `extends` and the command line take, sorted by name."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml") if not path.stem.startswith("_")))


def is_preset(name: str) -> bool:
    """True where a name is a preset's, whatever is in the working directory."""
    return "/" not in name and os.path.isfile(PRESETS / f"{name}.yaml")


def load_experiment(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read one experiment.

    Args:
        source: Name of a preset, as `"redllm-tiny"`, or path of an experiment file.
        overrides: Keys with values, as `["seed=3", "model.attention.qkv_norm=[]"]`. They win over the file.

    Returns:
        The validated experiment, with every key that has a default filled in.

    Raises:
        InputError: The file or an override is wrong. The message holds every problem, each with its file and line.
    """
    return validate_experiment(read_experiment(source, overrides), changes_checked=True)


def read_experiment(source: str | Path, overrides: Sequence[str] = ()) -> ConfigNode:
    """The tree of an experiment for `validate_experiment`: every key with its file and line."""
    problems: list[Problem] = []
    below, after = ConfigNode({}), read_overrides(overrides, problems)
    with collect_errors(problems):
        below = read_layers(ConfigNode([ConfigNode(str(source))]), Path.cwd())
    if problems:
        raise InputError(*problems)
    return with_sources(merge_all([below, *after]), merge_all(after))


def read_overrides(options: Iterable[str], problems: list[Problem]) -> list[ConfigNode]:
    """The overrides of the command line as trees; adds errors to `problems`."""
    trees = []
    for option in options:
        with collect_errors(problems):
            trees.append(read_override(option))
    return trees


MOST_LAYERS = 50
"""Largest number of names in one `extends`, and of files that extend each other in a chain."""


def read_layers(
    extends: ConfigNode | None,
    folder: Path,
    seen: tuple[Path, ...] = (),
    layers_by_file: dict[Path, ConfigNode] | None = None,
) -> ConfigNode:
    """The layers that an `extends` names, merged in order; files are relative to `folder`.

    seen: files that extend these; layers_by_file: {file read so far: its keys merged with all that it extends}.
    """
    if extends is None or extends.value is None:
        return ConfigNode({})
    names = extends.value if isinstance(extends.value, list) else [extends]
    if len(names) > MOST_LAYERS or len(seen) > MOST_LAYERS:
        message = f"takes at most {MOST_LAYERS} names, has {len(names)}"
        if len(seen) > MOST_LAYERS:
            message = f"more than {MOST_LAYERS} files stand on each other here"
        raise InputError(Problem(message, "extends", extends.location))
    layers_by_file = {} if layers_by_file is None else layers_by_file
    layers: list[ConfigNode] = []
    problems: list[Problem] = []
    for name in names:
        with collect_errors(problems):
            layers.append(_read_layer(name, folder, seen, layers_by_file))
    if problems:
        raise InputError(*problems)
    return merge_all(layers)


def _read_layer(
    name: ConfigNode, folder: Path, seen: tuple[Path, ...], layers_by_file: dict[Path, ConfigNode]
) -> ConfigNode:
    if not isinstance(name.value, str):
        raise InputError(Problem("should be the name of a preset or a file", "extends", name.location))
    path = _find(name.value, folder, name.location)
    if path in seen:
        chain = " -> ".join(str(p.name) for p in (*seen, path))
        raise InputError(Problem(f"extends itself: {chain}", "extends", name.location))
    if path not in layers_by_file:
        content = read_experiment_file(path)
        below = read_layers(content.value.get("extends"), path.parent, (*seen, path), layers_by_file)
        keys = ConfigNode({key: value for key, value in content.value.items() if key != "extends"}, content.location)
        layers_by_file[path] = merge(below, keys)
    return layers_by_file[path]


def read_experiment_file(path: Path) -> ConfigNode:
    """The tree of an experiment's file, or of the experiment in a stage's `config.yaml`."""
    content = read_file(path)
    return content.value["experiment"] if is_stage(content) else content


def is_stage(content: ConfigNode) -> bool:
    """True where a tree is the stored configuration of a stage."""
    return {"stage", "experiment"} <= content.value.keys() and isinstance(content.value["experiment"].value, dict)


def _find(name: str, folder: Path, location: SourceLocation | None, key: str = "extends") -> Path:
    if is_preset(name):
        return PRESETS / f"{name}.yaml"
    path = folder / name
    if os.path.isfile(path):  # unlike Path's, False for a name that is too long for the file system
        return path.resolve()
    hint = did_you_mean(name, [*preset_names(), *file_names(folder)])
    raise InputError(Problem(f"there is no preset and no file {name!r}{hint}", key if location else "", location))


_TEXTS = ("data", "corpora")
"""Sections that name files of text and tokenizers."""


def with_absolute_paths(node: ConfigNode, of_text: bool = False) -> ConfigNode:
    """Return the tree with the paths of texts, tokenizers and tasks resolved.

    A path is relative to the file that names it, as `extends` is; in a preset and in `-o` to the working directory.
    """
    if isinstance(node.value, list):
        return ConfigNode([with_absolute_paths(item, of_text) for item in node.value], node.location)
    if not isinstance(node.value, dict):
        return node
    kind = node.value.get(KIND)
    items = {}
    for key, item in node.value.items():
        if of_text and key == "files" and isinstance(item.value, list):
            items[key] = ConfigNode([_absolute(name, pattern=True) for name in item.value], item.location)
        elif of_text and key == "path":
            items[key] = _absolute(item, only_existing=kind is not None and kind.value == "huggingface")
        elif key == "tasks" and isinstance(item.value, dict) and "folder" in item.value:
            items[key] = ConfigNode(item.value | {"folder": _absolute(item.value["folder"])}, item.location)
        else:
            items[key] = with_absolute_paths(item, of_text or key in _TEXTS)
    return ConfigNode(items, node.location)


def _absolute(name: ConfigNode, only_existing: bool = False, pattern: bool = False) -> ConfigNode:
    """The absolute path of a name, so that it stays the same wherever the experiment is read.

    only_existing: keep a name for which no file exists, as it may be no path; pattern: it may be a glob.
    """
    folder = _folder(name.location).absolute()
    folder = Path.cwd() if folder == PRESETS else folder
    if not isinstance(name.value, str) or os.path.isabs(given := expanded(name.value)):
        return name
    path = os.path.normpath(folder / given)
    if pattern and not os.path.exists(path):  # brackets of the folder are no pattern
        path = os.path.normpath(os.path.join(glob.escape(str(folder)), given))
    return name if only_existing and not os.path.exists(path) else ConfigNode(path, name.location)


SIDES = ("encoder", "decoder")
_NOT_ADAPTED = ("finetune", "evaluate", "seed")
"""Sections of a source's file that are ignored: only its pretraining counts, with the seed of the adapted run."""


_SHARED = {
    "model": ("d_model", "vocabulary", "attention", "feed_forward", "norm", "embedding", "output"),
    "pretrain": ("data", "training", "validation"),
}
"""Sections of a study's base and levels that hold for a source too; its family, stacks, objective and masks do not."""


def with_sources(node: ConfigNode, shared: ConfigNode, seen: tuple[Path, ...] = ()) -> ConfigNode:
    """The tree with the sources of `adapt.from` in place of their names, and likewise for sources of sources.

    Files are relative to the one that names them. shared: keys of a study's `base`, an arm's levels and `-o`; their
    text, training and widths hold for a source too, unless `from` sets others. Raises InputError for an unreadable file
    or folder, and for an experiment that is adapted from itself.
    """
    given = node.find(["adapt", "from"])
    if given is None or given.value is None:
        return node
    if isinstance(given.value, dict) and given.value.keys() & {*SIDES} and not given.value.keys() - {*SIDES}:
        inside = {side: _source(each, f"adapt.from.{side}", shared, seen) for side, each in given.value.items()}
        source = ConfigNode(inside, given.location)
    else:
        source = _source(given, "adapt.from", shared, seen)
    adapt = ConfigNode(node.value["adapt"].value | {"from": source}, node.value["adapt"].location)
    return ConfigNode(node.value | {"adapt": adapt}, node.location)


def _source(given: ConfigNode, key: str, shared: ConfigNode, seen: tuple[Path, ...]) -> ConfigNode:
    """The tree of one source: an experiment or a checkpoint."""
    if isinstance(given.value, str):
        folder = _folder(given.location) / given.value
        if os.path.isdir(folder) and not is_preset(given.value):
            return _checkpoint(folder, key, given.location)
        given = ConfigNode({"extends": given}, given.location)
    if not isinstance(given.value, dict):
        raise InputError(
            Problem("should be the name of a preset, a file or a folder, or a mapping", key, given.location)
        )
    if "checkpoint" in given.value:
        return given
    # `from: NAME`, to which another layer added keys, is {kind: NAME, ...}, as for a variant written short.
    items = dict(given.value)
    short, extends = items.pop(KIND, None), items.pop("extends", None)
    if short is not None and extends is not None:
        message = f"is named {short.value!r} in one place and {extends.value!r} in another; write `extends` in both"
        raise InputError(Problem(message, key, short.location))
    names = short or extends
    below, paths = ConfigNode({}), list[Path]()
    for name in [] if names is None else names.value if isinstance(names.value, list) else [names]:
        folder = _folder(name.location)
        if isinstance(name.value, str):
            paths.append(_find(name.value, folder, name.location, key))
        if paths and paths[-1] in seen:
            chain = " -> ".join(path.name for path in (*seen, paths[-1]))
            raise InputError(Problem(f"is adapted from itself: {chain}", key, name.location))
        below = merge(below, read_layers(ConfigNode([name], name.location), folder))
    below = ConfigNode({name: part for name, part in below.value.items() if name not in _NOT_ADAPTED})
    of_all = ConfigNode(
        {name: _selected_keys(part, _SHARED[name]) for name, part in shared.value.items() if name in _SHARED}
    )
    whole = merge_all([below, of_all, ConfigNode(items)])
    # If this mapping sets `adapt.from` itself, these files do not decide it, so they cannot form a circle.
    further = () if ConfigNode(items).find(["adapt", "from"]) else paths
    return with_sources(ConfigNode(whole.value, given.location), shared, (*seen, *further))


def _selected_keys(node: ConfigNode, names: Sequence[str]) -> ConfigNode:
    if not isinstance(node.value, dict):
        return ConfigNode({})
    return ConfigNode({name: part for name, part in node.value.items() if name in names}, node.location)


def _folder(location: SourceLocation | None) -> Path:
    """The folder that a name is relative to: that of its file, or the working directory for an option."""
    return Path(location.source).parent if location is not None and os.path.isfile(location.source) else Path.cwd()


def _checkpoint(folder: Path, key: str, location: SourceLocation | None) -> ConfigNode:
    try:
        model, digest = read_file(folder / MODEL).find(["model"]) or ConfigNode({}), digest_of_checkpoint(folder)
        tokenizer = digest_of_tokenizer(folder)
    except (InputError, OSError) as error:
        message = f"{folder} is no checkpoint's folder, which has {MODEL} and {WEIGHTS}: {error}"
        raise InputError(Problem(message, key, location)) from None
    fields = {"checkpoint": str(folder.resolve()), "digest": digest, "tokenizer": tokenizer}
    return ConfigNode({key: ConfigNode(value, location) for key, value in fields.items()} | {"model": model}, location)


def validate_experiment(node: ConfigNode, changes_checked: bool = False) -> Experiment:
    """The experiment that a merged tree describes; see `with_sources`.

    changes_checked: an override of a model address that changes nothing is an error too. Off for trees with a study's
    factors, whose first level often repeats a default.
    """
    experiment = validate(Experiment, with_absolute_paths(node))
    if changes_checked and (problems := redundant_overrides(node, experiment)):
        raise InputError(*problems)
    return experiment


def changed(experiment: Experiment, keys: ConfigNode) -> Experiment:
    """The experiment with the keys of a tree changed, checked again. Raises InputError where they do not fit."""
    return validate(Experiment, merge(tree(experiment.model_dump(mode="json")), keys))


_ADDRESSES = ("attention", "self_attention", "cross_attention", *COMPONENTS, "feed_forward", "layer_ranges")


def redundant_overrides(node: ConfigNode, experiment: Experiment) -> list[Problem]:
    """Keys of model addresses (`model.decoder.cross_attention.rope`) without which the model would be the same."""
    problems = []
    for side in STACKS:
        stack = node.find(["model", side])
        for name in _ADDRESSES:
            part = stack.find([name]) if stack else None
            for path, _ in leaves(part.plain(), f"model.{side}.{name}") if part and part.value else ():
                if not path.endswith(f".{KIND}") and changes_nothing(node, experiment, path):
                    problems.append(
                        Problem(
                            "changes nothing in the resolved model; leave it out or set the key where it wins",
                            path,
                            node.location_of(split_path(path)),
                        )
                    )
    return problems


def changes_nothing(node: ConfigNode, experiment: Experiment, path: str) -> bool:
    """True where the experiment's model is the same without the key at `path` of its tree."""
    try:
        rest = validate(Experiment, without(node, split_path(path)))
    except InputError:
        return False  # it is needed
    return resolve_model(rest.model) == resolve_model(experiment.model)
