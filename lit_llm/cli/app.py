"""The application that the commands are registered with."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Ablations of language-model architectures: fair, resumable, side by side.",
    epilog="Begin with: lit-llm plan ablations/quickstart.yaml",
)
