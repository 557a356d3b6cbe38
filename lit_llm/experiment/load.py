"""From names, files and overrides to an experiment.

Precedence: defaults < `extends` < the file's own keys < `-o`. A preset is a YAML file in `presets/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Mark, Problem, did_you_mean
from lit_llm.config.section import validate
from lit_llm.config.tree import Node, leaves, merge, read_file, read_override, split_path
from lit_llm.experiment.config import Experiment
from lit_llm.models.config import resolve_model

PRESETS = Path(__file__).parent / "presets"


@cache
def preset_names() -> tuple[str, ...]:
    """Names that `extends` and the command line take, smallest models first within a family."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml") if not path.stem.startswith("_")))


def load_experiment(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """A preset (`"redllm-tiny"`) or an experiment file, with overrides (`["seed=3"]`).

    Raises InputError with every problem, each at its file and line.
    """
    layers = [read_layers(Node([Node(str(source))]), Path.cwd())]
    return validate_experiment(merge_all([*layers, *map(read_override, overrides)]), changes_checked=True)


def merge_all(layers: Iterable[Node]) -> Node:
    """The layers in order of precedence, the strongest last."""
    merged = Node({})
    for layer in layers:
        merged = merge(merged, layer)
    return merged


def read_layers(extends: Node | None, folder: Path, seen: tuple[Path, ...] = ()) -> Node:
    """What an `extends` names, one name or a list, merged in order; files are relative to `folder`."""
    if extends is None or extends.value is None:
        return Node({})
    names = extends.value if isinstance(extends.value, list) else [extends]
    return merge_all(_read_layer(name, folder, seen) for name in names)


def _read_layer(name: Node, folder: Path, seen: tuple[Path, ...]) -> Node:
    if not isinstance(name.value, str):
        raise InputError(Problem("should be the name of a preset or a file", "extends", name.mark))
    path = _find(name.value, folder, name.mark)
    if path in seen:
        chain = " -> ".join(str(p.name) for p in (*seen, path))
        raise InputError(Problem(f"extends itself: {chain}", "extends", name.mark))
    content = read_file(path)
    below = read_layers(content.value.get("extends"), path.parent, (*seen, path))
    own = Node({key: value for key, value in content.value.items() if key != "extends"}, content.mark)
    return merge(below, own)


def _find(name: str, folder: Path, mark: Mark | None) -> Path:
    preset = PRESETS / f"{name}.yaml"
    if "/" not in name and preset.is_file():
        return preset
    path = folder / name
    if path.is_file():
        return path.resolve()
    hint = did_you_mean(name, preset_names())
    raise InputError(Problem(f"there is no preset and no file {name!r}{hint}", "extends" if mark else "", mark))


def validate_experiment(node: Node, changes_checked: bool = False) -> Experiment:
    """The experiment that a merged tree describes.

    changes_checked: an override of a model address that changes nothing is an error too. Off for trees with a study's
    factors, whose first level often is what holds already.
    """
    experiment = validate(Experiment, node)
    if changes_checked and (problems := idle_overrides(node, experiment)):
        raise InputError(*problems)
    return experiment


_ADDRESSES = ("attention", "self_attention", "cross_attention", "feed_forward", "layer_ranges")


def idle_overrides(node: Node, experiment: Experiment) -> list[Problem]:
    """Keys of model addresses (`model.decoder.cross_attention.rope`) without which the model would be the same."""
    resolved, problems = resolve_model(experiment.model), []  # type: ignore[arg-type]
    for side in ("encoder", "decoder"):
        stack = node.find(["model", side])
        for name in _ADDRESSES:
            part = stack.find([name]) if stack else None
            for path, _ in leaves(part.plain(), f"model.{side}.{name}") if part and part.value else ():
                without = validate(Experiment, _without(node, split_path(path)))
                if resolve_model(without.model) == resolved:  # type: ignore[arg-type]
                    problems.append(
                        Problem(
                            "changes nothing in the resolved model; leave it out, or set the key at the address that wins",
                            path,
                            node.mark_of(split_path(path)),
                        )
                    )
    return problems


def _without(node: Node, path: list[str]) -> Node:
    items: dict[str, Any] = dict(node.value)
    if len(path) == 1:
        items.pop(path[0], None)
    else:
        items[path[0]] = _without(items[path[0]], path[1:])
    return Node(items, node.mark)
