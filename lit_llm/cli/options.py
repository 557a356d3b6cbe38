"""Options, console and defaults that the commands share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.store import DEFAULT, Store

if TYPE_CHECKING:
    from rich.console import Console

    from lit_llm.runs.step_timing import StepTiming
    from lit_llm.studies.launched import Places
    from lit_llm.studies.load import Ablation
    from lit_llm.studies.plan import Plan
    from lit_llm.studies.supervise import Supervision


class Launcher(StrEnum):
    """Engines that supply places."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


class Rerun(StrEnum):
    """Runs to repeat."""

    failed = "failed"
    stale = "stale"


StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study's file, its name in the store, or a preset such as redllm-8b.")
]
ExperimentArgument = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="A preset, or the file of an experiment: also a stage's own, STORE/stages/X/config.yaml.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="KEY=VALUE",
        help="Set a configuration key of every arm, e.g. -o model.d_model=256",
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
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database of a sweep's trials, e.g. postgresql://user@host/db, mysql://user@host/db, or sqlite:///FILE "
        "on one machine; a journal in the store by default.",
    ),
]
Retries = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default=False,
        help="Restarts of a run from its checkpoint when its process was killed or made no progress; a run out of "
        "memory goes on with half the micro-batch. By default 2; 0: never.",
    ),
]
StallAfter = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="SECONDS",
        show_default=False,
        help="Stop a run after this time without progress, e.g. --stall-after 900; 0: never. By default after two "
        "hours, or 20 times the longest pause that it has come back from.",
    ),
]
Grace = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="SECONDS",
        show_default=False,
        help="Time to save checkpoints after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, before runs are killed. By default "
        "25; keep it below the batch system's own, e.g. --grace 8 for Docker's 10.",
    ),
]
LauncherOption = Annotated[
    Launcher | None,
    typer.Option(
        show_default=False,
        help="Where runs are computed: on this machine, or on places of SLURM or Ray that share the store. By default "
        "the one in the settings, else this machine. See the page 'From a laptop to a cluster'.",
    ),
]
PlacesOption = Annotated[
    int | None,
    typer.Option(
        "--places", min=1, show_default=False, help="Places that the engine is asked for, each with -j runs at once."
    ),
]
SlotsPerDevice = Annotated[
    int | None,
    typer.Option(
        "--slots-per-device",
        min=1,
        show_default=False,
        help="Runs that share one GPU, for small models; by default 1.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
LinesOfJson = Annotated[
    bool, typer.Option("--json", help="Print what happens as JSON, an object a line; the last one is the comparison.")
]
DEFAULT_STORE = DEFAULT
NewVersion = Annotated[
    bool,
    typer.Option(
        "--new-version",
        help="Keep results of other settings under the study's name as NAME@1, and begin anew.",
    ),
]


def open_store(root: Path) -> Store:
    """The store of a command. Raises InputError where it is no directory, or has another version's schema."""
    store = Store(root)
    store.check()
    return store


def supervision(retries: int | None, stall_after: float | None, grace: float | None) -> Supervision:
    """Limits for runs that die or stall, with defaults for None."""
    from lit_llm.studies.supervise import Supervision

    default = Supervision()
    return Supervision(
        default.retries if retries is None else retries,
        default.stall_seconds if stall_after is None else stall_after,
        default.grace_seconds if grace is None else grace,
    )


def timings(planned: Plan, max_parallel: int, store: Store, measuring: bool) -> dict[str, StepTiming]:
    """{key: timing} of the plan's steps, so far as known; with `measuring` timed now."""
    from lit_llm.runs.step_timing import measure
    from lit_llm.studies.duration import steps_of, timings_of

    if not measuring:
        return timings_of(planned, max_parallel, store)
    steps = list(steps_of(planned, max_parallel).values())
    beside = f", {steps[0].setting.at_once} runs at once" if steps[0].setting.at_once > 1 else ""
    print(f"timing {len(steps)} kinds of steps{beside} ...", file=sys.stderr, flush=True)

    def progress(done: int, total: int) -> None:
        print(f"  {done} of {total} timed", file=sys.stderr, flush=True)

    return {timed.key: timing for timed, timing in measure(steps, progress)}


@dataclass(frozen=True)
class LaunchWish:
    """Options of a command on where runs are computed; None: as the settings have it."""

    jobs: int | None
    launcher: Launcher | None
    places: int | None
    slots_per_device: int | None


def places_and_jobs(ablation: Ablation, store: Store, wish: LaunchWish) -> tuple[Places | None, int]:
    """(places of an engine or None for this machine, runs at once there), by the options and the settings.

    Raises InputError where the engine is absent.
    """
    from lit_llm.launch.engine import EngineError
    from lit_llm.launch.settings import engine_of, launch_settings
    from lit_llm.studies.launched import Places
    from lit_llm.studies.parallelism import devices_of, max_parallel

    settings = launch_settings(store.root)
    shared = wish.slots_per_device or settings.slots_per_device
    name = wish.launcher.value if wish.launcher else settings.launcher
    if name == "local":
        if wish.places is not None:
            raise InputError(
                Problem("this machine is one place; add `--launcher slurm` or `--launcher ray`", "--places")
            )
        return None, wish.jobs or max_parallel(ablation, shared)
    try:
        engine = engine_of(name, settings)
    except EngineError as error:
        raise InputError(Problem(str(error), f"--launcher {name}")) from None
    assert engine is not None
    executions = [arm.experiment.pretrain.training.execution for arm in ablation.arms]
    jobs = wish.jobs or settings.jobs(shared, devices_of(ablation))
    threads = max(execution.threads * execution.devices for execution in executions)
    needs = settings.needs(jobs, threads, max(execution.nodes for execution in executions))
    return Places(name, engine, settings, needs, wish.places or settings.places), jobs


@contextmanager
def unwritable(out: Path | None, screen: Console) -> Iterator[list[Path]]:
    """Context of a report that prints how to write elsewhere when the store is read-only. Yields the written files.

    Raises InputError where `out` itself cannot be written.
    """
    written: list[Path] = []
    try:
        yield written
    except OSError as error:
        message = f"{error.filename or out} cannot be written to: {error.strerror}"
        if out is not None:
            raise InputError(Problem(message, "--out")) from None
        screen.print(f"{message}; `--out DIR` writes the report elsewhere.", style="yellow", highlight=False)


def relative_path(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, stderr=stderr)  # a level's label may have brackets


def same_command(
    command: str,
    file: str,
    override: list[str] | None,
    store: Path,
    tracking: str | None = None,
    storage: str | None = None,
) -> str:
    """The shell command to repeat or continue this one, without passwords."""
    from lit_llm.tracking.address import without_secrets

    addresses = {"--tracking": tracking, "--storage": storage}
    where = [word for name, place in addresses.items() if place for word in (name, without_secrets(place))]
    options = [word for each in override or () for word in ("-o", each)]
    return shlex.join(["lit-llm", command, file, *Store(store).option(), *where, *options])


def charts(store: Path, tracking: str | None, mirrored: bool) -> str:
    """Command or address of MLflow's UI, for a message."""
    from lit_llm.tracking.address import without_secrets

    served = shlex.join(["lit-llm", "ui", *Store(store).option()]) if tracking is None else without_secrets(tracking)
    return served + ("" if mirrored else " (behind)")
