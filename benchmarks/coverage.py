"""Every simulation of the statistics, by one command: coverage, family-wise error and power of every procedure.

    python benchmarks/coverage.py [--replicates 2000] [--seed 0]

Prints the tables of docs/statistics.md. Takes some minutes; `--replicates 200` takes a tenth of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import coverage_designs
import coverage_noise
import coverage_paired
import coverage_scaling
import coverage_sequential

Rows = list[dict[str, Any]]
TABLES: dict[str, Callable[[int, int], Rows]] = {
    "Differences from a baseline: the worst scenario of each procedure": lambda replicates, seed: (
        coverage_paired.worst_of(coverage_paired.coverage_table(replicates, seed), replicates, seed)
    ),
    "Effects, factors, documents, divergence: the worst scenario of each procedure": lambda replicates, seed: (
        coverage_designs.worst_of(coverage_designs.coverage_table(replicates, seed))
    ),
    "Seeds in rounds": lambda replicates, seed: coverage_sequential.coverage_table(replicates, seed),
    "Signal and noise": lambda replicates, seed: coverage_noise.coverage_table("Signal and noise", replicates, seed),
    "Decision accuracy": lambda replicates, seed: coverage_noise.coverage_table("Decision accuracy", replicates, seed),
    "Scaling laws": lambda replicates, seed: coverage_scaling.coverage_table(max(20, replicates // 5), seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for title, table in TABLES.items():
        began = time.perf_counter()
        rows = table(options.replicates, options.seed)
        print(f"## {title} ({time.perf_counter() - began:.0f} s)\n\n{coverage_paired.aligned(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
