"""Settings of launching: which engine supplies places, how many, and what each gets."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from lit_llm.config.section import Section, validate
from lit_llm.config.trainer_settings import TrainerSettings
from lit_llm.config.user_settings import read_settings
from lit_llm.launch.engine import Engine, Needs
from lit_llm.launch.ray_settings import RaySettings
from lit_llm.launch.slurm_settings import SlurmSettings

Launcher = Literal["local", "slurm", "ray"]


class LaunchSettings(Section):
    """Where runs are computed. Nothing here is part of a study."""

    launcher: Launcher = "local"
    """local: this machine. slurm, ray: places of that engine."""
    places: int = Field(1, gt=0)
    """Places that an engine is asked for, each for several runs one after another."""
    slots_per_device: int = Field(1, gt=0)
    """Runs that share one GPU."""
    cpus: int | None = Field(None, gt=0)
    """CPUs of one place; null: those of its threads."""
    gpus: float = Field(0, ge=0)
    """GPUs of one place; a fraction where an engine shares them (Ray)."""
    memory_gb: float | None = Field(None, gt=0)
    """Gigabytes of memory of one place; null: what the engine gives."""
    hours: float | None = Field(None, gt=0)
    """Hours after which SLURM ends a place and its runs are continued by another; null: the partition's. Ray ends
    none."""
    slurm: SlurmSettings = SlurmSettings()
    """Jobs of SLURM."""
    ray: RaySettings = RaySettings()
    """Actors of Ray."""

    def needs(self, jobs: int, threads: int, nodes: int = 1) -> Needs:
        """Resources of one place for `jobs` runs at once, each with its threads on each of its nodes."""
        return Needs(self.cpus or jobs * threads, self.gpus, nodes, self.memory_gb, self.hours)

    def jobs(self, slots_per_device: int, devices: int) -> int:
        """Runs at once in a place, where none is asked for: as many as its GPUs have slots for, else one.

        devices: devices of one run.
        """
        return max(1, int(self.gpus * slots_per_device) // devices)


class Settings(Section):
    """The files `~/.config/lit-llm/settings.toml` and `settings.toml` of a store."""

    launch: LaunchSettings = LaunchSettings()
    """Where runs are computed."""
    trainer: TrainerSettings = TrainerSettings()
    """Additions to Lightning's Trainer; in the user's file alone."""


def launch_settings(store: Path) -> LaunchSettings:
    """The settings of the user and of a store. Raises InputError for wrong ones."""
    return validate(Settings, read_settings(store)).launch


def trainer_settings() -> TrainerSettings:
    """The user's additions to Lightning's Trainer. Raises InputError for wrong ones."""
    return validate(Settings, read_settings(None)).trainer


@cache
def engine_of(launcher: Launcher, settings: LaunchSettings) -> Engine | None:
    """The engine of a launcher, one for this process as it may hold a connection; None for this machine."""
    if launcher == "slurm":
        from lit_llm.launch.slurm import SlurmEngine

        return SlurmEngine(settings.slurm)
    if launcher == "ray":
        from lit_llm.launch.ray import RayEngine

        return RayEngine(settings.ray)
    return None
