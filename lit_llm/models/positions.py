"""Rows of the tables of learned positions that a text reads. Loads no torch."""

from __future__ import annotations

from lit_llm.models.resolved import ResolvedModel


def positions_read(model: ResolvedModel, source: int, target: int) -> int:
    """Least rows of a table of learned positions for a source and a target of so many tokens.

    A decoder reads <s> in place of the last token, and an empty source is one token.
    """
    if model.family == "encoder_only":  # its targets are in the places of its source
        return source
    if model.family == "encoder_decoder":
        source = max(source, 1)
        return source + target if model.embedding.positions == "continuous" else max(source, target)
    row = source + target
    if model.block and model.embedding.positions == "restart":
        return max(int(model.read_by_encoder(row)), min(row, model.block))
    return row


def too_few_positions(model: ResolvedModel, needed: int) -> str:
    """Message for a model that learns fewer positions than are needed, or ''."""
    rows = model.embedding.max_positions
    if rows is None or needed <= rows:
        return ""
    return f"{needed} positions are needed, and the model learns {rows} (model.embedding.max_positions)"


def prompt_beyond_table(model: ResolvedModel, prompt: int, more: int) -> str:
    """Message for a prompt that leaves no learned positions for so many more tokens, or ''."""
    problem = too_few_positions(model, positions_read(model, prompt, more))
    return problem and f"a prompt of {prompt} tokens with {more} more: {problem}; ask for fewer tokens"
