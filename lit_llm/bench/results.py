"""Results of a benchmark, as tables, figures and JSON take them. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_llm.bench.settings import BenchSettings, What


@dataclass(frozen=True)
class Machine:
    """Machine and versions of libraries that a measurement was made with."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None
    load: float
    """Load average of the last minute per core, before the measurement."""
    measured: str
    """Date and time, UTC."""
    versions: Mapping[str, str]
    """{package: version} of those that are installed, and of Python."""


@dataclass(frozen=True)
class Ceilings:
    """The best that the machine reached, with the threads of the measurement."""

    product_flops: float
    """FLOP/s of a product of two large matrices, in the precision of the measurement."""
    copy_bytes: float
    """Bytes read and written per second by a copy of 256 MiB."""
    read_bytes: float
    """Bytes read per second by a sum over 256 MiB."""

    def or_better(self, other: Ceilings) -> Ceilings:
        """The better of two measurements of each."""
        return Ceilings(
            max(self.product_flops, other.product_flops),
            max(self.copy_bytes, other.copy_bytes),
            max(self.read_bytes, other.read_bytes),
        )


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over the turns."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One quantity of one contestant."""

    contestant: str
    quantity: str
    unit: str
    """s or bytes."""
    value: Quartiles
    ratio: Quartiles
    """This over the baseline's in the same turn, so that what slows a whole turn cancels."""
    of_machine: float | None = None
    """Least work of this quantity over the median, as a share of what the machine reached at its best: FLOPs of a step
    or a prefill, bytes read for a token. None where neither limits it."""


@dataclass(frozen=True)
class Comparison:
    """Contestants that were measured in the same turns."""

    what: What
    title: str
    """What they compute."""
    heap: str
    """kept: freed memory stays in the process, as in a run on a CPU; default: it goes back to the system."""
    measured: tuple[Measured, ...]
    parameters: Mapping[str, int]
    """{contestant: number of its parameters}"""
    same: tuple[str, ...]
    """Contestants that compute the same function, with their packages."""
    ceilings: Ceilings | None = None
    """None where nothing is compared with them."""
    notes: tuple[str, ...] = ()
    """Contestants that were left out, each with its reason."""


@dataclass(frozen=True)
class Bench:
    """A whole benchmark."""

    machine: Machine
    settings: BenchSettings
    comparisons: tuple[Comparison, ...]
    failed: tuple[str, ...] = ()
    """Measurements whose process ended without a result, each with its reason."""
