"""The application that the commands are registered with."""

from __future__ import annotations

from typing import Annotated

import typer

import lit_llm

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Begin with: lit-llm plan ablations/quickstart.yaml",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lit-llm {lit_llm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ablations of language-model architectures: fair, resumable, side by side."""
