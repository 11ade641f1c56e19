"""What an op must move and compute at the least, and how long a machine needs for that.

Knows: bytes, floating-point operations, a machine's peaks. Refuses to know: kernels, arrays, how anything is
timed.
"""

from __future__ import annotations

from dataclasses import dataclass

ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """Minimal traffic and work of one call: each input byte read once, each output byte written once.

    bytes: to and from device memory; flops: a multiply-add counts 2, any other float32 operation (exp
    included) 1.
    """

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    @property
    def intensity(self) -> float:
        """flops per byte; 0.0 for an empty call."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Peaks:
    """What a machine can do: bytes_per_s from memory, flops_per_s at the dtype in question."""

    bytes_per_s: float
    flops_per_s: float

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "flops_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Peaks.{name} is {getattr(self, name)!r}; it must be positive")


def roofline_seconds(cost: Cost, peaks: Peaks) -> float:
    """The shortest time in which the machine can do the work: the longer of its memory and its arithmetic
    time."""
    return max(cost.bytes / peaks.bytes_per_s, cost.flops / peaks.flops_per_s)


def roofline_fraction(cost: Cost, peaks: Peaks, seconds: float) -> float:
    """Roofline time over measured time: 1.0 is as fast as the machine allows. seconds must be positive."""
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds!r}; it must be positive")
    return roofline_seconds(cost, peaks) / seconds
