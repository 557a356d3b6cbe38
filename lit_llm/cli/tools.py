"""Tools: schema, profile, ui, and those for stores."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import webbrowser
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_llm.cli.app import Commands, app
from lit_llm.cli.options import (
    DEFAULT_STORE,
    AsJson,
    ExperimentArgument,
    Overrides,
    StoreOption,
    Tracking,
    console,
    open_store,
    relative_path,
)
from lit_llm.config.problems import InputError, Problem

if TYPE_CHECKING:
    from lit_llm.store.mirror import Copied


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="[study|experiment|sweep]", help="Kind of file.")] = "study",
) -> None:
    """Print the JSON Schema for editors. Example: lit-llm schema > study.schema.json"""
    from lit_llm.studies.json_schema import experiment_schema, study_schema
    from lit_llm.sweeps.json_schema import sweep_schema

    schemas = {"study": study_schema, "experiment": experiment_schema, "sweep": sweep_schema}
    if kind not in schemas:
        raise InputError(Problem(f"{kind!r} has no schema - allowed here: experiment, study, sweep"))
    print(json.dumps(schemas[kind](), indent=1))


@app.command()
def profile(
    experiment: ExperimentArgument,
    override: Overrides = None,
    stage: Annotated[str, typer.Option(metavar="[pretrain|finetune]", help="Which of its trainings.")] = "pretrain",
    steps: Annotated[int, typer.Option(min=1, help="Profiled steps.")] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev, e.g. --trace step.json.gz"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a training step goes, beside what this machine can do.

    Steps on random tokens, in this process; nothing is stored. Example: lit-llm profile decllm-tiny -o
    pretrain.training.precision=bf16
    """
    from lit_llm.experiment.load import load_experiment

    planned = load_experiment(experiment, override or ())
    if stage not in ("pretrain", "finetune") or (stage == "finetune" and planned.finetune is None):
        allowed = "pretrain" if planned.finetune is None else "pretrain, finetune"
        raise InputError(Problem(f"{stage!r} is no training of {experiment} - allowed here: {allowed}", "--stage"))
    print(f"profiling {steps} step{'s' * (steps > 1)} of {experiment} ...", file=sys.stderr, flush=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes lines of its own
    from lit_llm.report.tables.step_profile import profile_table
    from lit_llm.report.tables.table import in_terminal
    from lit_llm.runs.step_profile import profile_step

    profiled = profile_step(planned, "finetune" if stage == "finetune" else "pretrain", steps, trace)
    if as_json:
        print(json.dumps(asdict(profiled), indent=1))
        return
    screen = console()
    screen.print(*in_terminal(profile_table(profiled), screen.width), sep="\n")
    if trace is not None:
        print(f"trace: {trace}, for https://ui.perfetto.dev")


@app.command()
def ui(
    study: Annotated[
        str | None,
        typer.Argument(metavar="[STUDY]", help="Which to open on, a file or a name; by default the one run last."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines read and change what is recorded.")
    ] = "127.0.0.1",
    browse: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open", help="Open a browser; by default where there is a screen.", show_default=False
        ),
    ] = None,
) -> None:
    """Open MLflow's UI on the study that was run last, or on another.

    With --tracking that is an http address, that server's UI. Example: lit-llm ui ablations/quickstart.yaml --port 5001
    """
    from lit_llm.tracking.address import default_tracking, is_http, resolved, taken, ui_command
    from lit_llm.tracking.mlflow_links import latest_study, study_page
    from lit_llm.tracking.relocation import notice

    place = open_store(store)
    if tracking is None and not (place.root / "mlflow.db").exists():
        raise InputError(Problem(f"{place.root} holds no MLflow database yet; `lit-llm run` makes one", "--store"))
    try:
        address, database = resolved(tracking or default_tracking(place.root))
    except ValueError as error:
        raise InputError(Problem(str(error), "--tracking")) from None
    command = ui_command(address, port, host)
    if is_http(address):
        os.execv(command[0], command)
    if why := taken(host, port):
        free = next((other for other in range(port + 1, min(port + 100, 65536)) if not taken(host, other)), port)
        instead = f"; `--port {free}` is free" if free != port else ""
        raise InputError(Problem(f"{host}:{port} cannot be served on ({why}){instead}", "--port"))
    name = latest_study(place.root / "studies") if study is None else _study_name(study)
    page = study_page(database, name) if database is not None and name else ""
    if study is not None and not page:
        raise InputError(Problem(f"MLflow has no study {name!r} yet; `lit-llm run` makes it", "STUDY"))
    if tracking is None and (moved := notice(place)):
        console().print(moved, style="yellow", highlight=False, soft_wrap=True)
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    served = f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"
    print(f"MLflow at {served}  (Ctrl-C ends it)", flush=True)
    if page:
        print(f"{name}: {served}{page}", flush=True)
    screen = sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if browse or (browse is None and screen and sys.stdout.isatty()):
        _open_once_served(f"{served}{page}", reached, port)
    os.execv(command[0], command)


def _study_name(study: str) -> str:
    """Name of the study in a file (study, sweep or experiment); any other name unchanged."""
    if not Path(study).is_file():
        return study
    from lit_llm.studies.load import load_study
    from lit_llm.sweeps.sweep import is_sweep, load_sweep

    return load_sweep(study).name if is_sweep(study) else load_study(study).study.study


def _open_once_served(address: str, host: str, port: int) -> None:
    """Open a browser once the server answers, within a minute, from a process that Ctrl-C ends too."""
    if os.fork():
        return
    with suppress(BaseException):  # the address is printed anyway
        for _ in range(120):
            with suppress(OSError), socket.create_connection((host, port), timeout=1):
                webbrowser.open(address)
                break
            time.sleep(0.5)
    os._exit(0)


store_app = Commands(no_args_is_help=True, help="Take care of a store: after a move, or when the disk is full.")
app.add_typer(store_app, name="store")


@store_app.command("rebase")
def store_rebase(store: StoreOption = DEFAULT_STORE) -> None:
    """After a store was moved or copied, let MLflow find its artifacts in the new place.

    Rewrites the absolute paths in MLflow's database, in one transaction; a second time it finds nothing to do. Results,
    checkpoints and tokenised data need none of it. Example: mv mlruns /data/mlruns; lit-llm store rebase --store
    /data/mlruns
    """
    from lit_llm.tracking.relocation import rebase

    place = open_store(store)
    done = rebase(place)
    if not done.old:
        print(f"MLflow's paths are those of {done.new} already; nothing was changed.")
        return
    rows = ", ".join(f"{number} of {table}" for table, number in done.rows.items())
    print(f"from {', '.join(map(str, done.old))}\nto   {done.new}\nrewritten: {rows}")


Address = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="A folder, s3://bucket/path, or another address of fsspec.")
]


@store_app.command("push")
def store_push(address: Address, store: StoreOption = DEFAULT_STORE) -> None:
    """Copy finished results to another address; what is there already is left.

    Results, weights, metrics and reports are copied; tokenised data and MLflow's records are not. Example: lit-llm
    store push s3://results/run7
    """
    from lit_llm.store.mirror import push

    _print_copied("copied", push(open_store(store), address, _log_copy))


@store_app.command("pull")
def store_pull(address: Address, store: StoreOption = DEFAULT_STORE) -> None:
    """Copy results from an address that `store push` has filled; what the store has stays as it is.

    `lit-llm run STUDY` then computes only what is missing, and records all in MLflow. Example: lit-llm store pull
    s3://results/run7 --store mlruns
    """
    from lit_llm.store.mirror import pull

    _print_copied("fetched", pull(open_store(store), address, _log_copy))


def _log_copy(name: str) -> None:
    if sys.stderr.isatty():
        print(f"{name} ...", file=sys.stderr, flush=True)


def _print_copied(verb: str, copied: Copied) -> None:
    from lit_llm.report.text import size

    print(f"{verb}: {copied.stages} stages, {copied.files} files, {size(copied.bytes)}")


@store_app.command("rebuild-mlflow")
def store_rebuild_mlflow(store: StoreOption = DEFAULT_STORE) -> None:
    """Make MLflow's database anew from what is on disk, where it is broken.

    The old file is kept beside it. Results are on disk and need none of it. Example: lit-llm store rebuild-mlflow
    --store /data/mlruns
    """
    from lit_llm.store.store import Store
    from lit_llm.studies.rebuild_mlflow import rebuild_mlflow
    from lit_llm.tracking.mlflow_sync import SyncUnavailable

    try:
        done = rebuild_mlflow(Store(store), log=lambda name: print(f"{name} ...", flush=True))
    except SyncUnavailable as problem:
        raise InputError(Problem(str(problem), "--store")) from None
    count = len(done.studies)
    print(f"{count} {'study is' if count == 1 else 'studies are'} in {Store(store).root / 'mlflow.db'}")
    if done.aside is not None:
        print(f"the old database is {done.aside}")
    if done.left:
        print(f"sweeps come back when they are run once more: {', '.join(done.left)}")
    for line in done.unread:
        print(f"left out: {line}")


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
    from lit_llm.store.garbage_collection import find, remove
    from lit_llm.store.store import Store

    place, screen = Store(store), console()
    removable = find(place)
    for folder in removable.unlisted:
        message = f"{relative_path(folder)} has no readable list of its runs, so no stage counts as orphaned"
        screen.print(
            f"{message}: run that study once more, or delete the folder to give its stages up.",
            style="yellow",
            soft_wrap=True,
        )
    for folder, file in removable.vanished:
        message = f"{relative_path(folder)} lists runs of {file}, which is gone: their stages are kept"
        screen.print(f"{message} until you delete the folder.", style="yellow", soft_wrap=True)
    if not removable.garbage:
        print("Nothing to remove.")
        return
    table = Table("what", "size", "where", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    for item in removable.garbage:
        table.add_row(item.kind, size(item.bytes), str(item.path.relative_to(place.root)))
    screen.print(table, highlight=False)
    print(f"{len(removable.garbage)} to remove, {size(sum(item.bytes for item in removable.garbage))}, in {place.root}")
    if not yes and not sys.stdin.isatty():
        print("Nothing was removed: --yes does it without asking.")
    elif yes or typer.confirm("Remove all of it?"):
        removed = remove(place, removable.garbage)
        print(f"Removed {len(removed)}, {size(sum(item.bytes for item in removed))}.")
    else:
        print("Nothing was removed.")
