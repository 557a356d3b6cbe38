"""Studies: plan, run, status, report, train, adapt."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import (
    DEFAULT_STORE,
    AsJson,
    ExperimentArgument,
    Grace,
    Launcher,
    LauncherOption,
    LaunchWish,
    LinesOfJson,
    NewVersion,
    Overrides,
    PlacesOption,
    Rerun,
    Retries,
    SlotsPerDevice,
    StallAfter,
    Storage,
    StoreOption,
    StudyArgument,
    Tracking,
    charts,
    console,
    open_store,
    places_and_jobs,
    relative_path,
    same_command,
    supervision,
    timings,
    unwritable,
)
from lit_llm.config.collector import gc_disabled
from lit_llm.config.problems import InputError, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from lit_llm.store.store import Store
    from lit_llm.studies.load import Ablation
    from lit_llm.studies.plan import Plan
    from lit_llm.studies.seeds_needed import PowerPlan


@app.command()
@gc_disabled()
def plan(
    study: StudyArgument,
    override: Overrides = None,
    as_json: AsJson = False,
    prompt: Annotated[
        int, typer.Option(min=1, help="Prompt tokens for prefill, decoding and the key-value cache.")
    ] = 1000,
    generate: Annotated[int, typer.Option(min=1, help="Generated tokens for decoding and the key-value cache.")] = 1000,
    jobs: Annotated[
        int | None,
        typer.Option("-j", "--jobs", min=1, help="Runs at once, for the estimate; by default those of `run`."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time three steps of each arm here, for the estimate; kept for later. Where a step takes less than a "
            "second, also find the fastest -j and threads.",
        ),
    ] = False,
    power: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="DIFFERENCE",
            help="Seeds that detect this difference, in the primary metric's unit, with 80% power.",
        ),
    ] = None,
    pilot: Annotated[
        str | None,
        typer.Option(metavar="STUDY", help="For --power: take the scatter from the finished runs of this study."),
    ] = None,
    slots_per_device: SlotsPerDevice = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show every arm before it runs: parameters, FLOPs, cache, tokens, time, what differs, whether it is fair.

    Examples: lit-llm plan ablations/quickstart.yaml -o pretrain.data.sequence_length=256; lit-llm plan
    ablations/quickstart.yaml --measure; lit-llm plan redllm-1b -o pretrain.training.execution.devices=8
    """
    from lit_llm.launch.settings import launch_settings
    from lit_llm.studies.duration import estimated
    from lit_llm.studies.parallelism import max_parallel, with_throughputs
    from lit_llm.studies.plan import plan as make_plan
    from lit_llm.studies.stored import open_study
    from lit_llm.studies.undecidable_metrics import with_undecidable_metrics
    from lit_llm.sweeps.sweep import is_sweep, open_sweep

    place = open_store(store)
    search = open_sweep(study, override or (), place) if is_sweep(study, place) else None
    ablation = open_study(study, override or (), place) if search is None else search.ablation
    planned = make_plan(ablation, prompt, generate, log=partial(print, file=sys.stderr), store=place)
    if search is None:
        _matching_version(ablation, place, console(stderr=True))
        planned = with_undecidable_metrics(planned, place)
    at_once = jobs or max_parallel(ablation, slots_per_device or launch_settings(place.root).slots_per_device)
    measuring = measure and not planned.refused
    step_timings = timings(planned, at_once, place, measuring)
    planned = estimated(planned, at_once, step_timings, place)
    if measuring and (search is None or search.trains):
        trials = search.sweep.trials if search else 1
        planned = with_throughputs(planned, at_once, step_timings, trials, partial(print, file=sys.stderr, flush=True))
    needed = _seeds_needed(planned, place, power, pilot, search is not None)
    if as_json:
        more = (search.as_json() if search else {}) | ({"power": needed.as_json()} if needed else {})
        print(json.dumps(planned.as_json() | more, indent=1))
    elif search is not None:
        from lit_llm.report.tables.sweep import sweep_plan

        screen = console()
        screen.print(sweep_plan(search, planned, screen.width))
    else:
        from lit_llm.report.tables.plan import render_plan

        screen = console()
        screen.print(render_plan(planned, screen.width))
        if needed is not None:
            from lit_llm.report.tables.seeds_needed import power_table
            from lit_llm.report.tables.table import in_terminal

            screen.print()
            screen.print(*in_terminal(power_table(needed), screen.width), sep="\n")
    if planned.refused:
        raise typer.Exit(2)


def _seeds_needed(
    planned: Plan, store: Store, difference: float | None, pilot: str | None, is_sweep: bool
) -> PowerPlan | None:
    """The seeds for `--power`; None without this option. Raises InputError."""
    if difference is None and pilot is None:
        return None
    if not difference:
        message = "needs the difference to detect, above 0: `--power 0.02`"
        raise InputError(Problem(message, "--power"))
    if is_sweep:
        message = "a sweep ranks trials by one value each; ask it of the study that compares its winners"
        raise InputError(Problem(message, "--power"))
    if all(arm.arm.name == arm.arm.baseline for arm in planned.arms):
        raise InputError(Problem("no arm is compared with another, so there is no difference to show", "--power"))
    from lit_llm.studies.seeds_needed import seeds_needed

    return seeds_needed(planned, store, difference, pilot)


@app.command()
def run(
    study: StudyArgument,
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            help="Runs at once: by default one on each GPU, else as many as the cores allow. With a launcher: in each "
            "place.",
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="GLOB", help="Only arms whose name matches, e.g. 'red*'.")] = None,
    rerun: Annotated[Rerun | None, typer.Option(help="Repeat runs that failed, or that other code has done.")] = None,
    override: Overrides = None,
    as_json: LinesOfJson = False,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
    retries: Retries = None,
    stall_after: StallAfter = None,
    grace: Grace = None,
    new_version: NewVersion = False,
    launcher: LauncherOption = None,
    places: PlacesOption = None,
    slots_per_device: SlotsPerDevice = None,
) -> None:
    """Run what is not done, resume what was interrupted, and compare.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 stop at the next step and keep everything; the same command goes on, also beside
    it on other machines that share the store. Results of other settings under the study's name are never mixed with
    these, nor removed: see --new-version. Example: lit-llm run ablations/quickstart.yaml -j 2
    """
    from lit_llm.report.pages.study import write_report
    from lit_llm.report.progress.json_lines import Lines
    from lit_llm.report.progress.terminal import Progressing
    from lit_llm.report.summary import render_study
    from lit_llm.studies.run import run_study
    from lit_llm.studies.stored import open_study
    from lit_llm.sweeps.sweep import is_sweep

    place = open_store(store)
    if is_sweep(study, place):
        raise InputError(
            Problem(f"{study} is a sweep: use `{same_command('sweep', study, override, store, tracking)}`")
        )
    ablation = open_study(study, override or (), place)
    wish = LaunchWish(jobs, launcher, places, slots_per_device)
    engine_places, at_once = places_and_jobs(ablation, place, wish)
    screen = console(stderr=as_json)
    lines = Lines(sys.stdout, screen) if as_json else None
    with lines.until_interrupted() if lines is not None else nullcontext():
        finished = run_study(
            ablation,
            place,
            observer=lines or Progressing(screen),
            max_parallel=at_once,
            only=only,
            rerun=rerun.value if rerun else None,
            tracking=tracking,
            report=write_report,
            supervision=supervision(retries, stall_after, grace),
            new_version=new_version,
            places=engine_places,
        )
    if lines is not None:
        lines.compared(finished)
    else:
        screen.print()
        screen.print(render_study(ablation, finished.comparison, screen.width, place))
        _print_registration(finished.folder, screen)
        seen = charts(store, tracking, finished.mirrored)
        page = finished.folder / "report.html"
        read = finished.folder if finished.interrupted or not page.exists() else page
        screen.print(f"\nreport: {relative_path(read)}   charts: {seen}", style="dim", highlight=False, soft_wrap=True)
    if finished.interrupted:
        command = same_command("run", study, override, store, tracking)
        screen.print(f"Interrupted; `{command}` goes on.", style="yellow", highlight=False)
    elif finished.exit_code:
        why = same_command("status", study, override, store)
        screen.print(f"Some runs did not finish: `{why}` says why.", style="red", highlight=False)
    raise typer.Exit(finished.exit_code)


@app.command()
@gc_disabled()
def status(
    study: StudyArgument,
    override: Overrides = None,
    as_json: AsJson = False,
    store: StoreOption = DEFAULT_STORE,
    storage: Storage = None,
) -> None:
    """Show the state of each run, or of each trial of a sweep. Example: lit-llm status ablations/quickstart.yaml"""
    from lit_llm.cli.places import places_line
    from lit_llm.cli.sweeps import sweep_status
    from lit_llm.studies.runs import runs_of
    from lit_llm.studies.status import status_rows
    from lit_llm.studies.stored import open_study
    from lit_llm.sweeps.sweep import is_sweep

    place = open_store(store)
    if is_sweep(study, place):
        sweep_status(study, override, as_json, place, storage)
        return
    screen = console()
    ablation = open_study(study, override or (), place)
    ablation, problems = _matching_version(ablation, place, None if as_json else screen)
    rows = list(status_rows(runs_of(ablation, place)))
    in_queue = places_line(place, ablation.study.study)
    if as_json:
        content = {"study": ablation.study.study, "runs": rows, "differs": problems, "places": in_queue}
        print(json.dumps(content, indent=1))
        return
    from lit_llm.report.tables.plan import render_status

    screen.print(render_status(rows, ablation.study.compare.metric))
    if in_queue:
        screen.print(f"places: {in_queue}", highlight=False)


def _matching_version(ablation: Ablation, store: Store, screen: Console | None) -> tuple[Ablation, list[str]]:
    """(the stored version that matches a study, differences from the results under its name, which are printed)."""
    from lit_llm.studies.stored import AnotherVersion, version_of

    try:
        return version_of(store, ablation), []
    except AnotherVersion as error:
        problems = [str(problem) for problem in error.problems]
        if screen is not None:
            lines = "\n".join(["Another version has results under this name:", *problems, error.hint])
            screen.print(lines, style="yellow", highlight=False, soft_wrap=True)
        return ablation, problems


@app.command()
@gc_disabled()
def report(
    study: StudyArgument,
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second study, to compare the first one with.")
    ] = None,
    override: Overrides = None,
    as_json: AsJson = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="Figures as PDF of a study of more than 300 runs too.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder to write to; studies/<study>/ in the store when absent."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    storage: Storage = None,
    tracking: Tracking = None,
) -> None:
    """Compare what is finished, without running anything, and write the report: a page, tables, figures.

    The files go to studies/<study>/ in the store, and to MLflow where it has the study; or only to --out, for a
    read-only store. With two studies: the results of their common arms, side by side.

    Example: lit-llm report ablations/quickstart.yaml
    """
    from lit_llm.cli.sweeps import sweep_report
    from lit_llm.report.pages.all_studies import discoveries_line, studies_of
    from lit_llm.studies.analysis_plan import registration_of
    from lit_llm.studies.comparison import comparison_of, note_comparison
    from lit_llm.studies.runs import runs_of
    from lit_llm.studies.status import left_out
    from lit_llm.studies.stored import damage_of, open_study, version_of
    from lit_llm.sweeps.sweep import is_sweep

    place = open_store(store)
    if other is not None:
        _report_two(study, other, override, as_json, place, out)
        return
    if is_sweep(study, place):
        sweep_report(study, override, as_json, place, storage, out)
        return
    ablation = version_of(place, open_study(study, override or (), place))
    runs = runs_of(ablation, place)
    comparison = comparison_of(ablation, runs)
    problems = [*left_out(runs), *note_comparison(place, ablation, runs, comparison)]
    problems += damage_of(place, ablation.study.study)
    if as_json:
        registered = registration_of(place.study(ablation.study.study))
        more = {"analysis": registered and registered.as_json(), "left_out": left_out(runs)}
        print(json.dumps({"study": ablation.study.study, **comparison.as_json(), **more}, indent=1))
        return
    from lit_llm.report.pages.study import write_report
    from lit_llm.report.summary import render_study
    from lit_llm.studies.mlflow_connection import attach_files
    from lit_llm.studies.plan import PLAN, plan, with_earlier_findings

    screen, folder = console(), place.study(ablation.study.study)
    screen.print(render_study(ablation, comparison, screen.width, place))
    _print_registration(folder, screen)
    for line in (*problems, discoveries_line(studies_of(place).discoveries)):
        if line:
            screen.print(line, style="yellow" if line in problems else "dim", highlight=False, soft_wrap=True)
    if (out is None and not folder.is_dir()) or not comparison.has_results:
        return
    planned = plan(ablation, built=False, runs=runs)
    planned = with_earlier_findings(planned, folder / PLAN) or planned
    with unwritable(out, screen) as written:
        files = write_report(planned, runs, comparison, place, pdf, out)
        written.append((out or folder) / "report.html")
    if not written:
        return
    screen.print(f"\nreport: {relative_path(written[0])}", style="dim", highlight=False, soft_wrap=True)
    if out is not None:
        return
    if problem := attach_files(place, ablation.study.study, tracking, files):
        screen.print(problem, style="yellow", highlight=False)


def _print_registration(folder: Path, screen: Console) -> None:
    """Print a line on the frozen analysis, where there is one."""
    from lit_llm.report.pages.frozen_analysis import summary
    from lit_llm.studies.analysis_plan import registration_of

    registration = registration_of(folder)
    if registration is not None:
        style = "yellow" if registration.problems or any(change.finished for change in registration.changes) else "dim"
        screen.print(summary(registration), style=style, highlight=False, soft_wrap=True)


def _report_two(
    study: str, other: str, override: list[str] | None, as_json: bool, store: Store, out: Path | None
) -> None:
    """`lit-llm report A B`."""
    from lit_llm.report.pages.two_studies import load_two, render_two_studies, write_two

    pair = load_two(study, other, override or (), store)
    if as_json:
        print(json.dumps(pair.as_json(), indent=1))
        return
    screen = console()
    screen.print(render_two_studies(pair, screen.width))
    with unwritable(out, screen) as written:
        written.append(write_two(pair, [study, other], store, out))
    for page in written:
        screen.print(f"\nreport: {relative_path(page)}", style="dim", highlight=False, soft_wrap=True)


@app.command()
def train(
    experiment: ExperimentArgument,
    override: Overrides = None,
    as_json: LinesOfJson = False,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
) -> None:
    """Run one experiment, as a study of one arm. Examples: lit-llm train redllm-tiny -o seed=1; lit-llm
    train redllm-1b -o pretrain.training.execution.devices=8, on eight GPUs of this machine
    """
    from lit_llm.studies.load import is_study

    if is_study(experiment):
        raise InputError(
            Problem(f"{experiment} is a study: use `{same_command('run', experiment, override, store, tracking)}`")
        )
    run(experiment, 1, None, None, override, as_json, store, tracking, launcher=Launcher.local)


@app.command()
def adapt(
    experiment: ExperimentArgument,
    override: Overrides = None,
    as_json: LinesOfJson = False,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
) -> None:
    """Train an experiment that begins with the weights of another, and first that one unless it is finished.

    `train` does the same; this insists on an `adapt` section. Example: lit-llm adapt redllm-tiny -o
    adapt.from=decllm-tiny
    """
    from lit_llm.experiment.load import load_experiment

    if load_experiment(experiment, override or ()).adapt is None:
        message = "has no `adapt` section; give one, e.g. -o adapt.from=decllm-tiny"
        raise InputError(Problem(message, experiment))
    train(experiment, override, as_json, store, tracking)
