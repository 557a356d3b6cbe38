"""Digest of code over its syntax tree, so that comments, docstrings and layout do not count."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_llm.config.collector import gc_disabled
from lit_llm.config.hashing import LENGTH, kept
from lit_llm.config.problems import InputError, Problem


def digest_of_code(package: Path, parts: Iterable[str]) -> str:
    """Hash of the syntax trees of the modules in `parts`, files or folders relative to the folder of a package.

    The digest does not change when a comment, a docstring, an import for type checkers or the formatting changes, or
    when a module gets another name or place. An import of another module in `parts` counts with that module's digest,
    so it changes when the imported name comes from other code. An import of any other module of the package counts by
    the imported names alone.

    Parsing takes a third of a second, so digests are kept in the user's cache.

    Raises SyntaxError when a module cannot be parsed.
    """
    files = [
        file
        for part in parts
        for file in ([package / part] if part.endswith(".py") else sorted((package / part).rglob("*.py")))
    ]
    sources = {
        ".".join([package.name, *file.relative_to(package).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): file.read_bytes()
        for file in files
    }
    other = [file.read_text() for part in parts for file in sorted((package / part).rglob("*.cpp"))]
    # Another version of Python may give other trees, another version of this file another digest.
    read = (sys.version_info[:2], Path(__file__).read_bytes(), sources, other)
    seen = hashlib.sha256(repr(read).encode()).hexdigest()
    return kept(f"code/{seen}", lambda: _digest_of_sources(package.name, sources, other))


def digest_of_package(name: str) -> str:
    """Digest of an installed package, or of a single module; see `digest_of_code`.

    Raises InputError where one of its files is no Python.
    """
    spec = find_spec(name)
    assert spec is not None
    folders = spec.submodule_search_locations
    try:
        if folders:
            return digest_of_code(Path(folders[0]), ["."])
        assert spec.origin is not None
        return digest_of_code(Path(spec.origin).parent, [Path(spec.origin).name])
    except (SyntaxError, UnicodeDecodeError) as error:
        message = f"the code of the package {name} cannot be read: {error}"
        raise InputError(Problem(message)) from error


@gc_disabled()
def _digest_of_sources(package: str, sources: Mapping[str, bytes], other: Sequence[str] = ()) -> str:
    digests = _Digests(package, sources)
    return _hash(sorted([*map(digests.of, sources), *map(_digest_of_cpp, other)]))


def _digest_of_cpp(text: str) -> str:
    """Hash of C++ without its `//` comments and with words apart by one space."""
    return _hash(re.sub(r"//[^\n]*", "", text).split())


def _hash(words: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:LENGTH]


class _Digests:
    """Digests of modules by their dotted names."""

    def __init__(self, package: str, sources: Mapping[str, bytes]) -> None:
        self.package, self.sources = package, sources
        self._by_module: dict[str, str] = {}

    def of(self, module: str) -> str:
        if module not in self._by_module:
            self._by_module[module] = "circle"  # stands for a module inside its own circle of imports
            self._by_module[module] = _hash(self._words(ast.parse(self.sources[module])))
        return self._by_module[module]

    def _words(self, node: ast.AST) -> Iterator[str]:
        yield f"{type(node).__name__}("
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(node, ast.Constant):
                if name == "value":
                    yield repr(value)
            elif isinstance(value, ast.AST):
                yield f"{name}="
                yield from self._words(value)
            elif isinstance(value, list):
                if value:  # an empty list is absent: later versions of Python have more fields
                    yield f"{name}=["
                    yield from self._statements(value)
                    yield "]"
            elif value is not None:
                yield f"{name}={value!r}"
        yield ")"

    def _statements(self, nodes: Sequence[Any]) -> Iterator[str]:
        """Words of a list of nodes. Adjacent imports from this package have no order, unless two bind one name."""
        imports = dict[str, str]()
        for node in nodes:
            ours = self._imports(node)
            if ours is not None:
                if imports.keys() & ours.keys():
                    yield from sorted(imports.values())
                    imports = {}
                imports |= ours
            elif not _computes_nothing(node):
                yield from sorted(imports.values())
                imports = {}
                if isinstance(node, ast.AST):
                    yield from self._words(node)
                else:  # a name after `global`, or None for a key of `{**other}`
                    yield repr(node)
        yield from sorted(imports.values())

    def _imports(self, node: Any) -> dict[str, str] | None:
        """{name that a statement binds: word for what it imports from this package}; None for any other node."""
        match node:
            case ast.ImportFrom(module=str(module), level=0, names=names) if self._is_ours(module):
                return {alias.asname or alias.name: self._imported(module, alias.name, alias.asname) for alias in names}
            case ast.Import(names=names) if all(self._is_ours(alias.name) for alias in names):
                return {alias.asname or alias.name: self._imported(alias.name, "", alias.asname) for alias in names}
        return None

    def _imported(self, module: str, name: str, bound_to: str | None) -> str:
        bound_to = bound_to or name
        if f"{module}.{name}" in self.sources:
            module, name = f"{module}.{name}", ""
        return f"import {self.of(module) if module in self.sources else ''} {name} {bound_to}"

    def _is_ours(self, module: str) -> bool:
        return module.partition(".")[0] == self.package


def _computes_nothing(node: Any) -> bool:
    """True where a statement is a docstring, or an import for type checkers."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())) | ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
            return True
    return False
