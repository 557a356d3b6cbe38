"""The strict base of every configuration section.

A section is a frozen pydantic model: unknown keys and wrong types are errors, the docstring under a field is its help
text and its description in the JSON Schema. Sections live beside the code that reads them; this file knows none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag, ValidationError, create_model
from pydantic_core import PydanticCustomError

from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.config.tree import KIND, Node

T = TypeVar("T")
S = TypeVar("S", bound="Section")

_TAG = "kind="  # marks a variant's tag in pydantic's locations, so that it can be taken out of the user's key


class Section(BaseModel):
    """Base class of all configuration sections."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


Items = Annotated[tuple[T, ...], Strict(False)]
"""A list in YAML, a tuple here (frozen); its items stay strict."""


def impossible(*findings: tuple[str, str]) -> PydanticCustomError:
    """The error to raise in a validator for values that the types allow and the thing itself does not.

    findings: (key inside the section that is to blame, or "", message), any number of them.
    """
    # Braces in pydantic's template would be fields; the text goes in as one.
    return PydanticCustomError("impossible", "{text}", {"text": "; ".join(m for _, m in findings), "findings": findings})


def one_of(*variants: type[Section], default: type[Section], by: str = KIND) -> Any:
    """The type of a field that is one of several sections, told apart by `by`.

    A bare word is the short form: `optimizer: adamw` is `optimizer: {kind: adamw}`. Without the key it is the default.
    """
    names = {section.model_fields[by].default: section for section in variants}
    default_name = default.model_fields[by].default

    def short_form(value: Any) -> Any:
        if isinstance(value, str):
            value = {by: value}
        if isinstance(value, Mapping):
            name = value.get(by, default_name)
            if name not in names:
                hint = did_you_mean(str(name), names)
                raise impossible((by, f"{name!r} is not possible{hint}"))
            return {by: name, **value}
        return value

    def tag_of(value: Any) -> str | None:
        name = value.get(by) if isinstance(value, Mapping) else getattr(value, by, None)
        return f"{_TAG}{name}" if name in names else None

    tagged = [Annotated[section, Tag(f"{_TAG}{name}")] for name, section in names.items()]
    if len(tagged) == 1:
        return Annotated[variants[0], BeforeValidator(short_form)]
    union = Union[tuple(tagged)]  # type: ignore[valid-type]  # noqa: UP007 - built from a list
    return Annotated[union, Discriminator(tag_of), BeforeValidator(short_form)]


def partial(section: type[S], name: str) -> type[Section]:
    """The same fields, all optional: what a more specific address may override. `None` means not set."""
    fields: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        allowed = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        fields[key] = (allowed | None, Field(None, description=field.description))  # type: ignore[operator]
    return create_model(name, __base__=Section, __doc__=f"Overrides of {section.__name__}; what is absent stays.", **fields)


def set_fields(section: BaseModel | None) -> dict[str, Any]:
    """The fields of a partial section that were set."""
    if section is None:
        return {}
    return {key: value for key in type(section).model_fields if (value := getattr(section, key)) is not None}


def validate(section: type[S], node: Node, at: tuple[str, ...] = ()) -> S:
    """Build a section from a tree. Raises InputError with every problem, each at its file and line.

    `at`: the path of the section in its file, put before the keys of the messages.
    """
    try:
        return section.model_validate(node.plain())
    except ValidationError as error:
        raise InputError(
            *(problem for item in error.errors(include_url=False) for problem in _problems(section, node, at, dict(item))),
            hint="`lit-llm schema > study.schema.json` gives your editor the allowed keys.",
        ) from None


def _problems(section: type[Section], node: Node, at: tuple[str, ...], error: dict[str, Any]) -> Iterator[Problem]:
    """One error of pydantic's in our words, at the line that brought the value in."""
    path = tuple(str(part) for part in error["loc"] if not str(part).startswith(_TAG))
    if error["type"] == "impossible":
        for key, message in error["ctx"]["findings"]:
            blamed = (*path, *filter(None, key.split(".")))
            yield Problem(message, ".".join(at + blamed), node.mark_of(blamed))
        return
    yield Problem(_message(section, path, error), ".".join(at + path), node.mark_of(path))


def _message(section: type[Section], path: tuple[str, ...], error: dict[str, Any]) -> str:
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(path[-1], fields_at(section, error['loc'][:-1]))}"
    if kind == "missing":
        return "is needed, and there is no default"
    if kind == "literal_error":
        allowed = [word.strip().strip("'") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{given!r} is not possible{did_you_mean(str(given), allowed)}"
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    return error["msg"].removeprefix("Input ").removeprefix("Value error, ") + shown


def fields_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that a section has at a location of pydantic's (variant tags included)."""
    current: Any = section
    for part in location:
        current = _step(current, part)
        if current is None:
            return []
    models = [model for model in _models_in(current)]
    return sorted({name for model in models for name in model.model_fields})


def _step(current: Any, part: Any) -> Any:
    text = str(part)
    if text.startswith(_TAG):
        name = text.removeprefix(_TAG)
        return next((m for m in _models_in(current) if any(f.default == name for f in m.model_fields.values())), None)
    for model in _models_in(current):
        if text in model.model_fields:
            return model.model_fields[text].annotation
    return current  # an item of a list or of a mapping: its type is inside the annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
