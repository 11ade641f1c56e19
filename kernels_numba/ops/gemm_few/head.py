"""Logits of selected rows by the GEMM for few tokens: the rows are gathered, then multiplied, float32 out.

Knows: two launches in a row. Refuses to know: either kernel, sampling.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ops.gemm_few.config import FewConfig
from kernels_numba.ops.gemm_few.hopper import gemm_few
from kernels_numba.ops.warp import gather
from kernels_numba.ops.warp.door import view, view_count
from kernels_numba.ops.warp.lm_head import OP, ROWS, check_operands, own_workspace, workspace_view


def lm_head_few(
    out: Any, hidden: Any, weight: Any, logits_rows: Any, *, stream: Any = None, num_rows: Any = None,
    x_rows: Any = None, config: FewConfig | None = None,
) -> None:  # fmt: skip
    """out[r] = weight @ hidden[logits_rows[r]]: out float32[R, V], hidden T[T, H], weight T[V, H],
    logits_rows i32[R], T bfloat16 bits or float16; NaN for a row that hidden does not have.

    x_rows: workspace T[at least R, H], overwritten; without one lm_head's own serves. num_rows: device i32[1]
    with the real R. The same bits as rung "warp" of lm_head, which is what an engine runs;
    config forces a tile (tuning). ValueError for wrong dtypes, shapes, strides or alignment.
    """
    if x_rows is None:
        x_rows = own_workspace(out.shape[0], hidden.shape[1], hidden.dtype)
    out_view, hidden_view = view(OP, "out", out), view(OP, "hidden", hidden)
    ids, space = view(OP, "logits_rows", logits_rows), workspace_view(out_view, view(OP, "x_rows", x_rows))
    check_operands(out_view, hidden_view, view(OP, "weight", weight), ids, space)
    rows = gather.prepared(OP, space, ids, hidden_view, view_count(OP, num_rows), ROWS)
    if rows is None:
        return
    rows(stream)
    gemm_few(out, x_rows[: out.shape[0]], weight, stream=stream, num_rows=num_rows, config=config)
