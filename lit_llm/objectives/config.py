"""Objectives by name: how a window of text becomes a source and a target, for any family."""

from __future__ import annotations

from typing import Annotated, Literal

from lit_llm.config.section import OneOf, Section
from lit_llm.objectives.answers import Answers
from lit_llm.objectives.base import BOS as BOS
from lit_llm.objectives.base import EOD as EOD
from lit_llm.objectives.cuts import CausalLM, PrefixLM
from lit_llm.objectives.masked import MaskedLM
from lit_llm.objectives.spans import UL2, SpanCorruption

Objective = Annotated[CausalLM | PrefixLM | SpanCorruption | UL2 | MaskedLM | Answers, OneOf(default=CausalLM)]


def continues(family: str) -> bool:
    """True where a family continues a prefix token by token, as the primary metric and instructions require."""
    return family != "encoder_only"


def misfit(objective: Objective, family: str) -> str:
    """Reason why a family cannot be trained on an objective, or ''."""
    if not continues(family):
        if isinstance(objective, MaskedLM):
            return ""
        return (
            f"{objective.kind} asks for one token after the other, and an encoder_only model sees all of them at once; "
            "use `objective: masked_lm`"
        )
    if isinstance(objective, MaskedLM):
        return (
            f"masked_lm asks for tokens in their own places, seen from both sides, which is for encoder_only models; "
            f"`span_corruption` is the like of it for a model of family {family}"
        )
    return ""


class MasksConfig(Section):
    """Attention masks within a window, in addition to those of the family."""

    prefix: Literal["causal", "bidirectional"] = "causal"
    """bidirectional: a decoder-only model's source tokens see each other (BiAttn, arXiv 2510.26622; prefix decoder)."""
    intra_document: bool = False
    """A window may hold parts of several documents. true: a token sees only tokens of its document; its position stays
    that in the window. false: tokens also see each other across documents (arXiv 2510.26622 mentions no mask between
    documents)."""
