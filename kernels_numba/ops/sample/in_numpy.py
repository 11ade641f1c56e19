"""Rung "warp" on numpy arrays, without a GPU: for reading, breaking and testing it.

The launches are planned by plan_sample over addresses of simt.Memory, so host arithmetic is tested with it.
Knows: how arrays become views. Refuses to know: speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt_threads
from kernels_numba.ops.sample.warp import Operands, Shape, Workspace, plan_sample
from kernels_numba.ops.warp.in_numpy import Arrays

PACKAGE = "kernels_numba.ops.sample"
SHARED = ("kernels_numba.philox", f"{PACKAGE}.nucleus", f"{PACKAGE}.plain", f"{PACKAGE}.warp_tools")
HOMES = {"survey": "survey", "weigh": "cut", "gather": "cut", "draw": "survey"}
ARRAYS = ("out", "logits", "temperatures", "seeds", "output_indices", "top_ks", "top_ps")
SMALL = Shape(threads=64, capacity=64)  # chunks of 1,024 ids


def in_numpy(
    out: Any, logits: Any, *parameters: Any, real_rows: int | None = None, words: Any = None, sms: int = 2,
    shape: Shape = SMALL, seed: int = 0, change: Callable[[str, str], str] = lambda name, text: text,
) -> Any:  # fmt: skip
    """The workspace that the launches leave; out i32[R] is written. parameters: temperatures, seeds,
    output_indices, top_ks, top_ps.

    real_rows: of more rows than are real, whose memory does not exist then; words: a workspace that was used
    before; seed: of the order of threads and blocks; change: see simt_warps.link. IndexError where a kernel
    leaves an array, simt_turns.Stuck where it would hang.
    """
    arrays = Arrays()
    rows, vocab = logits.shape
    if words is None:
        words = np.zeros(Workspace.num_words(rows, vocab, shape), np.int32)
    count = None if real_rows is None else arrays.view(np.array([real_rows], np.int32))
    own = dict(zip(ARRAYS, (out, logits, *parameters), strict=True))
    views: dict[str, Any] = {name: arrays.view(array[:real_rows], rows) for name, array in own.items()}
    views |= {"num_rows": count, "words": arrays.view(words)}
    operands = Operands(**views, workspace_rows=rows, workspace_vocab=vocab)
    for plan in plan_sample(operands, sms, shape):
        step = plan.kernel.name.split("_")[1]
        simt_threads.run(
            (*SHARED, f"{PACKAGE}.{HOMES[step]}"), f"make_{step}_kernel", plan.kernel.key, plan.arguments,
            plan.grid, shape.threads, arrays.memory, seed, change,
        )  # fmt: skip
    return words
