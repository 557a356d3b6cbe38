"""The strict base of every configuration section.

A section is a frozen pydantic model: unknown keys and wrong types are errors, and the docstring under a field is its
description in the JSON Schema. Sections live beside the code that reads them; this file knows none.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    Tag,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from lit_llm.config.problems import InputError, Problem, did_you_mean, unknown_key
from lit_llm.config.tree import KIND, ConfigNode

T = TypeVar("T")
S = TypeVar("S", bound="Section")

_TAG = "kind="  # marks a variant's tag in pydantic's locations, so that it can be taken out of the user's key


class Section(BaseModel):
    """Base class of all configuration sections."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    described_by: ClassVar[type[Section] | None] = None
    """The section whose docstrings describe the fields of this one; None: its own."""

    @classmethod
    def unknown_key(cls, key: str, value: Any) -> str:
        """Message on an unknown key of a file, beyond the general one; '' for none."""
        return ""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in _docstrings(cls).items():
            key = cls.model_fields[name].alias or name
            if key in properties:
                properties[key].setdefault("description", text)
        return schema


def _docstrings(section: type[Section]) -> dict[str, str]:
    """{field: the docstring under it}, of a section and its bases.

    They are read only for the JSON Schema: pydantic's `use_attribute_docstrings` would parse the source at each start.
    """
    described: dict[str, str] = {}
    for base in reversed(section.__mro__[: section.__mro__.index(Section)]):
        if (other := vars(base).get("described_by")) is not None:
            described |= _docstrings(other)
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # a class of a notebook, or one that is made at run time
            continue
        (body,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(body, ast.ClassDef)
        for field, below in pairwise(body.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))) if (
                    name in section.model_fields
                ):
                    described[name] = inspect.cleandoc(text)
    return described


Items = Annotated[tuple[T, ...], Strict(False)]
"""A list in YAML, a tuple here (frozen); its items stay strict."""


def config_error(*findings: tuple[str | tuple[str, ...], str]) -> PydanticCustomError:
    """The error to raise in a validator for values of the right type that do not fit.

    findings: any number of (key inside the section, or "", message). A key whose parts contain dots is a tuple of its
    parts.
    """
    # The text is a field of pydantic's template, as braces in it would be fields themselves.
    return PydanticCustomError(
        "impossible", "{text}", {"text": "; ".join(m for _, m in findings), "findings": findings}
    )


class OneOf:
    """Marks a field that is one of several sections: `Annotated[AdamW | Muon, OneOf(default=AdamW)]`.

    The key `by` selects one; a section may have several names. A bare word is the short form: `optimizer:
    adamw` is `optimizer: {kind: adamw}`. Without the key it is the default.
    """

    def __init__(self, *, default: type[Section], by: str = KIND) -> None:
        self.default, self.by = default, by

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        by, default_name = self.by, self.default.model_fields[self.by].default
        variants: list[type[Section]] = [source] if isinstance(source, type) else list(get_args(source))
        names = {name: section for section in variants for name in get_args(section.model_fields[by].annotation)}

        def short_form(value: Any) -> Any:
            if isinstance(value, str):
                value = {by: value}
            if isinstance(value, Mapping):
                name = value.get(by, default_name)
                if not isinstance(name, str) or name not in names:
                    raise config_error((by, _not_possible(name, names)))
                return {by: name, **value}
            return value

        def tag_of(value: Any) -> str | None:
            name = value.get(by) if isinstance(value, Mapping) else getattr(value, by, None)
            return f"{_TAG}{names[name].model_fields[by].default}" if name in names else None

        before = BeforeValidator(short_form), _ShortForm(names)
        if len(variants) == 1:
            return handler.generate_schema(Annotated[variants[0], *before])
        tagged = [Annotated[section, Tag(f"{_TAG}{section.model_fields[by].default}")] for section in variants]
        union = Union[tuple(tagged)]  # type: ignore[valid-type]  # noqa: UP007 - built from a list
        return handler.generate_schema(Annotated[union, Discriminator(tag_of), *before])


class _ShortForm:
    """Adds the bare words of sections without required keys to the JSON Schema."""

    def __init__(self, names: Mapping[str, type[Section]]) -> None:
        self.words = [n for n, s in names.items() if not any(field.is_required() for field in s.model_fields.values())]

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        # Not oneOf: a mapping without a kind may fit several.
        mappings = schema.get("oneOf", [schema])
        return {"anyOf": [*([{"enum": self.words}] if self.words else []), *mappings]}


def partial(section: type[S]) -> type[Section]:
    """A section with the same fields, all optional, for overrides at a more specific address. None: not set."""
    fields: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        allowed = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        fields[key] = (allowed | None, Field(None, description=field.description))  # type: ignore[operator]
    optional = create_model(f"Optional{section.__name__}", __base__=Section, **fields)
    optional.described_by = section
    return optional


def set_fields(section: BaseModel | None) -> dict[str, Any]:
    """The fields of a partial section that were set."""
    if section is None:
        return {}
    return {key: value for key in type(section).model_fields if (value := getattr(section, key)) is not None}


def validate(section: type[S], node: ConfigNode, at: tuple[str, ...] = ()) -> S:
    """Build a section from a tree. Raises InputError with every problem, each at its file and line.

    at: path of the section in its file, the prefix of keys in messages.
    """
    try:
        return section.model_validate(node.plain())
    except ValidationError as error:
        raise InputError(
            *_problems(section, node, at, error.errors(include_url=False)),
            hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.",
        ) from None


def _problems(section: type[Section], node: ConfigNode, at: tuple[str, ...], errors: list[Any]) -> Iterator[Problem]:
    """Pydantic's errors as problems, one for each wrong value, at its line."""
    wrong: dict[tuple[str, ...], list[Any]] = {}
    for error in errors:
        wrong.setdefault(_path(node, error), []).append(error)
    outer = {path[:end] for path in wrong for end in range(len(path))}
    for path, errors_at_path in wrong.items():
        if all(error["type"] in _ABOUT_SHAPE for error in errors_at_path) and path in outer:
            continue  # a list too short without its wrong items, or an unintended alternative
        # Among several alternatives, those whose type fits the value.
        meant = [error for error in errors_at_path if error["type"] not in _NOUNS]
        for error in meant or ([_either(errors_at_path)] if len(errors_at_path) > 1 else errors_at_path):
            if error["type"] == "impossible":
                for key, message in error["ctx"]["findings"]:
                    error_key = (*path, *(filter(None, key.split(".")) if isinstance(key, str) else key))
                    yield Problem(message, ".".join(at + error_key), node.location_of(error_key))
            else:
                yield Problem(_message(section, path, error), ".".join(at + path), node.location_of(path))


def _path(node: ConfigNode, error: dict[str, Any]) -> tuple[str, ...]:
    """The key in the file: pydantic's location without its names of variants and alternatives."""
    path: tuple[str, ...] = ()
    parts = [str(part) for part in error["loc"]]
    for index, part in enumerate(parts):
        absent = error["type"] == "missing" and index == len(parts) - 1
        if absent or node.find((*path, part)) is not None:
            path = (*path, part)
    return path


_NOUNS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "union_tag_not_found": "a mapping of keys to values",
    "literal_error": "",
}
"""{pydantic's type of error: expected kind of value}; '' where the error itself lists the values."""

_ABOUT_SHAPE = {*_NOUNS, "too_short", "too_long"}


def _either(errors: list[Any]) -> dict[str, Any]:
    """A single error for a value that fits none of several alternatives."""
    nouns = [
        error["ctx"]["expected"] if error["type"] == "literal_error" else _NOUNS[error["type"]] for error in errors
    ]
    return {"type": "either", "noun": " or ".join(dict.fromkeys(nouns)), "input": errors[-1]["input"]}


def _message(section: type[Section], path: tuple[str, ...], error: dict[str, Any]) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        sections = _sections_at(section, error["loc"][:-1])
        advice = next(filter(None, (each.unknown_key(path[-1], given) for each in sections)), "")
        allowed = fields_at(section, error["loc"][:-1])
        if not advice and path[-1].split(".")[0] in allowed:
            advice = f"keys stand inside of each other in a file: write `{nested(path[-1], given)}`"
        return f"unknown key - {advice}" if advice else unknown_key(path[-1], allowed)
    if kind == "missing":
        return "is needed, and there is no default"
    if kind == "literal_error":
        allowed = [word.strip().strip("'") for word in context["expected"].replace(" or ", ",").split(",")]
        return _not_possible(given, allowed)
    if kind == "string_too_short":
        return "should not be empty"
    if kind == "too_short":
        return f"needs at least {context['min_length']} of them, has {context['actual_length']}"
    if kind == "too_long":
        return f"takes at most {context['max_length']} of them, has {context['actual_length'] or len(given)}"
    noun = error.get("noun") or _NOUNS.get(kind)
    what = f"should be {noun}" if noun else error["msg"].removeprefix("Input ")
    return f"{what}, not {_format_value(given)}{_suggested_form(noun, given)}"


_MOST_NESTED = 8
"""Most nested keys that a message writes out; no section has as many."""


def nested(key: str, value: Any) -> str:
    """A dotted key with its value as a file has it: `a: {b: 1}`."""
    first, *inner = key.split(".")
    text = (
        "{...}" if isinstance(value, Mapping) else "[...]" if isinstance(value, list | tuple) else _format_value(value)
    )
    for part in reversed(inner[:_MOST_NESTED]):
        text = f"{{{part}: {text}}}"
    return f"{first}: {text}"


def _not_possible(given: Any, allowed: Iterable[str]) -> str:
    return f"{_format_value(given)} is not possible{did_you_mean(given if isinstance(given, str) else '', allowed)}"


def _format_value(value: Any) -> str:
    """A value as in YAML; `a list` or `a mapping` for those."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool | None):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _suggested_form(noun: str | None, given: Any) -> str:
    """Advice on how to write an obviously intended value; '' without any."""
    if noun == "an integer" and isinstance(given, float) and given.is_integer():
        return f" - write {int(given)}"
    if noun == "a string" and isinstance(given, int | float):
        return f" - write '{_format_value(given)}', in quotes"
    if noun == "a list" and isinstance(given, str | int | float):
        return f" - write [{given if isinstance(given, str) else _format_value(given)}]"
    return ""


def fields_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys of a section at a location in pydantic's form (variant tags included)."""
    models = _models_at(section, location)
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _sections_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[type[Section]]:
    return [model for model in _models_at(section, location) if issubclass(model, Section)]


def _models_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[type[BaseModel]]:
    current: Any = section
    for part in location:
        current = _step(current, part)
        if current is None:
            return []
    return _models_in(current)


def _step(current: Any, part: Any) -> Any:
    text = str(part)
    if text.startswith(_TAG):
        name = text.removeprefix(_TAG)
        return next((m for m in _models_in(current) if any(f.default == name for f in m.model_fields.values())), None)
    for model in _models_in(current):
        for name, field in model.model_fields.items():
            if text == (field.alias or name):
                return field.annotation
    return current  # an item of a list or of a mapping: its type is inside the annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
