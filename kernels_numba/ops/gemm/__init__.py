"""Linear layer: out = x @ weight.T + bias, or residual + that.

Knows: two matrices, a bias and a residual. Refuses to know: how many requests the rows of x come from, in the
strict sense: an output's bits depend on its row of x, its row of weight and K alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned
from kernels_numba.compiler import SIMULATOR, cuda, element, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide


@dataclass(frozen=True)
class Config:
    """Tile of one block: tile_m x tile_n outputs in steps of tile_k; each thread owns rows x cols outputs of
    it."""

    tile_m: int
    tile_n: int
    tile_k: int
    rows: int
    cols: int

    @property
    def threads(self) -> int:
        return (self.tile_m // self.rows) * (self.tile_n // self.cols)


FEW_ROWS = 16
# Few rows: reading weights is all the work, so many small blocks with deep steps keep many loads in flight.
FEW = Config(4, 16, 16, 2, 16) if SIMULATOR else Config(8, 32, 64, 1, 1)
# Many rows: 4 x 4 outputs a thread make 16 fma of 8 shared-memory reads.
MANY = Config(4, 8, 8, 4, 4) if SIMULATOR else Config(64, 64, 16, 4, 4)


SINGLE_ROWS, SWAPPED_ROWS, CACHED_BYTES = 3, 64, 16 << 20  # of blas_product, which says why


def pick_config(num_rows: int) -> Config:
    """FEW up to 16 rows, MANY beyond; both add in the same order, so the choice never shows in a bit."""
    return FEW if num_rows <= FEW_ROWS else MANY


def gemm_spec(x: Any, weight: Any, bias: Any = None, residual: Any = None) -> Any:
    """out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]: x[T, K], weight[N, K], bias[N] or None -> float32[T,
    N]. With residual[T, N]: residual + that, rounded to residual's dtype before."""
    out = wide(x) @ wide(weight).T
    out = out if bias is None else out + wide(bias)
    return out if residual is None else wide(residual) + wide(out.astype(np.asarray(residual).dtype))


def gemm_cost(
    m: int, n: int, k: int, bias: bool = False, dtype: str = "bfloat16", out_dtype: str = "",
    residual: bool = False,
) -> Cost:  # fmt: skip
    """x, weight, bias and residual read once, out written once; 2 operations a product, 1 a bias, 1 a
    residual. Nothing for m = 0."""
    if m == 0:
        return Cost(0, 0)
    read = m * k + n * k + (n if bias else 0) + (m * n if residual else 0)
    flops = 2 * m * n * k + m * n * (bias + residual)
    return Cost(bytes=read * ITEMSIZE[dtype] + m * n * ITEMSIZE[out_dtype or dtype], flops=flops)


@cache
def make_gemm_kernel(
    config: Config, dtype: str, out_dtype: str, has_bias: bool, gather: bool = False,
    has_residual: bool = False,
) -> Any:  # fmt: skip
    """out[m, n] = sum over k ascending of x[m, k] weight[n, k], one fma a step from 0, then + bias[n],
    rounded once; with has_residual, residual[m, n] + that, rounded.

    Arguments: out O[M, N], x T[M, K], weight T[N, K], bias T[N] (weight again if unused), rows i32[M]: with
    `gather` the row of x for each row of out (elsewhere unused; x again), residual O[M, N], which may be out
    (x again if unused).
    Who does what: block (bn, bm) makes the tile_m x tile_n outputs from (bm * tile_m, bn * tile_n). All its
    threads load a tile_k slice of both tiles, adjacent threads adjacent k (coalesced); then each thread
    multiplies for its rows x cols outputs, which lie tile_m / rows and tile_n / cols apart, so adjacent
    threads read adjacent columns. Each output is one chain of fma over ascending k, whatever the tile: so
    every config gives the same bits. Shared memory: s_x f32[tile_k, tile_m + 1] at 0, then s_w f32[tile_k,
    tile_n + 1]; the odd row length spreads the transposing stores over the banks. Past M, N and K the tiles
    hold zeros. Barriers: one hands loaded tiles to the products, one hands the tiles back for the next load.
    """
    tile_m, tile_n, tile_k, rows, cols = config.tile_m, config.tile_n, config.tile_k, config.rows, config.cols
    threads = config.threads
    threads_m, threads_n = tile_m // rows, tile_n // cols
    outputs = rows * cols
    pitch_m, pitch_n = tile_m + 1, tile_n + 1
    to_float, from_float = element(dtype).to_float, element(out_dtype).from_float

    def add_bias(value: Any, bias: Any, n: Any) -> Any:
        return value + to_float(bias[n])

    def no_bias(value: Any, bias: Any, n: Any) -> Any:
        return value

    def gathered_row(row_of: Any, m: Any) -> Any:
        return row_of[m]

    def same_row(row_of: Any, m: Any) -> Any:
        return m

    def add_residual(rounded: Any, residual: Any, m: Any, n: Any) -> Any:
        return from_float(to_float(residual[m, n]) + to_float(rounded))

    def no_residual(rounded: Any, residual: Any, m: Any, n: Any) -> Any:
        return rounded

    finish = jit(device=True)(add_bias if has_bias else no_bias)
    added = jit(device=True)(add_residual if has_residual else no_residual)
    source_row = jit(device=True)(gathered_row if gather else same_row)

    @jit()
    def gemm_kernel(out: Any, x: Any, weight: Any, bias: Any, row_of: Any, residual: Any) -> None:
        s_x = cuda.shared.array((tile_k, pitch_m), np.float32)
        s_w = cuda.shared.array((tile_k, pitch_n), np.float32)
        acc = cuda.local.array(outputs, np.float32)
        thread = cuda.threadIdx.x
        thread_m = thread // threads_n
        thread_n = thread % threads_n
        m0 = cuda.blockIdx.y * tile_m
        n0 = cuda.blockIdx.x * tile_n
        num_m = out.shape[0]
        num_n = out.shape[1]
        num_k = weight.shape[1]
        for i in range(outputs):
            acc[i] = np.float32(0)
        for k0 in range(0, num_k, tile_k):
            for i in range(thread, tile_m * tile_k, threads):
                m = i // tile_k
                k = i % tile_k
                value = np.float32(0)
                if m0 + m < num_m and k0 + k < num_k:
                    value = to_float(x[source_row(row_of, m0 + m), k0 + k])
                s_x[k, m] = value
            for i in range(thread, tile_n * tile_k, threads):
                n = i // tile_k
                k = i % tile_k
                value = np.float32(0)
                if n0 + n < num_n and k0 + k < num_k:
                    value = to_float(weight[n0 + n, k0 + k])
                s_w[k, n] = value
            cuda.syncthreads()
            for k in range(tile_k):
                for i in range(rows):
                    x_value = s_x[k, thread_m + i * threads_m]
                    for j in range(cols):
                        acc[i * cols + j] = cuda.fma(
                            x_value, s_w[k, thread_n + j * threads_n], acc[i * cols + j]
                        )
            cuda.syncthreads()
        for i in range(rows):
            m = m0 + thread_m + i * threads_m
            for j in range(cols):
                n = n0 + thread_n + j * threads_n
                if m < num_m and n < num_n:
                    rounded = from_float(finish(acc[i * cols + j], bias, n))
                    out[m, n] = added(rounded, residual, m, n)

    return gemm_kernel


def check_operands(kind: type[Host], out: Any, x: Any, weight: Any, bias: Any, residual: Any) -> None:
    """ValueError for wrong dtypes, shapes, strides; a residual has out's dtype and shape."""
    dtypes = kind.elements("gemm", "out", out)
    check("gemm", "out", out, dtypes, (None, None), rows=1)
    check("gemm", "x", x, dtypes, (out.shape[0], None), rows=1)
    check("gemm", "weight", weight, dtypes, (out.shape[1], x.shape[1]))
    if bias is not None:
        check("gemm", "bias", bias, dtypes, (out.shape[1],))
    if residual is not None:
        check("gemm", "residual", residual, (out.dtype,), out.shape, rows=1)


def blas_product(out: Any, x: Any, weight: Any) -> None:
    """out[T, N] = x[T, K] @ weight[N, K].T, all float32, in the BLAS form that is fastest for the rows at
    hand.

    Measured with OpenBLAS on 2 cores, N x K of 3072 x 576 and 576 x 1536: 2 or 3 rows are faster one by one
    (its matrix-vector product, up to 3x), and up to 64 rows as (weight @ x.T).T (1.1x to 2x). A weight beyond
    the cache is read again by every matrix-vector product, so it takes the second form at once.
    """
    rows = len(x)
    if rows == 1 or rows > SWAPPED_ROWS:
        np.matmul(x, weight.T, out=out)
    elif rows <= SINGLE_ROWS and weight.nbytes <= CACHED_BYTES:
        for row in range(rows):
            np.matmul(x[row], weight.T, out=out[row])
    else:
        out[...] = np.matmul(weight, x.T).T


def gemm_reference(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None
) -> None:
    """Rung "reference": one BLAS product straight into `out` for float32, or beside it where a residual is to
    be added, which may be out; other dtypes through float32 copies."""
    check_operands(Host, out, x, weight, bias, residual)
    if out.dtype == x.dtype == weight.dtype == np.float32:
        product = out if residual is None else np.empty(out.shape, np.float32)
        blas_product(product, x, weight)
        if bias is not None:
            np.add(product, bias, out=product)
        if residual is not None:
            np.add(residual, product, out=out)
    else:
        out[...] = gemm_spec(x, weight, bias, residual)


def gemm(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None
) -> None:
    """Rung "plain": launch the kernel on `stream`. residual: T[M, N], which may be out. ValueError for wrong
    dtypes, shapes, strides."""
    check_operands(Device, out, x, weight, bias, residual)
    check_aligned("gemm", "weight", weight)
    if out.size == 0:
        return
    dtype = element_name(out)
    config = pick_config(out.shape[0])
    kernel = make_gemm_kernel(config, dtype, dtype, bias is not None, has_residual=residual is not None)
    unused = weight if bias is None else bias, x, x if residual is None else residual
    grid = (-(-out.shape[1] // config.tile_n), -(-out.shape[0] // config.tile_m))
    kernel[grid, config.threads, stream or 0](out, x, weight, *unused)


CASES: dict[str, dict[str, Any]] = {
    "toy_one_row": {"m": 1, "n": 5, "k": 7, "bias": False, "residual": False},
    "toy_bias": {"m": 3, "n": 9, "k": 8, "bias": True, "residual": False},
    "rows_2": {"m": 2, "n": 40, "k": 24, "bias": True, "residual": False},
    "rows_64": {"m": 64, "n": 40, "k": 24, "bias": False, "residual": False},
    "toy_many_rows": {"m": 17, "n": 3, "k": 3, "bias": False, "residual": False},
    "toy_empty": {"m": 0, "n": 8, "k": 8, "bias": True, "residual": False},
    "toy_residual": {"m": 3, "n": 9, "k": 8, "bias": True, "residual": True},
    "toy_residual_many_rows": {"m": 17, "n": 3, "k": 3, "bias": False, "residual": True},
    "smollm2_135m_qkv_decode": {"m": 1, "n": 960, "k": 576, "bias": False, "residual": False},
    "smollm2_135m_gate_up_prefill": {"m": 700, "n": 3072, "k": 576, "bias": False, "residual": False},
    "smollm2_135m_down": {"m": 17, "n": 576, "k": 1536, "bias": False, "residual": False},
    "smollm2_135m_down_residual": {"m": 70, "n": 576, "k": 1536, "bias": False, "residual": True},
    "qwen2_7b_qkv": {"m": 33, "n": 4608, "k": 3584, "bias": True, "residual": False},
    "odd": {"m": 67, "n": 131, "k": 77, "bias": True, "residual": False},
}


def gemm_hopper(out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None,
                num_rows: Any = None) -> None:  # fmt: skip
    """Rung "hopper" (sm_90a): tensor cores and TMA, by the kernel for few tokens or that for many; see
    on_hopper.py, which is imported when first used."""
    from kernels_numba.ops.gemm import on_hopper

    on_hopper.gemm_hopper(out, x, weight, bias, residual=residual, stream=stream, num_rows=num_rows)


def gemm_mma_sync(out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None,
                  stream: Any = None, num_rows: Any = None) -> None:  # fmt: skip
    """Rung "mma_sync" (sm_80 and newer): tensor cores a warp at a time, few tokens and many; see
    ops/gemm_mma, which is imported when first used."""
    from kernels_numba.ops.gemm_mma import gemm_mma

    gemm_mma(out, x, weight, bias, residual=residual, stream=stream, num_rows=num_rows)


def _imported_when_used(module: str, function: str, what: str) -> Rung:
    """The rung `function` of a module of kernels_numba.ops, which is imported by the first call."""

    def rung(
        out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None
    ) -> None:
        step = getattr(importlib.import_module(f"kernels_numba.ops.{module}"), function)
        step(out, x, weight, bias, residual=residual, stream=stream)

    rung.__name__, rung.__doc__ = function, what
    return rung


gemm_naive = _imported_when_used(
    "gemm.ladder.naive", "gemm_naive", 'Rung "naive": one thread, one output; see ladder/naive.py.'
)
gemm_mma_step = _imported_when_used(
    "gemm.ladder.mma_step", "gemm_mma_step",
    'Rung "mma_step" (sm_80 and newer): what "mma_sync" is at its simplest; see ladder/mma_step.py.',
)  # fmt: skip
gemm_wgmma = _imported_when_used(
    "gemm.ladder.wgmma", "gemm_wgmma",
    'Rung "wgmma" (sm_90a): tensor cores a warpgroup at a time, fed by TMA; see ladder/wgmma.py.',
)  # fmt: skip
gemm_gemv = _imported_when_used(
    "gemm_few.gemv", "gemv",
    'Rung "gemv" (9.0), one token only: bits of its own, so no engine takes it; see gemm_few/gemv.py.',
)  # fmt: skip

rungs: dict[str, Rung] = {
    "reference": gemm_reference, "naive": gemm_naive, "plain": gemm, "mma_step": gemm_mma_step,
    "wgmma": gemm_wgmma, "mma_sync": gemm_mma_sync, "hopper": gemm_hopper, "gemv": gemm_gemv,
}  # fmt: skip
LADDER = ("naive", "mma_step", "wgmma")  # steps that teach: measured when asked for by name
NOT_INVARIANT = ("gemv",)  # a row's bits are not those it has in company: measured, and used by no engine
register = make_register("gemm", rungs)
