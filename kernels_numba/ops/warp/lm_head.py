"""Logits of selected rows: the rows are gathered into a workspace, then multiplied by a tensor-core GEMM: on
Hopper the one for few tokens or the one for many, elsewhere that of mma.sync.

Knows: two launches in a row. Refuses to know: any kernel, sampling. Of a vocabulary that is no multiple of 8
the product is the plain GEMM's, which knows no number of rows: it fills all of `out`, from the workspace's
last contents where rows past the real number were not gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda, element_name
from kernels_numba.launch import Launch, address
from kernels_numba.ops import gemm_mma
from kernels_numba.ops.gemm import hopper as many
from kernels_numba.ops.gemm import make_gemm_kernel, pick_config
from kernels_numba.ops.gemm.door import best_rung, operands
from kernels_numba.ops.gemm.hopper_config import pick_hopper_config
from kernels_numba.ops.gemm_few import hopper as few
from kernels_numba.ops.gemm_few.config import pick_few_config, use_few
from kernels_numba.ops.gemm_few.door import few_operands
from kernels_numba.ops.warp import gather
from kernels_numba.ops.warp.door import (
    FLOAT32,
    HALVES,
    NAMES,
    View,
    count_address,
    multiple_of_8,
    view,
    view_count,
)

OP = "lm_head"
ROWS = ("x_rows", "logits_rows", "hidden")


@lru_cache(maxsize=64)
def own_workspace(rows: int, hidden_size: int, dtype: Any) -> Any:
    """T[rows, H] for callers that bring none, kept for the next call of these sizes."""
    return cuda.device_array((rows, hidden_size), dtype)


def workspace_view(out: View, x_rows: View) -> View:
    """The first rows of the workspace, as many as out has. ValueError if there are fewer."""
    check(OP, "x_rows", x_rows, HALVES, (None, None))
    if x_rows.shape[0] < out.shape[0]:
        fail(OP, "x_rows", f"has {x_rows.shape[0]} rows", f"at least {out.shape[0]}")
    return View(x_rows.start, (out.shape[0], x_rows.shape[1]), x_rows.strides, x_rows.dtype)


def check_operands(out: View, hidden: View, weight: View, logits_rows: View, x_rows: View) -> None:
    """out f32[R, V], hidden, x_rows T[rows, H], weight T[V, H], logits_rows i32[R]; T bfloat16 bits or
    float16. ValueError names what is wrong."""
    check(OP, "hidden", hidden, HALVES, (None, None), rows=1)
    check(OP, "weight", weight, (hidden.dtype,), (None, hidden.shape[1]))
    check(OP, "out", out, (FLOAT32,), (None, weight.shape[0]), rows=1)
    check(OP, "x_rows", x_rows, (hidden.dtype,), (out.shape[0], hidden.shape[1]))
    multiple_of_8(OP, "hidden.shape[1]", hidden.shape[1])


@dataclass(frozen=True, eq=False)
class Launches:
    """Both launches of a call; product None where the plain GEMM must do; held: what they read that nobody
    else holds."""

    gather: Launch
    product: Launch | None
    held: tuple[Any, ...] = ()


def _few(out: View, x_rows: View, weight: View, num_rows: View | None) -> tuple[Launch, tuple[Any, ...]]:
    o = few_operands(out, x_rows, weight)
    config = pick_few_config(o.given.m, o.given.n, o.given.k, many.num_sms())
    product, maps = few.prepared(o, count_address(OP, num_rows), config)
    return product, (maps,)


def _many(out: View, x_rows: View, weight: View, num_rows: View | None) -> tuple[Launch, tuple[Any, ...]]:
    o = operands(out, x_rows, weight, None, many.INPUTS)
    config, group = pick_hopper_config(o.m, o.n, o.k, many.num_sms())
    count = cuda.to_device(np.array([o.m], np.int32)) if num_rows is None else None
    start = address(count) if num_rows is None else count_address(OP, num_rows)
    product, maps = many.prepared(o, start, config, group)
    return product, (maps, count)


def _mma(out: View, x_rows: View, weight: View, num_rows: View | None) -> tuple[Launch, tuple[Any, ...]]:
    product = gemm_mma.prepared(out, x_rows, weight, None, None, num_rows, "", None)
    assert product is not None  # there are rows
    return product, ()


def pick_product(out: View, x_rows: View, capability: tuple[int, int], product: str = "") -> str:
    """Which GEMM multiplies: "few" or "many" on Hopper (product forces one of them), "mma" on other cards, ""
    for the plain one."""
    (m, n), k = out.shape, x_rows.shape[1]
    rung = best_rung("", capability, NAMES[x_rows.dtype], (n, k))
    if rung != "hopper":
        return "mma" if rung else ""
    return product or ("few" if use_few(m, n, k, many.num_sms()) else "many")


PRODUCTS: dict[str, Callable[..., tuple[Launch, tuple[Any, ...]]]] = {
    "few": _few, "many": _many, "mma": _mma,
}  # fmt: skip


@lru_cache(maxsize=4096)
def prepared(
    out: View, hidden: View, weight: View, logits_rows: View, x_rows: View, num_rows: View | None,
    product: str = "",
) -> Launches | None:  # fmt: skip
    """The launches of these operands, ready to be repeated; None for nothing to do. product: as of
    pick_product. ValueError for wrong operands, or on a GPU that is too old.

    The first call of a shape without num_rows may upload its number of rows: make it before a graph is
    captured.
    """
    check_operands(out, hidden, weight, logits_rows, x_rows)
    rows = gather.prepared(OP, x_rows, logits_rows, hidden, num_rows, ROWS)
    if rows is None or out.size == 0:
        return None
    capability = tuple(cuda.get_current_device().compute_capability)
    picked = pick_product(out, x_rows, capability, product)
    if not picked:
        return Launches(rows, None)
    launch, held = PRODUCTS[picked](out, x_rows, weight, num_rows)
    return Launches(rows, launch, held)


def lm_head_warp(
    out: Any, hidden: Any, weight: Any, logits_rows: Any, *, stream: Any = None, num_rows: Any = None,
    x_rows: Any = None, product: str = "",
) -> None:  # fmt: skip
    """Rung "warp" of lm_head: out[r] = weight @ hidden[logits_rows[r]], float32, NaN for a row that hidden
    does not have.

    x_rows: workspace T[at least R, H], overwritten; without one the op keeps its own. num_rows: device i32[1]
    with the real R, which must not be written by a launch right before this one (see hopper.py of gemm).
    product: "few" or "many" forces one of Hopper's two GEMMs, which give the same bits (tuning). ValueError
    for wrong dtypes, shapes, strides or alignment.
    """
    if x_rows is None:
        x_rows = own_workspace(out.shape[0], hidden.shape[1], hidden.dtype)
    out_view = view(OP, "out", out)
    launches = prepared(
        out_view, view(OP, "hidden", hidden), view(OP, "weight", weight),
        view(OP, "logits_rows", logits_rows),
        workspace_view(out_view, view(OP, "x_rows", x_rows)), view_count(OP, num_rows), product,
    )  # fmt: skip
    if launches is None:
        return
    launches.gather(stream)
    if launches.product is not None:
        launches.product(stream)
        return
    config = pick_config(out.shape[0])
    kernel = make_gemm_kernel(config, element_name(hidden), "float32", has_bias=False)
    grid = (-(-out.shape[1] // config.tile_n), -(-out.shape[0] // config.tile_m))
    kernel[grid, config.threads, stream or 0](out, x_rows, weight, weight, x_rows, x_rows)
