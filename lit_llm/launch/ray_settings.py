"""Settings of the Ray launcher."""

from __future__ import annotations

from pydantic import Field

from lit_llm.config.section import Section


class RaySettings(Section):
    """Which cluster of Ray is used."""

    address: str | None = None
    """`host:port` of the cluster's head, or `auto`: the cluster that this machine belongs to; null: a cluster of this
    machine alone is started, and ends with its last place."""
    health_check_seconds: float = Field(0.5, gt=0)
    """Seconds between two checks of a node. This and the next three keys hold for a cluster that is started here; other
    clusters take them from `ray start --head --system-config`."""
    health_check_timeout_seconds: float = Field(5, gt=0)
    """Seconds that one check waits for its answer."""
    health_check_failures: int = Field(3, ge=1)
    """Failed checks in a row after which a node is lost."""
    keepalive_seconds: float = Field(3, gt=0)
    """Seconds of silence after which a connection is tested, and as many until it counts as broken."""

    def system_config(self) -> dict[str, int]:
        """Ray's own names for the health checks and the keepalive, in milliseconds, and runs at the usual priority."""
        return {
            "worker_niceness": 0,  # Ray's 15 would let anything else on the machine come first
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": round(1000 * self.health_check_seconds),
            "health_check_timeout_ms": round(1000 * self.health_check_timeout_seconds),
            "health_check_failure_threshold": self.health_check_failures,
            "grpc_client_keepalive_time_ms": round(1000 * self.keepalive_seconds),
            "grpc_client_keepalive_timeout_ms": round(1000 * self.keepalive_seconds),
        }
