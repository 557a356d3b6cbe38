"""Model section of an experiment: one of the families' sections, refused where it cannot be built."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import model_validator

from lit_llm.config.section import OneOf, config_error
from lit_llm.models import sections
from lit_llm.models.resolve import resolution_problems
from lit_llm.models.scaling import scaling_problems

M = TypeVar("M", bound=sections.AnyModel)


def _can_be_built(model: M) -> M:
    findings = [*resolution_problems(model)] or [*scaling_problems(model)]
    if findings:
        raise config_error(*dict.fromkeys(findings))
    return model


class DecoderModel(sections.DecoderModel):
    __doc__ = sections.DecoderModel.__doc__
    _check = model_validator(mode="after")(_can_be_built)


class EncoderDecoderModel(sections.EncoderDecoderModel):
    __doc__ = sections.EncoderDecoderModel.__doc__
    _check = model_validator(mode="after")(_can_be_built)


class EncoderOnlyModel(sections.EncoderOnlyModel):
    __doc__ = sections.EncoderOnlyModel.__doc__
    _check = model_validator(mode="after")(_can_be_built)


class DecoderDecoderModel(sections.DecoderDecoderModel):
    __doc__ = sections.DecoderDecoderModel.__doc__
    _check = model_validator(mode="after")(_can_be_built)


class DoubleDecoderModel(sections.DoubleDecoderModel):
    __doc__ = sections.DoubleDecoderModel.__doc__
    _check = model_validator(mode="after")(_can_be_built)


ModelConfig = Annotated[
    DecoderModel | EncoderDecoderModel | EncoderOnlyModel | DecoderDecoderModel | DoubleDecoderModel,
    OneOf(default=DecoderModel, by="family"),
]
