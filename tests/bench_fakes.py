"""Stand-ins for the device side of the bench: a lane whose clock counts calls, a workload of fixed times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from kernels_numba.bench.contest import BASELINE, Outcome
from kernels_numba.bench.timing import Measurement
from kernels_numba.cost import Cost


class Lane:
    """Runs work at once. A call costs `call_us`, eager or replayed; `turns` logs who was timed."""

    stream, cold_bytes = None, 120 << 20

    def __init__(self, name="", call_us=10.0, turns=None):
        self.name, self.call_us, self.turns = name, call_us, [] if turns is None else turns
        self.queued = self.capturing = self.graphs = 0
        self.warm = set()

    def call(self, i):
        """One call on set i. Setting up for a new set is not allowed while capturing, as on a device."""
        assert i in self.warm or not self.capturing, f"set {i} is met for the first time in a capture"
        self.warm.add(i)
        self.queued += 1

    def capture(self, work):
        self.capturing, before = 1, self.queued
        work()
        self.capturing, held, self.queued = 0, self.queued - before, before
        self.graphs += 1

        def replay():
            self.queued += held

        return replay

    def elapsed_us(self, work):
        before = self.queued
        work()
        self.turns.append(self.name)
        return (self.queued - before) * self.call_us


class Simulated(Lane):
    """A lane for contenders that run in numba's simulator: every elapsed time is the same."""

    def elapsed_us(self, work):
        work()
        return 1e6

    def capture(self, work):
        return lambda: None


class FakeWorkload:
    """What contest.Workload is to bench_ops.run; `wrong` rungs are refused, `broken` cases cannot be made."""

    opened: ClassVar[list] = []
    wrong: ClassVar[set] = set()
    broken: ClassVar[set] = set()
    interrupt_at = None

    def __init__(self, op, params, *, cold, torch):
        type(self).opened.append(op)
        if op in self.broken:
            raise MemoryError("no room for it")
        self.cost, self.cold, self.torch = Cost(bytes=10**6, flops=10**9), cold, torch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compare(self, contenders, rounds, *, sustained):
        if len(type(self).opened) == self.interrupt_at:
            raise KeyboardInterrupt
        [rung] = contenders
        if rung in self.wrong:
            return Outcome(None, "cold L2", refused={rung: "ArithmeticError: 7.00 times the tolerance"})
        mine, theirs = Measurement(20.0, 19.0, 25.0, 0.5, 100, 3), Measurement(30.0, 29.0, 31.0, 0, 100, 3)
        measured = {BASELINE: theirs, rung: mine} if self.torch else {rung: mine}
        slower = {name: SimpleNamespace(**{**vars(one), "us": one.us * 2}) for name, one in measured.items()}
        return Outcome(
            "torch.matmul" if self.torch else None, "cold L2", measured, slower if sustained else {}
        )
