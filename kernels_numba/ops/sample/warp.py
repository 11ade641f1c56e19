"""Rung "warp" of sample (sm_80 and newer): what it takes, its memory, and its four launches.

    survey   rows x chunks blocks   the best id of each row; rows without a cut are done
    weigh    up to 2 blocks an SM   of rows that are cut, a histogram of weights: which bins hold the borders
    gather   the same               the ids of those bins, sorted: the lowest rank that stays
    draw     the same               the best of logits / T + gumbel over what stays

A chunk is 8,192 ids, whatever the batch: a row of 151,936 has 19 blocks. Rows without a cut are read once;
the three other kernels read three numbers a row to see that there is nothing to do, and are over. Which rows
are real and which are cut is read on the device, so the four can be captured in a graph; out is theirs to
write, and all else that they write is in the workspace, which every launch leaves as it found it.

Knows: dtypes, shapes, addresses, grids. Refuses to know: what the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.sample.cut import (
    CAPACITY,
    GATHER_SIGNATURE,
    RECORD,
    WEIGH_SIGNATURE,
    make_gather_kernel,
    make_weigh_kernel,
)
from kernels_numba.ops.sample.nucleus import MAX_VOCAB, NUM_BINS
from kernels_numba.ops.sample.survey import (
    DRAW_SIGNATURE,
    SURVEY_SIGNATURE,
    make_draw_kernel,
    make_survey_kernel,
)
from kernels_numba.ops.sample.warp_tools import COUNTERS, MAX_ROWS, THREADS, chunk_of
from kernels_numba.ops.warp.door import (
    NEEDS,
    RUNG,
    Plan,
    View,
    count_address,
    ready,
    require_capability,
    view,
    view_count,
)

OP = "sample"
__all__ = ["OP", "RUNG", "Workspace", "kernels", "plan_sample", "refusal", "sample_warp"]
BLOCKS_PER_SM = 2
ALIGNMENT = 16
INT32, FLOAT32, UINT64 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint64)
ARCHS = tuple(f"sm_{n}" for n in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121))
FACTORIES: dict[str, tuple[Any, str]] = {
    "survey": (make_survey_kernel, SURVEY_SIGNATURE), "weigh": (make_weigh_kernel, WEIGH_SIGNATURE),
    "gather": (make_gather_kernel, GATHER_SIGNATURE), "draw": (make_draw_kernel, DRAW_SIGNATURE),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How a launch is cut: threads of a block, ids of a row's list."""

    threads: int = THREADS
    capacity: int = CAPACITY


PRODUCT = Shape()


@cache
def sample_kernel(step: str, vector: bool, shape: Shape = PRODUCT) -> Kernel:
    """The kernel of one step, compiled when first launched; vector: 16-byte loads."""
    make, signature = FACTORIES[step]
    key = (shape.threads, vector, *((shape.capacity,) if step == "gather" else ()))
    name = f"sample_{step}_{'v4' if vector else 'v1'}"
    name += "" if shape == PRODUCT else f"_{shape.threads}x{shape.capacity}"
    return Kernel(name, lambda: make(*key), key, signature, shape.threads, archs=ARCHS)


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine can pick, for building them ahead."""
    for step in FACTORIES:
        for vector in (True, False):
            yield sample_kernel(step, vector)


def _parts(num_rows: int, vocab_size: int, shape: Shape) -> dict[str, int]:
    """int32 words of each part of a workspace, in order, each a whole number of 16 bytes."""
    chunks = max(1, -(-vocab_size // chunk_of(shape.threads)))
    words = {
        "counters": COUNTERS, "numbers": NUM_BINS, "weights": 2 * NUM_BINS, "partial": 2 * chunks, "best": 2,
        "records": RECORD, "lists": 2 * shape.capacity, "bounds": 2,
    }  # fmt: skip
    return {name: -(-num_rows * each // 4) * 4 for name, each in words.items()}


@dataclass(frozen=True, eq=False)
class Workspace:
    """What launches of one stream share: i32 words, 0 before the first launch, for `num_rows` rows of up to
    `vocab_size` ids. Launches that share one must follow each other."""

    words: Any  # i32[num_words]
    num_rows: int
    vocab_size: int

    @staticmethod
    def num_words(num_rows: int, vocab_size: int, shape: Shape = PRODUCT) -> int:
        """int32 words of a workspace: about 22 KiB a row. ValueError for no row, or too many."""
        if not 1 <= num_rows <= MAX_ROWS or not 1 <= vocab_size <= MAX_VOCAB:
            raise ValueError(
                f"{OP}: a workspace for {num_rows} rows of {vocab_size} ids; 1 to {MAX_ROWS:,} rows of 1 to "
                f"{MAX_VOCAB:,} ids are required"
            )
        return sum(_parts(num_rows, vocab_size, shape).values())

    @staticmethod
    def of(num_rows: int, vocab_size: int) -> Workspace:
        """One that numba allocates. ValueError as num_words."""
        words = cuda.to_device(np.zeros(Workspace.num_words(num_rows, vocab_size), np.int32))
        return Workspace(words, num_rows, vocab_size)


@lru_cache(maxsize=16)
def own_workspace(num_rows: int, vocab_size: int) -> Workspace:
    """One that belongs to nobody, for callers that bring none; launches that use it must not run at once."""
    return Workspace.of(num_rows, vocab_size)


@cache
def num_sms() -> int:
    """Streaming multiprocessors of the current device."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _vector(name: str, array: View, dtype: Any, rows: int) -> int:
    check(OP, name, array, (dtype,), (rows,))
    if array.start % 4:
        fail(OP, name, f"starts at address {array.start:#x}", "a multiple of 4 bytes")
    return array.start


@dataclass(frozen=True)
class Operands:
    """The views of a call's arrays, in its order, and of what it shares: hashable."""

    out: View
    logits: View
    temperatures: View
    seeds: View
    output_indices: View
    top_ks: View
    top_ps: View
    num_rows: View | None
    words: View
    workspace_rows: int
    workspace_vocab: int


def refusal(capability: tuple[int, int] | None) -> str:
    """Why the rung cannot run, or "" if it can; capability None: no GPU."""
    if capability is not None and capability >= NEEDS:
        return ""
    here = "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    return f"it needs compute capability {NEEDS[0]}.{NEEDS[1]} or newer, here is {here}"


def plan_sample(o: Operands, sms: int, shape: Shape = PRODUCT) -> tuple[Plan, ...]:
    """The four launches for these operands, on a device of `sms` multiprocessors; none for nothing to do.

    out i32[R], logits f32[R, V] whose rows may be cut from wider ones, temperatures f32[R], seeds u64[R],
    output_indices i32[R], top_ks i32[R], top_ps f32[R]; R up to 4,096, V up to 2^24. ValueError names what is
    wrong.
    """
    check(OP, "logits", o.logits, (FLOAT32,), (None, None), rows=1)
    rows, vocab = o.logits.shape
    out = _vector("out", o.out, INT32, rows)
    vectors = [
        _vector(name, array, dtype, rows)
        for name, array, dtype in (
            ("temperatures", o.temperatures, FLOAT32), ("seeds", o.seeds, UINT64),
            ("output_indices", o.output_indices, INT32), ("top_ks", o.top_ks, INT32),
            ("top_ps", o.top_ps, FLOAT32),
        )
    ]  # fmt: skip
    temperatures, seeds, output_indices, top_ks, top_ps = vectors
    real = count_address(OP, o.num_rows)
    if rows == 0:
        return ()
    if rows > MAX_ROWS:
        fail(OP, "logits", f"has {rows:,} rows", f"at most {MAX_ROWS:,}")
    if not 1 <= vocab <= MAX_VOCAB:
        fail(OP, "logits", f"has {vocab:,} ids a row", f"1 to {MAX_VOCAB:,}")
    stride = int(o.logits.strides[0]) // 4 if rows > 1 else vocab
    if stride >= 1 << 31:
        fail(OP, "logits.strides[0]", f"is {4 * stride:,} bytes", "less than 2**33")
    if o.logits.start % 4:
        fail(OP, "logits", f"starts at address {o.logits.start:#x}", "a multiple of 4 bytes")
    at, starts = o.words.start, {}
    check(
        OP, "workspace", o.words, (INT32,),
        (Workspace.num_words(o.workspace_rows, o.workspace_vocab, shape),),
    )  # fmt: skip
    if at % ALIGNMENT:
        fail(OP, "workspace", f"starts at address {at:#x}", f"a multiple of {ALIGNMENT} bytes")
    if rows > o.workspace_rows or vocab > o.workspace_vocab:
        what = f"{o.workspace_rows} rows of {o.workspace_vocab:,} ids"
        fail(OP, "workspace", f"is for {what}", f"one for {rows} of {vocab:,}")
    for name, words in _parts(o.workspace_rows, o.workspace_vocab, shape).items():
        starts[name] = at
        at += 4 * words
    vector = vocab % 4 == 0 and stride % 4 == 0 and o.logits.start % ALIGNMENT == 0
    chunks = -(-vocab // chunk_of(shape.threads))
    logits, sizes = o.logits.start, (vocab, stride, chunks)
    drawn = (out, logits, temperatures, seeds, output_indices, top_ks, top_ps, real)
    cut = (logits, temperatures, top_ks, top_ps, real, starts["best"])
    arguments: dict[str, tuple[int, ...]] = {
        "survey": (*drawn, starts["partial"], starts["best"], starts["counters"], *sizes),
        "weigh": (
            *cut, starts["numbers"], starts["weights"], starts["records"], starts["counters"], *sizes, rows
        ),
        "gather": (
            *cut, starts["records"], starts["lists"], starts["bounds"], starts["counters"], *sizes, rows
        ),
        "draw": (
            *drawn, starts["partial"], starts["best"], starts["counters"], starts["bounds"], *sizes, rows
        ),
    }  # fmt: skip
    some = min(rows * chunks, BLOCKS_PER_SM * sms)
    return tuple(
        Plan(sample_kernel(step, vector, shape), rows * chunks if step == "survey" else some, numbers)
        for step, numbers in arguments.items()
    )


@lru_cache(maxsize=4096)
def prepared(o: Operands) -> tuple[Launch | None, ...]:
    """plan_sample's launches, ready to be repeated. ValueError on a GPU that is too old."""
    require_capability(OP)
    return tuple(ready(OP, plan) for plan in plan_sample(o, num_sms()))


def sample_warp(
    out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any, *,
    stream: Any = None, num_rows: Any = None, workspace: Workspace | None = None,
) -> None:  # fmt: skip
    """Rung "warp": sample_spec's ids, by the launches of plan_sample. num_rows: device i32[1], the real
    number of rows, or None: all; rows from there on are neither read nor written. Who captures a launch into
    a graph brings a workspace and keeps it as long as the graph."""
    rows, vocab = logits.shape
    if workspace is None:
        require_capability(OP)
        rounded = 1 << max(0, int(rows) - 1).bit_length()
        workspace = own_workspace(max(int(rows), min(rounded, MAX_ROWS)), max(1, int(vocab)))
    operands = Operands(
        view(OP, "out", out), view(OP, "logits", logits), view(OP, "temperatures", temperatures),
        view(OP, "seeds", seeds), view(OP, "output_indices", output_indices), view(OP, "top_ks", top_ks),
        view(OP, "top_ps", top_ps), view_count(OP, num_rows), view(OP, "workspace", workspace.words),
        workspace.num_rows, workspace.vocab_size,
    )  # fmt: skip
    for launch in prepared(operands):
        if launch is not None:
            launch(stream)
