"""Signal and noise of the metrics of studies."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import DEFAULT_STORE, AsJson, Overrides, StoreOption, console, open_store
from lit_llm.config.collector import gc_disabled


@app.command()
@gc_disabled()
def noise(
    studies: Annotated[
        list[str], typer.Argument(metavar="STUDY", help="Studies of the store: names or files, one for each size.")
    ],
    override: Overrides = None,
    metric: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only metrics whose name matches, e.g. 'eval/tasks/*'.")
    ] = None,
    as_json: AsJson = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show how well each metric tells arms apart: signal, noise, and decision accuracy of small sizes.

    Reads finished runs and trains nothing. With several studies of the same arms, the one with the most training FLOPs
    is the size that the others are to decide for.

    Examples: lit-llm noise quickstart; lit-llm noise small.yaml large.yaml --metric 'eval/tasks/*/acc'
    """
    from lit_llm.report.tables.metric_noise import noise_table
    from lit_llm.report.tables.table import in_terminal
    from lit_llm.studies.metric_noise import noise_of_studies

    report = noise_of_studies(studies, override or (), open_store(store), metric)
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
        return
    screen = console()
    if report.rows:
        screen.print(*in_terminal(noise_table(report), screen.width), sep="\n")
        return
    for note in report.notes:
        screen.print(note, highlight=False, soft_wrap=True)
