"""The studies of a store."""

from __future__ import annotations

import json

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import DEFAULT_STORE, AsJson, StoreOption, console, open_store
from lit_llm.config.collector import gc_disabled


@app.command()
@gc_disabled()
def studies(as_json: AsJson = False, store: StoreOption = DEFAULT_STORE) -> None:
    """List the studies of a store: question, runs, date, answer; and how many of their findings may be false.

    Other commands take their names in place of a file: lit-llm report NAME.

    Example: lit-llm studies --store mlruns
    """
    from lit_llm.report.pages.all_studies import studies_of, studies_table
    from lit_llm.report.tables.table import in_terminal

    place = open_store(store)
    overview = studies_of(place)
    if as_json:
        typer.echo(json.dumps(overview.as_json(), indent=1))
        return
    screen = console()
    if not overview.entries:
        screen.print(f"There is no study in {place.root}: `lit-llm run STUDY` makes one.", highlight=False)
        return
    screen.print(*in_terminal(studies_table(overview), screen.width), sep="\n")
