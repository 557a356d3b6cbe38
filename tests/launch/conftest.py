"""Fixtures of clusters."""

from tests.launch.slurm_cluster import running_cluster, slurm

__all__ = ["running_cluster", "slurm"]
