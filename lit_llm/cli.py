"""The commands. Each parses its options and calls one function that a notebook could call too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_llm.config.problems import InputError, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from lit_llm.experiment.ceilings import Ceilings, Setting

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Ablations of language-model architectures: fair, resumable, side by side.",
    epilog="Begin with: lit-llm plan ablations/quickstart.yaml",
)

StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study file; for a look at costs, a preset such as redllm-8b.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="KEY=VALUE",
        help="Set a configuration key of every arm, e.g. -o pretrain.training.max_steps=100",
    ),
]
StoreOption = Annotated[
    Path, typer.Option("--store", help="Directory of results, tokenised data and MLflow's database.")
]
Tracking = Annotated[
    str | None,
    typer.Option(
        "--tracking",
        metavar="ADDRESS",
        help="Where MLflow records, e.g. http://localhost:5000; the store's sqlite by default.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DEFAULT_STORE = Path("mlruns")


class Rerun(StrEnum):
    """What to repeat."""

    failed = "failed"
    stale = "stale"


@app.command()
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
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Time this machine, again or not at all. By default once for a study file, never for a preset.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show every arm before it runs: parameters, FLOPs, cache, tokens, time, what differs, whether it is fair.

    Example: lit-llm plan ablations/quickstart.yaml -o pretrain.data.sequence_length=256
    """
    from lit_llm.ablation.arms import load_study
    from lit_llm.ablation.estimate import estimated
    from lit_llm.ablation.plan import plan as make_plan
    from lit_llm.tracking.store import Store

    place = Store(store)
    place.check()
    ablation = load_study(study, override or ())
    planned = make_plan(ablation, prompt, generate, tell=partial(print, file=sys.stderr))
    measuring = Path(study).is_file() if measure is None else measure
    ceilings = _ceilings(measuring and not planned.refused, again=measure is True)
    planned = estimated(planned, jobs or _slots(ablation), ceilings, place)
    if as_json:
        print(json.dumps(planned.as_json(), indent=1))
    else:
        from lit_llm.report.tables import plan_table

        console = _console()
        console.print(plan_table(planned, console.width))
    if planned.refused:
        raise typer.Exit(2)


@app.command()
def run(
    study: StudyArgument,
    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", min=1, help="Runs at once; by default as many as cores allow.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="GLOB", help="Only arms whose name matches, e.g. 'red*'.")] = None,
    rerun: Annotated[Rerun | None, typer.Option(help="Repeat runs that failed, or that other code has done.")] = None,
    override: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
) -> None:
    """Run what is not done, resume what was interrupted, and compare.

    Ctrl-C stops at the next step and keeps everything; the same command goes on. Example: lit-llm run
    ablations/quickstart.yaml -j 2
    """
    from lit_llm.ablation.arms import load_study
    from lit_llm.ablation.run import run_study
    from lit_llm.report.live import Progressing
    from lit_llm.report.tables import comparison_markdown, comparison_table
    from lit_llm.tracking.address import without_password
    from lit_llm.tracking.store import Store

    ablation = load_study(study, override or ())
    console = _console()
    finished = run_study(
        ablation,
        Store(store),
        watcher=Progressing(console),
        slots=jobs or _slots(ablation),
        only=only,
        rerun=rerun.value if rerun else None,
        tracking=tracking,
        render=lambda planned, comparison: {"comparison.md": comparison_markdown(planned, comparison)},
    )
    console.print()
    console.print(f"{ablation.study.study}  {ablation.study.question}", style="bold", highlight=False)
    console.print(comparison_table(finished.comparison, console.width))
    where = "" if store == DEFAULT_STORE else f" --store {store}"
    same = where + "".join(f" -o '{option}'" for option in override or ())
    charts = f"lit-llm ui{where}" if tracking is None else without_password(tracking)
    at = "" if tracking is None else f" --tracking {without_password(tracking)}"
    charts += "" if finished.mirrored else " (behind)"
    tables = _shown(finished.tables[0].parent)
    console.print(f"\ntables: {tables}   charts: {charts}", style="dim", highlight=False, soft_wrap=True)
    if finished.interrupted:
        console.print(f"Interrupted; `lit-llm run {study}{same}{at}` goes on.", style="yellow", highlight=False)
    elif finished.exit_code:
        message = f"Some runs did not finish: `lit-llm status {study}{same}` says why."
        console.print(message, style="red", highlight=False)
    raise typer.Exit(finished.exit_code)


@app.command()
def status(
    study: StudyArgument, override: Overrides = None, as_json: AsJson = False, store: StoreOption = DEFAULT_STORE
) -> None:
    """Show the state of each run. Example: lit-llm status ablations/quickstart.yaml"""
    from lit_llm.ablation.arms import load_study
    from lit_llm.ablation.runs import runs_of, status_rows
    from lit_llm.tracking.store import Store

    place = Store(store)
    place.check()
    ablation = load_study(study, override or ())
    rows = list(status_rows(runs_of(ablation, place)))
    if as_json:
        print(json.dumps({"study": ablation.study.study, "runs": rows}, indent=1))
        return
    from lit_llm.report.tables import status_table

    _console().print(status_table(rows, ablation.study.compare.metric))


@app.command()
def report(
    study: StudyArgument, override: Overrides = None, as_json: AsJson = False, store: StoreOption = DEFAULT_STORE
) -> None:
    """Compare what is finished, without running anything. Example: lit-llm report ablations/quickstart.yaml"""
    from lit_llm.ablation.arms import load_study
    from lit_llm.ablation.runs import comparison_of, runs_of
    from lit_llm.tracking.store import Store

    place = Store(store)
    place.check()
    ablation = load_study(study, override or ())
    comparison = comparison_of(ablation, runs_of(ablation, place))
    if as_json:
        print(json.dumps({"study": ablation.study.study, **comparison.as_json()}, indent=1))
        return
    from lit_llm.report.tables import comparison_table

    console = _console()
    console.print(comparison_table(comparison, console.width))
    if not any(row.seeds for row in comparison.rows):
        console.print(f"Nothing is finished yet: `lit-llm run {study}` runs it.", style="yellow", highlight=False)


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A preset, an experiment file, or STUDY:ARM.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs between two configurations. Example: lit-llm diff redllm-8b decllm-8b"""
    from rich.table import Table

    from lit_llm.ablation.arms import load_experiment_or_arm
    from lit_llm.config.tree import difference

    pair = [load_experiment_or_arm(name, override or ()).model_dump(mode="json") for name in (left, right)]
    found = difference(*pair)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("key", left, right, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for key, values in found.items():
        table.add_row(key, *("–" if value is None else json.dumps(value) for value in values))
    _console().print(table if found else "They are equal.")


@app.command()
def train(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A preset or an experiment file.")],
    override: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
) -> None:
    """Run one experiment, as a study of one arm. Example: lit-llm train redllm-tiny -o seed=1"""
    from lit_llm.ablation.arms import is_study

    if is_study(experiment):
        raise InputError(Problem(f"{experiment} is a study: use `lit-llm run {experiment}`"))
    run(experiment, 1, None, None, override, store, tracking)


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="[study|experiment]", help="Whose schema.")] = "study",
) -> None:
    """Print the JSON Schema for editors. Example: lit-llm schema > study.schema.json"""
    from lit_llm.ablation.schema import experiment_schema, study_schema

    schemas = {"study": study_schema, "experiment": experiment_schema}
    if kind not in schemas:
        raise InputError(Problem(f"{kind!r} has no schema - allowed here: experiment, study"))
    print(json.dumps(schemas[kind](), indent=1))


@app.command()
def ui(
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's UI on the store. Example: lit-llm ui --port 5001"""
    from lit_llm.tracking.address import default_tracking, resolved, ui_command
    from lit_llm.tracking.relocation import notice
    from lit_llm.tracking.store import Store

    place = Store(store)
    place.check()
    if tracking is None and not (place.root / "mlflow.db").exists():
        raise InputError(Problem(f"{place.root} holds no MLflow database yet; `lit-llm run` makes one", "--store"))
    try:
        address, _ = resolved(tracking or default_tracking(place.root))
    except ValueError as error:
        raise InputError(Problem(str(error), "--tracking")) from None
    command = ui_command(address, port)
    if tracking is None:
        if moved := notice(place):
            _console().print(moved, style="yellow", highlight=False, soft_wrap=True)
        print(f"MLflow at http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    os.execv(command[0], command)


store_app = typer.Typer(no_args_is_help=True, help="Take care of a store: after a move, or when the disk is full.")
app.add_typer(store_app, name="store")


@store_app.command("rebase")
def store_rebase(store: StoreOption = DEFAULT_STORE) -> None:
    """After a store was moved or copied, let MLflow find its artifacts in the new place.

    Rewrites the absolute paths in MLflow's database, in one transaction; a second time it finds nothing to do. Results,
    checkpoints and tokenised data need none of it. Example: mv mlruns /data/mlruns; lit-llm store rebase --store
    /data/mlruns
    """
    from lit_llm.tracking.relocation import rebase
    from lit_llm.tracking.store import Store

    place = Store(store)
    place.check()
    done = rebase(place)
    if not done.old:
        print(f"MLflow's paths are those of {done.new} already; nothing was changed.")
        return
    rows = ", ".join(f"{number} of {table}" for table, number in done.rows.items())
    print(f"from {', '.join(map(str, done.old))}\nto   {done.new}\nrewritten: {rows}")


@store_app.command("gc")
def store_gc(
    store: StoreOption = DEFAULT_STORE,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking, for scripts.")] = False,
) -> None:
    """List what a store can do without, with sizes, and remove it once you agree.

    That is: stages that no study lists any more (each `lit-llm run` lists its own, for each set of -o; deleting
    STORE/studies/NAME gives that study's up), optimiser states beside a result, and what killed processes left behind.
    Never what a process works on, a result that a study lists, tokenised data, or MLflow's records. Away from a
    terminal it only lists, unless --yes is given. Example: lit-llm store gc --store /data/mlruns --yes
    """
    from rich.table import Table

    from lit_llm.report.text import size
    from lit_llm.tracking.garbage import find, remove
    from lit_llm.tracking.store import Store

    place, console = Store(store), _console()
    found = find(place)
    for folder in found.unlisted:
        message = f"{_shown(folder)} has no readable list of its runs, so no stage counts as orphaned"
        console.print(
            f"{message}: run that study once more, or delete the folder to give its stages up.",
            style="yellow",
            soft_wrap=True,
        )
    for folder, file in found.vanished:
        message = f"{_shown(folder)} lists runs of {file}, which is gone: their stages are kept"
        console.print(f"{message} until you delete the folder.", style="yellow", soft_wrap=True)
    if not found.garbage:
        print("Nothing to remove.")
        return
    table = Table("what", "size", "where", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    for item in found.garbage:
        table.add_row(item.kind, size(item.bytes), str(item.path.relative_to(place.root)))
    console.print(table, highlight=False)
    print(f"{len(found.garbage)} to remove, {size(sum(item.bytes for item in found.garbage))}, in {place.root}")
    if not yes and not sys.stdin.isatty():
        print("Nothing was removed: --yes does it without asking.")
    elif yes or typer.confirm("Remove all of it?"):
        removed = remove(place, found.garbage)
        print(f"Removed {len(removed)}, {size(sum(item.bytes for item in removed))}.")
    else:
        print("Nothing was removed.")


def _ceilings(measuring: bool, again: bool) -> Callable[[Setting], Ceilings | None]:
    """What is known of this machine, or with `measuring` found out now."""
    from lit_llm.experiment.ceilings import cached, measure

    def find(setting: Setting) -> Ceilings | None:
        found = None if again else cached(setting)
        if found is not None or not measuring:
            return found
        how = f"{setting.precision}, {setting.threads} thread{'s' if setting.threads > 1 else ''}"
        beside = f", {setting.at_once} at once" if setting.at_once > 1 else ""
        print(f"timing this machine once ({setting.device}, {how}{beside}) ...", file=sys.stderr, flush=True)
        return measure(setting)

    return find


def _slots(ablation: Any) -> int:
    """One run where there is a GPU that it may take, else as many as the cores allow."""
    from lit_llm.experiment.identity import has_gpu
    from lit_llm.launch import cores

    executions = [arm.experiment.pretrain.training.execution for arm in ablation.arms]
    if has_gpu() and any(execution.accelerator != "cpu" for execution in executions):
        return 1
    return max(1, cores() // max(execution.threads for execution in executions))


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False)  # a level's label may have brackets


def main() -> None:
    """Entry point: the user's errors are messages and exit code 2, never tracebacks."""
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        print(error.report(), file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted; the same command goes on.", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not hasattr(error, "show"):  # Typer's own: a wrong option
            raise
        error.show()
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
