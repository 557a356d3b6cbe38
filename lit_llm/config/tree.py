"""YAML as a tree that records the line of every value.

Layers of a configuration are trees, merged in order of precedence. Locations stay with the values, so that an error
after ten merges still names the file and line of the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lit_llm.config.problems import InputError, Problem, SourceLocation

KIND = "kind"
"""The key of a section's variant. A mapping of another kind replaces the old one; it does not merge."""


@dataclass(frozen=True)
class ConfigNode:
    """A value with its location: a scalar, a list of nodes, or a mapping of names to nodes."""

    value: Any
    location: SourceLocation | None = None

    def plain(self) -> Any:
        """The value without locations."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def find(self, path: Sequence[str]) -> ConfigNode | None:
        """The node at `path`, or None."""
        node = self
        for part in path:
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[part]
            elif isinstance(node.value, list) and part.isdigit() and int(part) < len(node.value):
                node = node.value[int(part)]
            else:
                return None
        return node

    def location_of(self, path: Sequence[str]) -> SourceLocation | None:
        """The location of the value at `path`, or of its nearest ancestor with one."""
        for end in range(len(path), -1, -1):
            node = self.find(path[:end])
            if node is not None and node.location is not None:
                return node.location
        return None


def tree(value: Any, location: SourceLocation | None = None) -> ConfigNode:
    """Plain data as nodes that all carry `location`."""
    if isinstance(value, ConfigNode):
        return value
    if isinstance(value, Mapping):
        return ConfigNode({str(key): tree(item, location) for key, item in value.items()}, location)
    if isinstance(value, list | tuple):
        return ConfigNode([tree(item, location) for item in value], location)
    return ConfigNode(value, location)


def merge(base: ConfigNode, over: ConfigNode) -> ConfigNode:
    """Merge two trees. `over` wins; mappings merge key by key, lists and scalars are replaced.

    A variant written short (`optimizer: adamw`) is the mapping `{kind: adamw}`, so that a later layer may add to it.
    """
    base_items, over_items = _as_mapping(base, over), _as_mapping(over, base)
    if not isinstance(base_items, dict) or not isinstance(over_items, dict):
        return over
    new_kind, old_kind = over_items.get(KIND), base_items.get(KIND)
    if new_kind is not None and old_kind is not None and new_kind.value != old_kind.value:
        return over
    merged = dict(base_items)
    for key, node in over_items.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return ConfigNode(merged, over.location or base.location)


def merge_all(layers: Iterable[ConfigNode]) -> ConfigNode:
    """The layers in order of precedence, the strongest last."""
    merged = ConfigNode({})
    for layer in layers:
        merged = merge(merged, layer)
    return merged


def _as_mapping(word: ConfigNode, other: ConfigNode) -> Any:
    """`adamw` beside `{lr: 1e-3}` or `{kind: adamw, lr: 1e-3}` is `{kind: adamw}`."""
    if isinstance(word.value, str) and isinstance(other.value, dict):
        return {KIND: word}
    return word.value


def at(path: str, node: ConfigNode) -> ConfigNode:
    """A tree that holds only `node`, at the dotted `path`. Raises InputError for one that is too deep."""
    if path.count(".") >= DEEPEST:
        raise InputError(Problem(f"is nested more than {DEEPEST} levels deep", f"{path[:40]}...", node.location))
    for part in reversed(split_path(path)):
        node = ConfigNode({part: node}, node.location)
    return node


def without(node: ConfigNode, path: Sequence[str]) -> ConfigNode:
    """The tree without the node at `path`, which must exist."""
    items: dict[str, Any] = dict(node.value)
    if len(path) == 1:
        del items[path[0]]
    else:
        items[path[0]] = without(items[path[0]], path[1:])
    return ConfigNode(items, node.location)


def split_path(path: str) -> list[str]:
    return path.split(".")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of plain data; a list is one leaf, an empty mapping none."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def under(key: str, *prefixes: str) -> bool:
    """True where a dotted key is one of these or below one of them."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{dotted path: [left, right]} for every leaf that is not equal; None stands for an absent one."""
    old, new = (
        dict(leaves({key: value for key, value in side.items() if key not in other or other[key] != value}))
        for side, other in ((left, right), (right, left))
    )
    paths = list(dict.fromkeys([*old, *new]))
    return {path: [old.get(path), new.get(path)] for path in paths if old.get(path) != new.get(path)}


# --- reading -------------------------------------------------------------------------------------------------------

_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_INT = re.compile(r"^[-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, and `no`, `on` or `0o7` are words, which PyYAML's 1.1 gets wrong."""

    values = depth = 0
    """Number of values so far, and depth of the next one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node. Raises _TooMuch as soon as a limit is passed, before the rest is read."""
        self.values += 1
        self.depth += 1
        if self.values > 2 * MOST_VALUES or self.depth > DEEPEST + 1:  # keys are counted here, too
            raise _TooMuch(_MANY if self.values > 2 * MOST_VALUES else _DEEP, self.peek_event().start_mark.line)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes strings that either version of YAML would read otherwise: 12e34567, perhaps a fingerprint, is a number in
    1.2, and `yes` is true in 1.1."""

    yaml_implicit_resolvers = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def to_yaml(content: Any, **options: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back unchanged. options: of `yaml.dump`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, **options)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    written = str(loader.construct_scalar(node))
    # Python reads no integer of thousands of digits, and 007 is 7.
    if len(written.lstrip("+-0")) > 19 or not -(2**63) <= int(written) < 2**63:
        raise OverflowError
    return int(written)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
MOST_BYTES = 1_000_000
MOST_VALUES = 50_000
DEEPEST = 50
"""Limits far beyond any configuration. Nested aliases could otherwise expand to more values than memory holds."""
_LARGE = f"is larger than {MOST_BYTES:,} bytes, more than any configuration: is it data?"
_MANY = f"holds more than {MOST_VALUES:,} values, those of aliases counted in"
_DEEP = f"is nested more than {DEEPEST} levels deep"


class _TooMuch(Exception):
    """A limit is passed: (message, line from 0)."""


@lru_cache(maxsize=32)  # a command reads its file several times, and a study a preset for each of its arms
def read_yaml(text: str, source: str) -> ConfigNode:
    """Parse one YAML document.

    Raises InputError with `source:line` for broken YAML, repeated keys and documents beyond the limits.
    """
    if len(text) > MOST_BYTES:
        raise InputError(Problem(_LARGE, location=SourceLocation(source)))
    problems: list[Problem] = []
    count = 0

    def convert(node: yaml.Node, line: int, depth: int = 0) -> ConfigNode:
        nonlocal count
        count += 1
        location = SourceLocation(source, line + 1)
        if count > MOST_VALUES:
            raise InputError(Problem(_MANY, location=location))
        if depth > DEEPEST:
            raise InputError(Problem(_DEEP, location=location))
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            problems.append(Problem(f"the tag {tag} is not allowed: a file is data, never code", location=location))
            return ConfigNode(None, location)
        if isinstance(node, yaml.MappingNode):
            items: dict[str, ConfigNode] = {}
            for key_node, value_node in node.value:
                key, key_line = key_node.value, key_node.start_mark.line
                key_mark = SourceLocation(source, key_line + 1)
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _TAGS:
                    problems.append(Problem("a key must be a plain word", location=key_mark))
                    continue
                if key == "<<" and key_node.style is None:
                    problems.append(Problem("'<<' is not supported, use `extends`", location=key_mark))
                    continue
                if key in items:
                    problems.append(Problem("is written twice", key, key_mark))
                items[key] = convert(value_node, key_line, depth + 1)
            return ConfigNode(items, location)
        if isinstance(node, yaml.SequenceNode):
            return ConfigNode([convert(item, item.start_mark.line, depth + 1) for item in node.value], location)
        try:
            return ConfigNode(loader.construct_object(node), location)
        except OverflowError:
            problems.append(Problem(f"{node.value[:40]} is beyond the integers of 64 bits", location=location))
            return ConfigNode(None, location)
        except (ValueError, KeyError):  # a tag that the value does not fit
            problems.append(Problem(f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]}", location=location))
            return ConfigNode(None, location)

    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            document = (
                ConfigNode({}, SourceLocation(source, 1)) if root is None else convert(root, root.start_mark.line)
            )
        finally:
            loader.dispose()
    except _TooMuch as error:
        message, line = error.args
        raise InputError(Problem(message, location=SourceLocation(source, line + 1))) from None
    except yaml.YAMLError as error:
        raise InputError(_broken(error, text, source)) from None
    if problems:
        raise InputError(*problems)
    return document


def _broken(error: Exception, text: str, source: str) -> Problem:
    line: int | None
    if isinstance(error, yaml.reader.ReaderError):
        line, reason = text.count("\n", 0, error.position) + 1, f"the character {error.character!r} is not allowed"
    else:
        place = getattr(error, "problem_mark", None)
        line = place.line + 1 if place else None
        reasons = getattr(error, "context", None), getattr(error, "problem", None)
        reason = " ".join(filter(None, reasons)) or str(error)
    return Problem(f"this is not valid YAML: {reason}", location=SourceLocation(source, line))


def read_file(path: Path) -> ConfigNode:
    """Parse a YAML file. Raises InputError when it cannot be read or is not a mapping."""
    source = str(path)
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise InputError(Problem(_LARGE, location=SourceLocation(source)))
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(Problem("there is no such file", location=SourceLocation(source))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(f"cannot be read: {error}", location=SourceLocation(source))) from None
    document = read_yaml(text, source)
    if not isinstance(document.value, dict):
        raise InputError(Problem("should be a mapping of keys to values", location=document.location))
    return document


def read_override(option: str) -> ConfigNode:
    """`a.b.c=value` from the command line as a tree; the value is YAML, so `[q, k]` is a list."""
    path, equals, text = option.partition("=")
    location = SourceLocation(f"-o {option}" if len(option) <= 200 else f"-o {option[:200]}...")
    if not equals or not all(split_path(path.strip())):
        raise InputError(
            Problem("an override is `key.of.it=value`, for example model.attention.heads=4", location=location)
        )
    return at(
        path.strip(),
        tree(read_yaml(text, location.source).plain(), location) if text.strip() else ConfigNode(None, location),
    )
