"""Settings of the Ray launcher."""

from __future__ import annotations

from pydantic import Field, field_validator

from lit_llm.config.section import Section, config_error


class RaySettings(Section):
    """Which cluster of Ray is used, and what one place takes of it."""

    address: str | None = None
    """`host:port` of the cluster's head, or `auto`: the cluster of this machine. Without one, a cluster of this machine
    alone is started, which ends with the command."""
    cpus: int = Field(1, ge=1)
    """CPUs of one place."""
    gpus: float = Field(0, ge=0)
    """GPUs of one place: a whole number, or a fraction such as 0.25 where four places share one."""
    memory_gb: float | None = Field(None, gt=0)
    """Gigabytes that Ray reserves for one place. Ray does not enforce them. Without it, nothing is reserved."""
    health_check_seconds: float = Field(0.5, gt=0)
    """Seconds between two checks of a node. This and the next three keys hold for a cluster that is started here; other
    clusters take them from `ray start --head --system-config`."""
    health_check_timeout_seconds: float = Field(5, gt=0)
    """Seconds that one check waits for its answer."""
    health_check_failures: int = Field(3, ge=1)
    """Failed checks in a row after which a node is lost."""
    keepalive_seconds: float = Field(3, gt=0)
    """Seconds of silence after which a connection is tested, and as many until it counts as broken."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise config_error(("", f"Ray gives out whole GPUs above 1, not {gpus:g}: write {int(gpus) + 1}"))
        return gpus

    def system_config(self) -> dict[str, int]:
        """Ray's own names for the health checks and the keepalive, in milliseconds."""
        return {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": round(1000 * self.health_check_seconds),
            "health_check_timeout_ms": round(1000 * self.health_check_timeout_seconds),
            "health_check_failure_threshold": self.health_check_failures,
            "grpc_client_keepalive_time_ms": round(1000 * self.keepalive_seconds),
            "grpc_client_keepalive_timeout_ms": round(1000 * self.keepalive_seconds),
        }
