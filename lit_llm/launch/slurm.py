"""Supplies places as tasks of a SLURM job array.

```
lit-llm ── sbatch --array=0-3 ──▶ slurmctld ── starts, requeues ──▶ place.sh ── exec ──▶ the command
   ├────── squeue ──────────────▶    │
   └────── scancel ─────────────▶    └── USR1 before the limit; TERM, then KILL after KillWait ──▶
```
SLURM requeues a place that is preempted or whose node dies: the same command starts again and takes up what is left. A
node that is only thought dead may still run its place, so a stage can be computed twice; the store accepts one result.

Each request calls SLURM's own programs, which know the cluster's address, its release and the user.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lit_llm.launch.engine import EngineError, Needs, Place, PlaceState
from lit_llm.launch.slurm_nodes import missing, read_partitions
from lit_llm.launch.slurm_settings import SlurmSettings

ANSWER_SECONDS = 120.0
"""Time for an answer. SLURM's programs themselves repeat a request for about a minute."""
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")
ENDED = ("Invalid job id", "already completing or completed", "already finished", "not running")
"""SLURM's words on jobs that have ended or wait, where a request concerns the others."""
PING = "`scontrol ping` shows whether SLURM's controller is up"
FOREIGN = ("SLURM_", "SQUEUE_", "SINFO_", "SCANCEL_", "SBATCH_CLUSTERS", "SBATCH_WAIT")
"""Environment variables that change what SLURM's programs answer, or describe the job that we may be in."""


class SlurmEngine:
    """Supplies places on a cluster of SLURM."""

    name = "slurm"

    def __init__(self, settings: SlurmSettings | None = None) -> None:
        self.settings = settings or SlurmSettings()

    def obstacle(self, needs: Needs) -> str | None:
        """Needs that no partition has, else the words by which SLURM refuses such a job, or None."""
        if not float(needs.gpus).is_integer():
            return f"SLURM gives out whole GPUs, not {needs.gpus:g}; several runs share one by --slots-per-device"
        partitions = read_partitions(_call("sinfo", "--Node", "--noheader", "--format=%P|%c|%m|%G|%l|%N"))
        wanted = self.settings.partition or os.environ.get("SBATCH_PARTITION")
        chosen = [each for each in partitions if (each.name in wanted.split(",") if wanted else each.is_default)]
        if not chosen:
            names = ", ".join(sorted(each.name for each in partitions))
            lacking = f"no partition {wanted!r}" if wanted else "no default partition"
            return f"SLURM has {lacking}; `partition` under [launch.slurm] in settings.toml may be one of: {names}"
        if reason := missing(needs, chosen, self.settings.gpu_type):
            return reason
        try:
            _call("sbatch", "--test-only", *self.options(needs), "--wrap=true")
        except _Refused as refused:
            return f"{refused}; `sinfo` shows partitions and nodes, `sacctmgr show assoc user=$USER` the accounts"
        return None

    def start(self, command: Sequence[str], needs: Needs, count: int, folder: Path) -> list[str]:
        """Submit an array of `count` tasks. Their ids are `JOB_TASK`, such as `4711_0`."""
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "place.sh"
        script.write_text(f"#!/bin/sh\n# exec: SLURM's signals reach the command itself.\nexec {shlex.join(command)}\n")
        limit = f"%{self.settings.max_running}" if self.settings.max_running else ""
        output = str(folder / "place-").replace("%", "%%")
        array = (f"--array=0-{count - 1}{limit}", f"--output={output}%a.txt", "--open-mode=append")
        try:
            answer = _call("sbatch", "--parsable", *array, *self.options(needs), str(script))
        except _Refused as refused:
            raise EngineError(
                f"{refused}; `squeue --me` shows whether jobs were queued all the same, "
                "`scontrol show config` the limits of the cluster (MaxArraySize, MaxJobCount)"
            ) from None
        job = answer.strip().partition(";")[0]
        return [f"{job}_{number}" for number in range(count)]

    def places(self, ids: Sequence[str]) -> list[Place]:
        """The state of places, by squeue. SLURM forgets a job some minutes after its end (MinJobAge)."""
        if not ids:
            return []
        jobs = ",".join(dict.fromkeys(id.partition("_")[0] for id in ids))
        try:
            text = _call("squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", "--format=%i|%T|%r|%N")
        except _Refused as refused:
            if ENDED[0] not in str(refused):
                raise
            text = ""
        known = {place.id: place for place in read_places(text)}
        return [known.get(id, Place(id, "ended")) for id in ids]

    def stop(self, ids: Sequence[str], grace_seconds: float) -> None:
        """Cancel places. Where SLURM kills sooner than the grace asks for, running ones get a new end instead.

        Such an end is observed within about a minute.
        """
        if not ids:
            return
        if grace_seconds > _kill_wait():
            jobs = f"JobId={','.join(ids)}"
            _call("scontrol", "update", jobs, f"EndTime=now+{math.ceil(grace_seconds)}", "Requeue=0", ignore=ENDED)
            _call("scancel", "--signal=TERM", "--batch", "--state=RUNNING", *ids, ignore=ENDED)
            _call("scancel", "--state=PENDING", *ids, ignore=ENDED)
        else:
            _call("scancel", *ids, ignore=ENDED)

    def log(self, id: str, folder: Path) -> Path:
        """File with the output of a place, of all its starts."""
        return folder / f"place-{id.rpartition('_')[2]}.txt"

    def options(self, needs: Needs) -> list[str]:
        """Options of sbatch for one place.

        They stand in the command line, as variables such as SBATCH_PARTITION go before what a script says. The
        environment is passed on: the command needs the PATH, the credentials and the caches of the one that submits it.
        `--export=NONE` would start a login shell instead, which has none of them.
        """
        settings = self.settings
        gpu = f"gpu:{settings.gpu_type}" if settings.gpu_type else "gpu"
        values = {
            "job-name": "lit-llm",
            "nodes": needs.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": needs.cpus,
            "gres": f"{gpu}:{needs.gpus:g}" if needs.gpus else None,
            "mem": f"{math.ceil(needs.memory_gb * 1e9 / 2**20)}M" if needs.memory_gb else None,
            "time": math.ceil(needs.hours * 60) if needs.hours else None,
            "partition": settings.partition,
            "account": settings.account,
            "qos": settings.qos,
            "signal": f"B:USR1@{settings.signal_seconds}",
            "export": "ALL",
        }
        own = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return [*own, "--requeue", *settings.options]


def read_places(text: str) -> list[Place]:
    """The places that squeue lists, one a line: `4711_0|PENDING|Resources|`."""
    places = []
    for line in text.splitlines():
        id, word, reason, nodes = line.split("|")
        state: PlaceState = "queued" if word in QUEUED else "running" if word in RUNNING else "ended"
        waits_for = f" ({reason})" if reason != "None" else ""
        more = {"queued": waits_for, "running": f" on {nodes}", "ended": ""}[state]
        places.append(Place(id, state, word + more))
    return places


class _Refused(EngineError):
    """One of SLURM's programs answers by an error."""


def _kill_wait() -> float:
    """Seconds from SLURM's SIGTERM to its SIGKILL."""
    lines = _call("scontrol", "show", "config").splitlines()
    words = next((line.split("=")[1].split() for line in lines if line.startswith("KillWait ")), ["30"])
    return float(words[0])


def _call(program: str, *arguments: str, ignore: Sequence[str] = ()) -> str:
    """Output of one of SLURM's programs. Raises EngineError, but not for complaints that contain words of `ignore`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, env=environment, timeout=ANSWER_SECONDS
        )
    except FileNotFoundError:
        raise EngineError(
            f"there is no program `{program}` here; log in to a machine that submits jobs to SLURM, or load its module"
        ) from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"{program} gave no answer within {ANSWER_SECONDS:g} s; {PING}") from None
    complaints = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode and not (complaints and all(any(words in line for words in ignore) for line in complaints)):
        words = "; ".join(complaints) or f"exit code {done.returncode}"
        if any(text in words for text in ("Unable to contact", "configuration source", "configuration file")):
            raise EngineError(f"{program}: {words}; {PING}")
        raise _Refused(f"{program}: {words}")
    return done.stdout
