"""Names of a user's additions to Lightning's Trainer for the provenance: equal ones have one name in every process.

Loads no torch.
"""

from __future__ import annotations

import copyreg
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from lit_llm.config.code_digest import digest_of_package
from lit_llm.config.problems import InputError
from lit_llm.config.trainer_settings import FACTORY
from lit_llm.tracking.address import SECRET_KEY, without_secrets

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
LIBRARIES = {"lightning", "lightning_fabric", "lit_llm", "numpy", "pytorch_lightning", "torch", "torchmetrics"}
LIBRARIES |= {"__main__", *sys.stdlib_module_names}
"""Packages whose code no user edits between two runs. What lit_llm and torch compute is in the provenance anyway."""
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType)


def factory_of(part: Any) -> str:
    """Name of a part's class or function, without arguments."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return str(part[FACTORY])
    if isinstance(part, partial):
        return factory_of(part.func)
    return _qualified(part if inspect.isclass(part) or inspect.isroutine(part) else type(part))


def name_of(part: Any) -> str:
    """A part's name with a digest of its code and its arguments; an object has a digest of its content.

    Secrets are left out. Raises InputError for a content that cannot be pickled, since it has no name that holds in
    other processes, and for code that is no Python.
    """
    if isinstance(part, str):
        return _with_code(part)
    if isinstance(part, Mapping):
        arguments = {key: value for key, value in part.items() if key != FACTORY}
        return _with_code(factory_of(part)) + _arguments(arguments, ())
    return _named(part, ())


def _named(value: Any, around: tuple[int, ...]) -> str:
    """Name of a value. around: identities of the objects that hold it, the outermost first."""
    if isinstance(value, _PLAIN):
        return repr(without_secrets(value) if isinstance(value, str) else value)
    if id(value) in around:
        return f"circle to {around.index(id(value))}"
    around = (*around, id(value))

    def names(values: Iterable[Any]) -> list[str]:
        return [_named(each, around) for each in values]

    if isinstance(value, partial):
        arguments = {str(place): argument for place, argument in enumerate(value.args)} | value.keywords
        return _named(value.func, around) + _arguments(arguments, around)
    # A method bound to an object is named with the object, by the way in which it is pickled.
    if isinstance(value, _FUNCTIONS) and isinstance(getattr(value, "__self__", None), types.ModuleType | None):
        return _with_code(_qualified(value))
    if type(value) in (list, tuple):
        return f"[{', '.join(names(value))}]"
    if type(value) in (set, frozenset):  # in an order that does not depend on the seed of hashes
        return f"{{{', '.join(sorted(names(value)))}}}"
    if type(value) is dict:
        return _arguments(value, around)
    content = "".join(names(_content(value)))
    return f"{_with_code(_qualified(type(value)))} {hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _with_code(name: str) -> str:
    """The name, with a digest of the code of its package where that is the user's."""
    digest = code_digest(name.partition(":")[0].partition(".")[0])
    return f"{name}@{digest}" if digest else name


@cache
def code_digest(package: str) -> str:
    """Digest of the code of a package or a module of its own; '' for a library's, and where there is none.

    It is the digest at the first call in this process, or after `code_digest.cache_clear()`.
    """
    try:
        spec = None if package in LIBRARIES else find_spec(package)
    except ValueError:  # a module that was made by hand, or no name
        spec = None
    if spec is None:
        return ""
    written = bool(spec.submodule_search_locations) or (spec.origin or "").endswith(".py")
    return digest_of_package(package) if written else ""


def _arguments(arguments: Mapping[Any, Any], around: tuple[int, ...]) -> str:
    """Keys and values, in an order of their own."""
    shown = {key if isinstance(key, str) else _named(key, around): value for key, value in arguments.items()}
    names = {key: "***" if _is_secret(key, shown[key]) else _named(shown[key], around) for key in sorted(shown)}
    return f"({', '.join(f'{key}={name}' for key, name in names.items())})"


def _is_secret(key: str, value: Any) -> bool:
    """True for the value of a key such as `api_key`; a number as of `max_tokens` and a function are none."""
    named = re.fullmatch(SECRET_KEY, key, re.IGNORECASE) is not None
    return named and not isinstance(value, (int, float, type(None), *_FUNCTIONS))


def _content(value: Any) -> list[Any]:
    """What an object is made again from, as pickle reads it; an array's numbers."""
    try:
        if hasattr(value, "tolist"):
            return [str(getattr(value, "dtype", "")), value.tolist()]
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception as error:  # the user's own code, which may fail in any way
        raise InputError(
            f"{_qualified(type(value))} has no name that holds in other processes ({error}); make it in a function "
            'of a module, and name that: "package.module:make_it"'
        ) from error
    if isinstance(reduced, str):
        return [reduced]
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    return [function, arguments, state, list(items or ()), dict(pairs or ())]


def _qualified(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"
