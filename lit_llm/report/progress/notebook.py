"""A live view in a notebook's output, drawn as text and without widgets."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 110
"""Columns of the view."""
_FORMAT = '<pre style="white-space: pre; overflow-x: auto; line-height: normal">{code}</pre>'


class NotebookLive:
    """Shows a view in the output of the running cell, and draws it again in its place."""

    def __init__(self, view: RenderableType) -> None:
        from IPython.display import display

        self._handle = display(_drawn(view), display_id=True)

    def update(self, view: RenderableType) -> None:
        self._handle.update(_drawn(view))

    def stop(self) -> None:
        """Empty the output, as the lines on ended runs follow."""
        self._handle.update(_drawn(""))


def _drawn(view: RenderableType) -> object:
    """The view as an object that a notebook displays, in HTML or as text."""
    from IPython.display import HTML

    recorder = Console(file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False, force_terminal=True)
    recorder.print(view)
    return HTML(recorder.export_html(inline_styles=True, code_format=_FORMAT))
