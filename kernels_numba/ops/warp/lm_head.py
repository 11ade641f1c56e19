"""Logits of selected rows: the rows are gathered into a workspace, then multiplied by the GEMM of Hopper.

Knows: two launches in a row. Refuses to know: either kernel, sampling. On another GPU than Hopper the product
is the plain GEMM's, which knows no number of rows: it fills all of `out`, from the workspace's last contents
where rows past the real number were not gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda, element_name
from kernels_numba.launch import Launch, address
from kernels_numba.ops.gemm import make_gemm_kernel, pick_config
from kernels_numba.ops.gemm.door import operands, refusal
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


@lru_cache(maxsize=4096)
def prepared(
    out: View, hidden: View, weight: View, logits_rows: View, x_rows: View, num_rows: View | None
) -> Launches | None:
    """The launches of these operands, ready to be repeated; None for nothing to do. ValueError for wrong
    operands, or on a GPU that is too old.

    The first call of a shape without num_rows uploads its number of rows: make it before a graph is captured.
    """
    check_operands(out, hidden, weight, logits_rows, x_rows)
    rows = gather.prepared(OP, x_rows, logits_rows, hidden, num_rows, ROWS)
    if rows is None or out.size == 0:
        return None
    capability = tuple(cuda.get_current_device().compute_capability)
    if refusal("hopper", capability, NAMES[hidden.dtype], (out.shape[1],)):
        return Launches(rows, None)
    from kernels_numba.ops.gemm import hopper
    from kernels_numba.ops.gemm.hopper_config import pick_hopper_config

    o = operands(out, x_rows, weight, None, hopper.INPUTS)
    config, group = pick_hopper_config(o.m, o.n, o.k, hopper.num_sms())
    count = cuda.to_device(np.array([o.m], np.int32)) if num_rows is None else None
    start = address(count) if num_rows is None else count_address(OP, num_rows)
    product, maps = hopper.prepared(o, start, config, group)
    return Launches(rows, product, (maps, count))


def lm_head_warp(
    out: Any, hidden: Any, weight: Any, logits_rows: Any, *, stream: Any = None, num_rows: Any = None,
    x_rows: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" of lm_head: out[r] = weight @ hidden[logits_rows[r]], float32, NaN for a row that hidden
    does not have.

    x_rows: workspace T[at least R, H], overwritten; without one the op keeps its own. num_rows: device i32[1]
    with the real R, which must not be written by a launch right before this one (see hopper.py of gemm).
    ValueError for wrong dtypes, shapes, strides or alignment.
    """
    if x_rows is None:
        x_rows = own_workspace(out.shape[0], hidden.shape[1], hidden.dtype)
    out_view = view(OP, "out", out)
    launches = prepared(
        out_view, view(OP, "hidden", hidden), view(OP, "weight", weight),
        view(OP, "logits_rows", logits_rows),
        workspace_view(out_view, view(OP, "x_rows", x_rows)), view_count(OP, num_rows),
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
    kernel[grid, config.threads, stream or 0](out, x_rows, weight, weight, x_rows)
