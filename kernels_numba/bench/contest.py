"""Contenders beside one another and a baseline, on one case of one op: checked first, then timed in turns.

    outcome = measure("gemm", {"m": 512, "n": 4096, "k": 4096, "bias": False},
                      {f"{n} wide": partial(gemm_hopper, config=CONFIGS[n]) for n in (128, 256)})
    outcome.measured["128 wide"].us, outcome.measured[BASELINE].us, outcome.refused

A contender is called as an op's launcher is: fn(**arguments, stream=stream) queues one call. Knows: how data,
checks and turns hang together. Refuses to know: what is measured, and how it is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kernels_numba.bench.cases import Params
from kernels_numba.bench.data import Maker
from kernels_numba.bench.entry import check_call, excerpts_of
from kernels_numba.bench.errors import disagreement
from kernels_numba.bench.ops import BENCH_OPS
from kernels_numba.bench.timing import (
    STEADY_US,
    SUSTAINED_CALLS,
    Lane,
    Measurement,
    Timed,
    buffer_sets,
    l2_state,
    race,
)
from kernels_numba.compiler import cuda

BASELINE = "baseline"
NO_TWIN = "none: torch has no counterpart"
CHUNK_ROWS = 2048  # compared at a time, for the memory's sake
Contender = Callable[..., Any]


@dataclass
class Outcome:
    """measured, sustained: by contender, and BASELINE where there is one; refused: why a contender was not
    timed; baseline: its name, NO_TWIN, or None if none was asked for; l2: what the cache may have held;
    seconds: that the workload took so far, by what it did (checked: with the baseline bound for it)."""

    baseline: str | None
    l2: str
    measured: dict[str, Measurement] = field(default_factory=dict)
    sustained: dict[str, Measurement] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Workload:
    """The buffer sets of one case on the device, and its baseline. Close it before the next one.

    torch: a torch_side.TorchSide, or None for no baseline; lane: where contenders run (default: the device).
    ValueError for an op that has no entry.
    """

    def __init__(
        self, op: str, params: Params, *, cold: bool = True, torch: Any = None, lane: Any = None
    ) -> None:
        if op not in BENCH_OPS:
            raise ValueError(f"no op {op!r} to measure; there are {', '.join(BENCH_OPS)}")
        lane = lane or device_lane()
        self.entry, self.params, self.torch = BENCH_OPS[op], params, torch
        self.seconds: dict[str, float] = {}
        self.lane: Lane = lane
        self.cost = self.entry.cost(params)
        count = buffer_sets(self.cost.bytes, cold, lane.cold_bytes)
        self.l2 = l2_state(self.cost.bytes, count, lane.cold_bytes)
        shared: dict[str, Any] = {}
        with self._taking("made"):
            self.sets = [self.entry.make(Maker(i, shared), params) for i in range(count)]
            cuda.synchronize()  # the data came on another stream than the one that is timed
        self._arguments = [{**call.resolved(), **call.kwargs} for call in self.sets]
        self._baseline: tuple[str | None, Timed | None] | None = None
        self._excerpts: list[Any] | None = None

    @contextmanager
    def _taking(self, what: str) -> Iterator[None]:
        """Count the seconds inside as `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back."""
        self.sets, self._arguments, self._baseline, self._excerpts = [], [], None, None
        for side in (self.lane, self.torch):
            getattr(side, "release", lambda: None)()

    def check(self, name: str, contender: Contender) -> float:
        """The error of one call on poisoned outputs, in tolerances. ArithmeticError over 1."""
        call, arguments = self.sets[-1], self._arguments[-1]
        with self._taking("baseline bound"):
            bound = self.torch.bind(call, self.params, copies=True) if self.torch else None

        def launch() -> None:
            cuda.synchronize()
            contender(**arguments, stream=self.lane.stream)
            cuda.synchronize()

        if set(call.outputs) <= set(self.entry.blank) and self._excerpts is None:  # else inputs are written
            self._excerpts = excerpts_of(self.entry, self.params, call)
        error = check_call(self.entry, self.params, call, launch, bound is None, self._excerpts)
        if not error <= 1:
            raise ArithmeticError(
                f"{name}: {error:.2f} times the tolerance from its definition; a wrong result is not timed"
            )
        if bound is not None:
            apart = self._apart(call, bound)
            if not apart <= 1:
                raise ArithmeticError(
                    f"{name}: {apart:.2f} times the tolerance from {bound.name}, outside the windows held "
                    "against the definition; a wrong result is not timed"
                )
        return error

    def _apart(self, call: Any, bound: Any) -> float:
        theirs = bound.outputs(self.torch.eager(bound.run))
        mine = self.torch.tensors(call)
        worst = 0.0
        for name, other in zip(call.outputs, theirs, strict=True):
            own = mine[name]
            if own.dtype == self.torch.torch.int32:  # ids
                worst = max(worst, 0.0 if bool((own == other).all()) else float("inf"))
                continue
            for at in range(0, own.shape[0], CHUNK_ROWS):
                rows = slice(at, at + CHUNK_ROWS)
                worst = max(worst, disagreement(own[rows].float(), other[rows].float()))
        return worst

    def _baseline_timed(self) -> tuple[str | None, Timed | None]:
        """Its name and itself, made when first needed: it copies what it cannot read from pages."""
        if self.torch is None:
            return None, None
        if self._baseline is None:
            bounds = [self.torch.bind(call, self.params) for call in self.sets]
            if bounds[0] is None:
                self._baseline = NO_TWIN, None
            else:
                timed = Timed(self.torch, lambda i: self.torch.queue(bounds[i].run), len(bounds))
                self._baseline = bounds[0].name, timed
        return self._baseline

    def compare(
        self, contenders: Mapping[str, Contender], rounds: int, *, sustained: bool = False
    ) -> Outcome:
        """Check each, then time those that are right in turns with the baseline.

        A contender that is wrong, or that raises, is in `refused` with the reason, and was not timed.
        sustained: time SUSTAINED_CALLS in a row as well, of those whose one call is short of STEADY_US.
        """
        if BASELINE in contenders:
            raise ValueError(f"a contender is called {BASELINE!r}; that name is the baseline's")
        refused: dict[str, str] = {}
        errors: dict[str, float] = {BASELINE: 0.0}
        timed: dict[str, Timed] = {}
        for name, contender in contenders.items():
            try:
                with self._taking("checked"):
                    errors[name] = self.check(name, contender)
                with self._taking("captured"):
                    timed[name] = self._timed(contender)
            except Exception as error:  # compilers, drivers and launchers have errors of their own
                refused[name] = f"{type(error).__name__}: {error}"
        outcome = Outcome(None, self.l2, refused=refused, seconds=self.seconds)
        if timed:
            with self._taking("baseline captured"):
                outcome.baseline, baseline = self._baseline_timed()
            if baseline is not None:
                timed = {BASELINE: baseline, **timed}
            with self._taking("timed"):
                outcome.measured = race(timed, errors, rounds)
            short = {
                name: one
                for name, one in timed.items()
                if name == BASELINE or outcome.measured[name].us < STEADY_US
            }
            if sustained and short.keys() - {BASELINE}:
                outcome.sustained = race(short, errors, rounds, SUSTAINED_CALLS)
        return outcome

    def _timed(self, contender: Contender) -> Timed:
        arguments, stream = self._arguments, self.lane.stream
        return Timed(self.lane, lambda i: contender(**arguments[i], stream=stream), len(arguments))


def measure(
    op: str, params: Params, contenders: Mapping[str, Contender], *, against: str = "torch", rounds: int = 7,
    cold: bool = True, sustained: bool = False,
) -> Outcome:  # fmt: skip
    """Workload(op, params).compare(contenders, rounds) on the current device; against: "torch" or "none"."""
    with Workload(op, params, cold=cold, torch=torch_side(against)) as workload:
        return workload.compare(contenders, rounds, sustained=sustained)


_sides: dict[str, Any] = {}


def device_lane() -> Any:
    """The stream on which contenders run, made once."""
    if "device" not in _sides:
        from kernels_numba.bench.gpu import DriverLane

        _sides["device"] = DriverLane()
    return _sides["device"]


def torch_side(against: str) -> Any:
    """The baseline's side for "torch", made once; None for "none". ValueError for another word, or without
    torch."""
    if against not in ("torch", "none"):
        raise ValueError(f"against is {against!r}; torch or none is required")
    if against == "none":
        return None
    if "torch" not in _sides:
        from kernels_numba.bench.torch_side import TorchSide

        try:
            _sides["torch"] = TorchSide()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"torch cannot be the baseline here: {error}") from None
    return _sides["torch"]
