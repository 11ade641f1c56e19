"""Launches of the tensor-core decode kernel: rungs "hopper" (pages by TMA) and "mma_sync" (pages by
cp.async).

Knows: specialisations, prepared launches, grids. Refuses to know: what the kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import SPLIT
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, Launch, address
from kernels_numba.ops.decode_attention.config import (
    BLOCK_SIZE,
    BOX_COLUMNS,
    CONFIGS,
    ITEM,
    PRODUCT,
    THREADS,
    Build,
    DecodeConfig,
    Feed,
    smem_plan,
)
from kernels_numba.ops.decode_attention.door import Operands, Workspace, operands, require_capability
from kernels_numba.ops.decode_attention.kernel import SIGNATURE, make_decode_kernel
from kernels_numba.ptx.tma import encode_tensor_map

FEEDS: dict[str, Feed] = {"hopper": "tma", "mma_sync": "cp_async"}
ARCHS = {
    "tma": ("sm_90a",),
    "cp_async": tuple(f"sm_{n}" for n in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)),
}


@cache
def decode_kernel(
    config: DecodeConfig,
    dtype: str,
    window: int | None = None,
    with_lse: bool = False,
    build: Build = PRODUCT,
    tokens: int = 1,
) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    words = ["decode", config.feed, f"d{config.head_dim}", dtype]
    words += [f"window{window}"] if window is not None else []
    words += ["lse"] if with_lse else []
    words += [name for name in ("debug", "stress") if getattr(build, name)]
    words += [build.mutant] if build.mutant else []
    words += [f"split{build.split}"] if build.split != SPLIT else []
    words += [f"tokens{tokens}"] if tokens > 1 else []
    return Kernel(
        "_".join(words),
        lambda: make_decode_kernel(config, dtype, window, with_lse, build, tokens),
        (config, dtype, window, with_lse, build, tokens),
        SIGNATURE, THREADS, smem_plan(config).bytes,
        pdl=build.pdl and config.feed == "tma", archs=ARCHS[config.feed],
    )  # fmt: skip


def kernels() -> Iterator[Kernel]:
    """Every kernel that a model in bfloat16 without windows can ask for, for building them ahead."""
    for config in CONFIGS:
        yield decode_kernel(config, "bfloat16")


@cache
def num_sms() -> int:
    """Streaming multiprocessors of the current device."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


@lru_cache(maxsize=256)
def own_workspace(
    num_seqs: int, num_splits: int, num_q_heads: int, num_kv_heads: int, head_dim: int, query_tokens: int = 1
) -> Workspace:
    """One that belongs to nobody, for callers that bring none; launches that use it must not run at once."""
    return Workspace.of(num_seqs, num_splits, num_q_heads, num_kv_heads, head_dim, query_tokens)


@lru_cache(maxsize=4096)
def prepared(
    rung: str,
    o: Operands,
    workspace: Workspace,
    window: int | None,
    build: Build = PRODUCT,
) -> tuple[Launch, Any]:
    """A launch ready to be repeated, and the tensor maps it reads, u64[2, 16] on the device (None without).

    Who captures a launch into a graph keeps what this returns, and the workspace, as long as the graph.
    ValueError on a GPU that cannot run the rung.
    """
    require_capability(rung)
    feed = FEEDS[rung]
    items = o.num_seqs * o.num_kv_heads * o.row_tiles * o.max_splits(build.split)
    config = DecodeConfig(o.head_dim, feed)
    maps = None
    if feed == "tma":
        shape, stride = (o.num_blocks * o.num_kv_heads * BLOCK_SIZE, o.head_dim), (o.head_dim * ITEM,)
        box = (BLOCK_SIZE, BOX_COLUMNS)
        words = [encode_tensor_map(at, o.dtype, shape, stride, box) for at in (o.k_cache, o.v_cache)]
        maps = cuda.to_device(np.stack(words))
    kernel = decode_kernel(config, o.dtype, window, o.lse != 0, build, o.tokens)
    arguments = (
        0 if maps is None else address(maps), o.k_cache, o.v_cache, o.q, o.out, o.lse, o.context_lens,
        o.block_table,
        address(workspace.partial), address(workspace.partial_ml), address(workspace.counters),
        o.num_seqs, o.num_kv_heads, o.group, o.q_stride, o.out_stride, o.table_stride,
        workspace.capacity, o.c,
    )  # fmt: skip
    return kernel.prepare(min(items, num_sms()), arguments), maps


def attend(
    rung: str, out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, query_tokens: int = 1, lse: Any = None,
    workspace: Workspace | None = None, stream: Any = None, build: Build = PRODUCT,
) -> None:  # fmt: skip
    """Rungs "hopper" and "mma_sync": out[B T, Hq, D] as decode_attention_spec says, in the order of
    attention_contract.py; what they take: door.operands.

    query_tokens: T, 1 to 8 of a sequence, its last ones: q, out[B T, Hq, D], row b T + i sees all but the
    last T - 1 - i of context_lens[b] keys. lse: f32[B T, Hq], gets the log-sum-exp of each row's scaled
    scores, or None. workspace: Workspace.of(...), the caller's; launches that share one must follow each
    other. context_lens and block_table must not be written by a launch right before this one, nor may keys
    but each sequence's T newest (make_decode_kernel). build: another kind of kernel than
    the product's (tests, tuning). ValueError for what is wrong at the door.
    """
    o = operands(
        out, q, k_cache, v_cache, context_lens, block_table, softmax_scale, window, lse, query_tokens
    )
    if o.num_seqs == 0:
        return
    if workspace is None:
        heads = o.num_kv_heads * o.group
        splits = o.num_seqs * o.max_splits(build.split)
        workspace = own_workspace(o.num_seqs, splits, heads, o.num_kv_heads, o.head_dim, o.tokens)
    workspace.check(o)
    prepared(rung, o, workspace, window, build)[0](stream)
