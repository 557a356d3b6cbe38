"""The model section of an experiment: one of the families' sections, refused where it cannot be built."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from lit_llm.config.section import OneOf, config_error
from lit_llm.models.resolve import resolution_problems
from lit_llm.models.sections import AnyModel, DecoderModel


def _can_be_built(model: AnyModel) -> AnyModel:
    findings = [*resolution_problems(model)]
    if findings:
        raise config_error(*dict.fromkeys(findings))
    return model


ModelConfig = Annotated[AnyModel, OneOf(default=DecoderModel, by="family"), AfterValidator(_can_be_built)]
