"""Places of engines: cancel them, and the command that runs on each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import DEFAULT_STORE, Grace, StoreOption, console, open_store
from lit_llm.config.problems import InputError, Problem
from lit_llm.store.store import Store


@app.command()
def cancel(
    study: Annotated[str, typer.Argument(metavar="NAME", help="A study or sweep of the store.")],
    store: StoreOption = DEFAULT_STORE,
    grace: Grace = None,
) -> None:
    """Stop the places that SLURM or Ray runs for a study or sweep. Runs save first; `run` goes on with them.

    Example: lit-llm cancel quickstart
    """
    from lit_llm.cli.options import supervision
    from lit_llm.launch.engine import EngineError
    from lit_llm.launch.settings import launch_settings
    from lit_llm.studies.launched import cancel as cancel_places

    place = open_store(store)
    folder = place.study(study)
    if not folder.is_dir():
        raise InputError(Problem(f"there is no study or sweep {study!r}; `lit-llm studies` lists them", "NAME"))
    try:
        count = cancel_places(folder, launch_settings(place.root), supervision(None, None, grace).grace_seconds)
    except EngineError as error:
        raise InputError(Problem(str(error))) from None
    what = f"{count} place{'s' if count > 1 else ''} asked to save and end." if count else "No place was running."
    console().print(what, highlight=False)


@app.command(hidden=True)
def work(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="File that `run --launcher` has written.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Compute the work of a manifest until none is left for this place. Engines start it.

    Example: lit-llm work mlruns/studies/quickstart/places/1/manifest.json
    """
    from lit_llm.report.progress.lines import PlaceLines
    from lit_llm.studies.launched import ending_when_cancelled, read_manifest
    from lit_llm.studies.manifest import work_on
    from lit_llm.sweeps.places import draw_on

    work_here = draw_on if "sweep" in read_manifest(manifest) else work_on
    with ending_when_cancelled(manifest.parent):
        interrupted = work_here(manifest, open_store(store), PlaceLines())
    if interrupted:
        raise typer.Exit(130)


def places_line(store: Store, name: str) -> str | None:
    """The places of a study or sweep in its engine's words; None without any."""
    from lit_llm.launch.engine import EngineError
    from lit_llm.launch.settings import launch_settings
    from lit_llm.studies.launched import living_places, requests_of, summary

    if not requests_of(store.study(name)):
        return None
    try:
        living = living_places(store.study(name), launch_settings(store.root))
    except EngineError as error:
        return str(error)
    return summary([place for _, places in living for place in places])
