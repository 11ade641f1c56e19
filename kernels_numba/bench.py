"""Times kernels beside a baseline: in one process, interleaved, from captured graphs, and only if they are
right.

Knows: how to time launches, what the GEMM is measured on. Refuses to know: how a measurement is recorded
(sharp/bench.py does that). The baseline, torch, is imported when it is asked for.

A graph holds several launches over several sets of buffers, together over 100 MB or one set beyond twice the
L2: so operands come from device memory (cold L2). Times are medians of rounds, a replay of each contender a
round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_numba.cost import Peaks, roofline_fraction

COLD_BYTES = 120 << 20  # twice the L2 of an H100 or H200
LONG_ENOUGH_US = 1000.0  # of one replay, so that the gap before it does not count
GEMM_NK = (
    (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (4608, 3584), (3584, 3584), (37888, 3584),
    (3584, 18944), (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (960, 576), (576, 576),
    (3072, 576), (576, 1536),
)  # fmt: skip
GEMM_M = (512, 1000, 2048, 4096, 8192, 16384)
QUICK_M = (512, 2048, 8192)
# Dense bf16 and memory rates of the vendor's datasheets; the roofline fraction is against these.
DATASHEET = {"H100": Peaks(3.35e12, 989.4e12), "H200": Peaks(4.8e12, 989.4e12)}


@dataclass(frozen=True)
class GemmCase:
    """One shape: out[m, n] = x[m, k] @ weight[n, k]^T, bfloat16 in and out."""

    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"M={self.m} N={self.n} K={self.k}"


@dataclass(frozen=True)
class Measurement:
    """Microseconds of one call (median, least, most), the same of the baseline, and the error in
    tolerances."""

    us: float
    low: float
    high: float
    baseline_us: float
    err: float
    detail: str


def gemm_cases(quick: bool = False, text: str = "") -> list[GemmCase]:
    """The grid, or its part whose name contains `text`. ValueError if nothing does."""
    sizes = QUICK_M if quick else GEMM_M
    cases = [GemmCase(m, n, k) for n, k in GEMM_NK for m in sizes]
    chosen = [case for case in cases if text in case.name]
    if not chosen:
        raise ValueError(f"no case contains {text!r}; they are called like {cases[0].name!r}")
    return chosen


def buffer_sets(bytes_of_one: int, cold: bool = True) -> int:
    """How many sets of operands to rotate so that none is still in L2 when its turn comes again (at least
    2)."""
    return max(2, min(64, -(-COLD_BYTES // bytes_of_one) + 1)) if cold else 1


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each contender once a round, in turn, so that a throttling card slows all alike. ValueError under 1
    round."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is required")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(call())
    return times


def error_in_tolerances(got: Any, plain: Any, exact: Any) -> float:
    """Largest error over 2x the largest error of the same-dtype plain result, plus a bfloat16 rounding of it.

    Arrays or tensors of one shape in float32 or wider. inf where `got` holds a NaN.
    """
    worst, allowed = abs(got - exact).max(), 2 * abs(plain - exact).max() + 2.0**-9 * abs(exact).max()
    err = float(worst / allowed)
    return err if err == err else float("inf")


def datasheet(gpu: str) -> Peaks | None:
    """The peaks of a GPU by its name; None if it is not in the table."""
    return next((peaks for name, peaks in DATASHEET.items() if name in gpu.split()), None)


class _View:
    """A torch tensor of bfloat16 as the uint16 device array that the ops take."""

    def __init__(self, tensor: Any) -> None:
        self.shape, self.ndim, self.dtype = tuple(tensor.shape), tensor.ndim, np.dtype(np.uint16)
        self.strides = tuple(2 * stride for stride in tensor.stride())
        self.__cuda_array_interface__ = {"data": (tensor.data_ptr(), False)}


def _graph(torch: Any, work: Callable[[Any], None]) -> Any:
    torch.cuda.synchronize()  # what fills the buffers runs on another stream
    stream = torch.cuda.Stream()
    work(stream)  # outside the capture: compilation, module loads and handles belong to nobody's time
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work(stream)
    return graph


def measure_gemm(case: GemmCase, rung: Callable[..., None], rounds: int, cold: bool = True) -> Measurement:
    """Time a rung of gemm beside torch.matmul on random data. ArithmeticError if its result is wrong."""
    import torch

    from kernels_numba.compiler import cuda

    cuda.current_context()
    m, n, k = case.m, case.n, case.k
    count = buffer_sets(2 * (m * k + n * k + m * n), cold)
    sets = []
    for _ in range(count):
        x, weight = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda") / k**0.5
        sets.append((x.bfloat16(), weight.bfloat16(), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)))
    repeats = max(1, min(64, int(LONG_ENOUGH_US * 1e-6 * 600e12 / (2 * m * n * k * count))))
    views = [tuple(map(_View, group)) for group in sets]

    def baseline(stream: Any) -> None:
        with torch.cuda.stream(stream):
            for _ in range(repeats):
                for x, weight, out in sets:
                    torch.matmul(x, weight.t(), out=out)

    def ours(stream: Any) -> None:
        for _ in range(repeats):
            for x, weight, out in views:
                rung(out, x, weight, stream=stream.cuda_stream)

    graphs = {"baseline": _graph(torch, baseline)}
    x, weight, out = sets[-1]
    plain = out.float()
    out.fill_(float("nan"))
    graphs["ours"] = _graph(torch, ours)
    torch.cuda.synchronize()
    exact = x.float() @ weight.float().t()
    err = error_in_tolerances(out.float(), plain, exact)
    if not err <= 1:
        raise ArithmeticError(f"{case.name}: {err:.2f} times the tolerance; a wrong result is not timed")
    calls = repeats * count

    def timer(graph: Any) -> Callable[[], float]:
        def once() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / calls

        return once

    contenders = {name: timer(graph) for name, graph in graphs.items()}
    interleaved(contenders, 1)
    times = interleaved(contenders, rounds)
    mine = times["ours"]
    detail = f"{calls} calls a replay over {count} sets of operands, {'cold' if cold else 'warm'} L2"
    return Measurement(
        statistics.median(mine), min(mine), max(mine), statistics.median(times["baseline"]), err, detail
    )


def measure_all(cases: list[GemmCase], rung: Any, rounds: int) -> Iterator[tuple[GemmCase, Measurement]]:
    """Every case in turn; a wrong result raises before its time is taken."""
    for case in cases:
        yield case, measure_gemm(case, rung, rounds)


def gemm_figures(case: GemmCase, measured: Measurement, gpu: str) -> dict[str, float | None]:
    """us, tflops, gbs, roofline (None for an unknown GPU), baseline_us, ratio of one measurement."""
    from kernels_numba.ops.gemm import gemm_cost

    cost, seconds = gemm_cost(case.m, case.n, case.k), measured.us * 1e-6
    peaks = datasheet(gpu)
    return {
        "us": round(measured.us, 2),
        "tflops": round(cost.flops / seconds / 1e12, 1),
        "gbs": round(cost.bytes / seconds / 1e9, 1),
        "roofline": round(roofline_fraction(cost, peaks, seconds), 4) if peaks else None,
        "baseline_us": round(measured.baseline_us, 2),
        "ratio": round(measured.baseline_us / measured.us, 4),
    }
