"""Settings of the SLURM launcher."""

from __future__ import annotations

from pydantic import Field, field_validator

from lit_llm.config.section import Items, Section, config_error

OWN_OPTIONS = (
    *("array", "cpus-per-task", "error", "export", "input", "nodes", "ntasks-per-node", "open-mode"),
    *("output", "parsable", "quiet", "requeue", "signal", "test-only", "wait", "wrap"),
)
"""Options of sbatch that the engine gives itself, or that would hide jobs from it."""
SETTINGS = {
    "account": "launch.slurm.account",
    "gpus": "launch.gpus",
    "gres": "launch.gpus",
    "mem": "launch.memory_gb",
    "partition": "launch.slurm.partition",
    "qos": "launch.slurm.qos",
    "time": "launch.hours",
}
"""{option of sbatch: the key of settings.toml that sets it}."""


class SlurmSettings(Section):
    """How jobs are submitted to SLURM. Each place is one task of a job array."""

    partition: str | None = Field(None, min_length=1)
    """Partition, or several with commas between them; null: the cluster's default."""
    account: str | None = Field(None, min_length=1)
    """Account that is charged; null: the user's default."""
    qos: str | None = Field(None, min_length=1)
    """Quality of service; null: the user's default."""
    gpu_type: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Type of the GPUs, as `sinfo -o %G` shows it: `a100` of `gpu:a100:4`; null: any."""
    max_running: int | None = Field(None, gt=0)
    """Places of one request that run at the same time, the others wait; null: as many as the cluster starts."""
    signal_seconds: int = Field(120, gt=0, le=65535)
    """Seconds before the time limit at which a place is asked to save and end. SLURM may be a minute early."""
    options: Items[str] = ()
    """More options of sbatch, one word each: `["--constraint=ib", "--exclude=n7"]`."""

    @field_validator("options")
    @classmethod
    def _checked(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        findings = [(str(place), message) for place, option in enumerate(options) if (message := _problem(option))]
        if findings:
            raise config_error(*findings)
        return options


def _problem(option: str) -> str:
    name = option.removeprefix("--").partition("=")[0]
    if not option.startswith("--") or not name:
        return f"{option!r}: write an option of sbatch in one word: --name or --name=value"
    if any(character in option for character in "\n\r\0"):
        return f"{option!r} contains a line break"
    # sbatch takes the beginning of a name for the name.
    if key := next((key for known, key in SETTINGS.items() if known.startswith(name)), None):
        return f"{option!r}: set `{key}` instead"
    if any(own.startswith(name) for own in OWN_OPTIONS):
        return f"{option!r} is set by lit-llm itself"
    if "clusters".startswith(name):
        return f"{option!r}: run lit-llm on a machine that belongs to the other cluster"
    return ""
