"""A machine in a few numbers, and the time it needs for counted work: the model behind placements and `schatten plan`.

A time is a sum: every operation takes as long as its arithmetic or its memory traffic, whichever is longer, plus a launch;
every collective its latency plus the bytes that a rank sends over the bandwidth. Nothing is hidden behind anything else.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple


class Operation(NamedTuple):
    """One kernel on one matrix: floating point operations (2 for a multiply-add), and bytes it reads and writes.

    `factorisation` marks an SVD, QR or eigendecomposition, which no machine does at the rate of its products; `flops` is 0
    for work on entries, of which only the bytes count.
    """

    flops: float
    bytes: float
    factorisation: bool = False


@dataclass(frozen=True)
class Machine:
    """What one rank can do.

    Args:
        flops: FLOP/s in the products of a solver, in the precision it multiplies in.
        bandwidth: bytes/s a rank sends to ranks of other nodes while it receives as much.
        latency: seconds of a collective that carries nothing.
        memory_bandwidth: bytes/s of work on entries, reads and writes together.
        factorisation_flops: FLOP/s in QR, SVD and eigendecompositions.
        launch: seconds that an operation takes whatever its size.
        host: seconds of Python for each parameter, and for each piece of a matrix that is cut out or put in place.
        message: seconds that each further rank adds to a collective.
        node: how many ranks share a node; 1 if all bytes go the same way.
        node_bandwidth: bytes/s within a node.

    Raises ValueError for a rate that is not positive and a time that is negative.

    Example:
        >>> from schatten.placements.machine import Machine
        >>> slow = Machine(flops=1e9, bandwidth=1e8, latency=1e-3, memory_bandwidth=1e9, factorisation_flops=1e8)
        >>> slow.collective(1e8, ranks=2)
        1.001
    """

    flops: float
    bandwidth: float
    latency: float
    memory_bandwidth: float
    factorisation_flops: float
    launch: float = 0.0
    host: float = 0.0
    message: float = 0.0
    node: int = 1
    node_bandwidth: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be a finite number >= 0, got {value!r}.")
            if value == 0 and field.name not in ("latency", "launch", "host", "message"):
                raise ValueError(f"{field.name} must be positive, got {value!r}.")

    def seconds(self, operations: Iterable[Operation], matrices: float = 1) -> float:
        """Of these operations on a batch of equal matrices: launches are counted once."""
        total = 0.0
        for flops, size, factorisation in operations:
            rate = self.factorisation_flops if factorisation else self.flops
            total += self.launch + matrices * max(flops / rate, size / self.memory_bandwidth)
        return total

    def collective(self, sent: float, ranks: int = 2) -> float:
        """Of a collective in which each of `ranks`, next to each other on their nodes, sends `sent` bytes, alike to all."""
        if ranks == 1:
            return 0.0
        far = (ranks - min(self.node, ranks)) / (ranks - 1)
        return (
            self.latency
            + self.message * (ranks - 1)
            + max(far * sent / self.bandwidth, (1 - far) * sent / self.node_bandwidth if far < 1 else 0.0)
        )


# Data sheet of the H100 SXM: 989 TFLOP/s dense bf16, 3.35 TB/s of memory, 450 GB/s of NVLink each way among the 8 of a node;
# 50 GB/s (400 Gbit/s) of InfiniBand for each. Assumed to be reached: 60 % of the products' peak, 80 % of the memory's, 70 %
# of the networks'. Orders of magnitude, no data sheet's: fp32 QR and SVD at 2 TFLOP/s, 30 us for a collective and 1 us for
# each further rank, 5 us for a kernel, 25 us for a piece.
H100 = Machine(
    flops=0.6 * 989e12,
    bandwidth=0.7 * 50e9,
    latency=30e-6,
    memory_bandwidth=0.8 * 3.35e12,
    factorisation_flops=2e12,
    launch=5e-6,
    host=25e-6,
    message=1e-6,
    node=8,
    node_bandwidth=0.7 * 450e9,
)

# A core of a small server, ranks on one host over gloo: what `benchmarks/scaling.py` has measured, but for the products, which
# take from half of this rate (fp32) to five times it (bf16 where the hardware multiplies that).
CPU = Machine(
    flops=2e11,
    bandwidth=2e9,
    latency=1e-4,
    memory_bandwidth=1.2e10,
    factorisation_flops=1e10,
    launch=6e-6,
    host=5e-5,
    message=5e-5,
)

MACHINES = {"h100": H100, "h100-nvlink": replace(H100, bandwidth=H100.node_bandwidth), "cpu": CPU}
