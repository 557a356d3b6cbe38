"""The application that the commands are registered with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

import lit_llm

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Commands(typer.Typer):
    """Typer's commands, with docstrings wrapped at the terminal's width.

    Typer keeps the line breaks of all paragraphs but the first, which a narrow terminal wraps once more.
    """

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Function], _Function]:
        register = super().command

        def registered(function: _Function) -> _Function:
            paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
            unwrapped = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
            return register(name, **{"help": unwrapped, **settings})(function)

        return registered


app = Commands(
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
