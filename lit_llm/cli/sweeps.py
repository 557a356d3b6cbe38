"""Sweeps: run one, and its part of `status` and `report`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import (
    DEFAULT_STORE,
    Grace,
    LauncherOption,
    LaunchWish,
    LinesOfJson,
    Overrides,
    PlacesOption,
    Rerun,
    Retries,
    SlotsPerDevice,
    StallAfter,
    Storage,
    StoreOption,
    Tracking,
    charts,
    console,
    places_and_jobs,
    relative_path,
    same_command,
    supervision,
    unwritable,
)

if TYPE_CHECKING:
    from rich.console import Console

    from lit_llm.store.store import Store
    from lit_llm.sweeps.run import Searched


@app.command()
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep file, or a sweep's name in the store.")],
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            help="Trials at once: by default one on each GPU, else as many as the cores allow. With a launcher: in "
            "each place.",
        ),
    ] = None,
    rerun: Annotated[
        Rerun | None,
        typer.Option(help="Repeat trials that failed; or begin anew where other code has done some."),
    ] = None,
    override: Overrides = None,
    as_json: LinesOfJson = False,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
    storage: Storage = None,
    retries: Retries = None,
    stall_after: StallAfter = None,
    grace: Grace = None,
    launcher: LauncherOption = None,
    places: PlacesOption = None,
    slots_per_device: SlotsPerDevice = None,
) -> None:
    """Search the settings of each arm with equal budgets, then compare the best ones over fresh seeds.

    Ctrl-C keeps everything; the same command goes on, on this machine or beside it on others that share the store.
    Example: lit-llm sweep sweeps/quickstart.yaml -j 2
    """
    from lit_llm.report.pages.study import write_report
    from lit_llm.report.progress.json_lines import SweepLines
    from lit_llm.report.progress.terminal import Searching
    from lit_llm.store.store import Store
    from lit_llm.sweeps.run import run_sweep
    from lit_llm.sweeps.sweep import open_sweep

    screen, place = console(stderr=as_json), Store(store)
    search = open_sweep(sweep, override or (), place)
    wish = LaunchWish(jobs, launcher, places, slots_per_device)
    engine_places, at_once = places_and_jobs(search.ablation, place, wish)
    lines = SweepLines(sys.stdout, screen, search, place) if as_json else None
    with lines.until_interrupted() if lines is not None else nullcontext():
        ended = run_sweep(
            search,
            place,
            observer=lines or Searching(screen, search, place),
            max_parallel=at_once,
            storage=storage,
            tracking=tracking,
            rerun=rerun.value if rerun else None,
            report=write_report,
            supervision=supervision(retries, stall_after, grace),
            places=engine_places,
        )
    if lines is not None:
        lines.searched(ended)
    else:
        _print_searched(ended, screen)
        report_command = same_command("report", sweep, override, store, None, storage)
        screen.print(
            f"figures: {report_command}   charts: {charts(store, tracking, ended.mirrored)}",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    if ended.exit_code == 130:
        command = same_command("sweep", sweep, override, store, tracking, storage)
        screen.print(f"Interrupted; `{command}` goes on.", style="yellow", highlight=False, soft_wrap=True)
    elif ended.exit_code == 1:
        failed = {}
        if ended.failed:
            failed["trials"] = same_command("status", sweep, override, store, None, storage)
        if ended.winners is not None and ended.winners.exit_code == 1:
            winners = relative_path(place.study(search.name) / "winners.yaml")
            failed["runs of the winners"] = same_command("status", str(winners), None, store)
        for what, why in failed.items():
            screen.print(f"Some {what} failed: `{why}` says why.", style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(ended.exit_code)


def _print_searched(ended: Searched, screen: Console) -> None:
    from lit_llm.report.tables.comparison import render_comparison
    from lit_llm.report.tables.sweep import render_sweep

    name = ended.search.name
    screen.print()
    screen.print(f"{name}  {ended.search.sweep.question}", style="bold", highlight=False)
    screen.print(render_sweep(ended.search, ended.summaries, screen.width))
    if ended.winners is not None:
        screen.print()
        screen.print(f"{name}-winners  over fresh seeds, which the search has not seen", style="bold", highlight=False)
        screen.print(render_comparison(ended.winners.comparison, screen.width))
    if ended.best:
        screen.print(
            f"\nbest settings: {relative_path(ended.best[0].parent)} (`lit-llm train` takes them)",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )


def sweep_status(file: str, override: list[str] | None, as_json: bool, store: Store, storage: str | None) -> None:
    """`lit-llm status` of a sweep."""
    from lit_llm.cli.places import places_line
    from lit_llm.report.tables.sweep import render_trials, trials_json
    from lit_llm.sweeps.sweep import open_sweep
    from lit_llm.sweeps.trials import Trials

    search = open_sweep(file, override or (), store)
    trials = Trials(search, store, storage).all()
    if as_json:
        print(json.dumps(trials_json(search, trials), indent=1))
    elif trials:
        console().print(render_trials(search, trials))
        if in_queue := places_line(store, search.name):
            console().print(f"places: {in_queue}", highlight=False)
    else:
        command = same_command("sweep", file, override, store.root, None, storage)
        console().print(f"No trial yet: `{command}` runs them.", style="yellow", highlight=False, soft_wrap=True)


def sweep_report(
    file: str, override: list[str] | None, as_json: bool, store: Store, storage: str | None, out: Path | None = None
) -> None:
    """`lit-llm report` of a sweep."""
    from lit_llm.report.tables.sweep import render_sweep, sweep_json
    from lit_llm.sweeps.confirmation import summary
    from lit_llm.sweeps.sweep import open_sweep
    from lit_llm.sweeps.trials import Trials

    search = open_sweep(file, override or (), store)
    trials = Trials(search, store, storage)
    all_trials = trials.all()
    summaries = [summary(search, arm, all_trials) for arm in search.spaces]
    if as_json:
        print(json.dumps(sweep_json(search, summaries), indent=1))
        return
    screen = console()
    screen.print(render_sweep(search, summaries, screen.width))
    if not any(each.best for each in summaries):
        command = same_command("sweep", file, override, store.root, None, storage)
        screen.print(f"Nothing is finished yet: `{command}` runs it.", style="yellow", highlight=False, soft_wrap=True)
        return
    from lit_llm.report.pages.sweep import write_sweep_report

    with unwritable(out, screen) as written:
        written.append(write_sweep_report(search, trials, all_trials, summaries, store, out))
    for page in written:
        screen.print(f"\nreport: {relative_path(page)}", style="dim", highlight=False, soft_wrap=True)
    screen.print(
        f"optuna-dashboard {trials.address}   (pip install optuna-dashboard)",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
