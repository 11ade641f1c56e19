"""What the bench knows of an op, and how a result is checked before it is timed.

A result is checked on windows of rows (the first, some in the middle, the last) against the op's `*_spec`:
the whole of a large one would take numpy minutes. Beyond the windows it is scanned for what was never
written, and compared with the baseline's (contest.py). Knows: entries. Refuses to know: which ops there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_numba.bench.cases import Params
from kernels_numba.bench.data import Maker, holes, poison, read
from kernels_numba.bench.errors import BF16_ROUNDING, error_in_tolerances
from kernels_numba.cost import Cost
from kernels_numba.inputs import Call

WINDOW_ROWS = 8


def windows(length: int, width: int) -> list[slice]:
    """The first, middle and last `width` of `length`, without overlap; all of it if they would meet."""
    if length <= 3 * width:
        return [slice(0, length)]
    middle = length // 2 - width // 2
    return [slice(0, width), slice(middle, middle + width), slice(length - width, length)]


@dataclass(frozen=True)
class BenchOp:
    """make(maker, params): a call on the device; cost(params): what it must move and compute.

    excerpt(call, params, rows): those rows of the problem as a small call on the host, read before the
    launch; result(call, params, rows): the same part of the outputs, read after it. blank: outputs that are
    wholly written. unit, dtype: of its rows. rounding: allowed beside twice the plain error.
    """

    make: Callable[[Maker, Params], Call]
    cost: Callable[[Params], Cost]
    num_rows: Callable[[Params], int]
    excerpt: Callable[[Call, Params, slice], Call]
    result: Callable[[Call, Params, slice], list[Any]] = lambda call, params, rows: [
        read(call, name, rows) for name in call.outputs
    ]
    blank: tuple[str, ...] = ("out",)
    unit: str = "GB/s"
    dtype: str = "bfloat16"
    rounding: float = BF16_ROUNDING
    judge: Callable[[Call, list[Any], float], float] | None = None


def _error(call: Call, results: list[Any], rounding: float) -> float:
    """The worst error of the outputs of a host call, in tolerances."""
    worst = 0.0
    for exact, got in zip(call.spec().values(), results, strict=True):
        truth = np.asarray(exact, np.float32)
        plain = truth.astype(got.dtype).astype(np.float32)
        error = error_in_tolerances(got.astype(np.float32), plain, truth, rounding)
        worst = max(worst, error)
    return worst


def excerpts_of(entry: BenchOp, params: Params, call: Call) -> list[Call]:
    """The windows of a call that its results are held against; they stay true while nobody writes inputs."""
    return [entry.excerpt(call, params, rows) for rows in windows(entry.num_rows(params), WINDOW_ROWS)]


def check_call(
    entry: BenchOp, params: Params, call: Call, launch: Callable[[], None], scan: bool = True,
    excerpts: list[Call] | None = None,
) -> float:  # fmt: skip
    """Run `launch`, which queues the call and waits, on poisoned outputs -> its error in tolerances.

    excerpts: excerpts_of, read before if not given. scan: look for what was not written in the whole of each
    output (all of it comes to the host), and give inf where there is any. Only at most 1 is right."""
    parts = windows(entry.num_rows(params), WINDOW_ROWS)
    excerpts = excerpts_of(entry, params, call) if excerpts is None else excerpts
    for name in entry.blank:
        poison(call.args[name])
    launch()
    if scan and any(holes(call.args[name]) for name in entry.blank):
        return float("inf")
    judge = entry.judge or _error
    return max(
        judge(excerpt, entry.result(call, params, rows), entry.rounding)
        for excerpt, rows in zip(excerpts, parts, strict=True)
    )
