"""Two configurations, or the results of two arms, side by side."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import DEFAULT_STORE, AsJson, Overrides, StoreOption, console, open_store
from lit_llm.config.problems import InputError, Problem
from lit_llm.store.store import Store


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A preset, an experiment file, or STUDY:ARM.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    override: Overrides = None,
    items: Annotated[
        bool,
        typer.Option(
            "--items", help="Compare results item by item: documents, examples or questions of finished runs."
        ),
    ] = False,
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="For --items: the metric; the study's own when absent.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="For --items: the number of items to show.")] = 10,
    as_json: AsJson = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show what differs between two configurations, or with --items between their results.

    Examples: lit-llm diff redllm-8b decllm-8b; lit-llm diff quickstart:dec quickstart:red --items
    """
    if metric and not items:
        raise InputError(Problem("is the metric of --items", "--metric"))
    if items:
        _diff_items(left, right, override, metric, top, as_json, open_store(store))
        return
    from rich.table import Table

    from lit_llm.config.tree import difference
    from lit_llm.studies.stored import open_experiment

    place = Store(store)
    pair = [open_experiment(name, override or (), place).model_dump(mode="json") for name in (left, right)]
    differences = difference(*pair)
    if as_json:
        print(json.dumps(differences, indent=1))
        return
    rows = {
        key: ["–" if value is None else json.dumps(value) for value in values] for key, values in differences.items()
    }
    screen = console()
    columns = zip(("key", left, right), *((key, *values) for key, values in rows.items()), strict=True)
    if sum(2 + max(map(len, column)) for column in columns) <= screen.width:
        table = Table("key", left, right, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for key, values in rows.items():
            table.add_row(key, *values)
        screen.print(table if differences else "They are equal.")
        return
    indent = min(max(len(left), len(right)), screen.width // 3)
    for key, values in rows.items():  # too wide for a table: each key, then the value of each side
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=2 + indent, overflow="fold")
        grid.add_column(overflow="fold")
        for name, value in zip((left, right), values, strict=True):
            grid.add_row(f"  {name}", value)
        screen.print(key, style="bold", highlight=False, soft_wrap=True)
        screen.print(grid)


def _diff_items(
    left: str, right: str, override: list[str] | None, metric: str | None, top: int, as_json: bool, store: Store
) -> None:
    """`lit-llm diff A B --items`."""
    from lit_llm.report.tables.items import item_tables
    from lit_llm.report.tables.table import stacked
    from lit_llm.studies.items import items_of

    comparison = items_of(left, right, override or (), store, metric)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
        return
    screen = console()
    screen.print(*stacked(item_tables(comparison, top), screen.width), sep="\n")
