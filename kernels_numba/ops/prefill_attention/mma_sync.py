"""Launches of the mma.sync prefill kernel: rung "mma_sync", over pages, and its form for packed keys and
values.

Knows: specialisations, prepared launches, grids. Refuses to know: what the kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

from kernels_numba.attention_contract import SPLIT
from kernels_numba.launch import Kernel, Launch, address
from kernels_numba.ops.prefill_attention.config import HEAD_DIMS, PRODUCT, Build, Source
from kernels_numba.ops.prefill_attention.door import MMA, Operands, Workspace, operands, require_capability
from kernels_numba.ops.prefill_attention.hopper import num_sms
from kernels_numba.ops.prefill_attention.mma_config import (
    MAX_BLOCKS,
    THREADS,
    TILE_ROWS,
    MmaConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.mma_kernel import SIGNATURE, make_prefill_mma_kernel

ARCHS = tuple(f"sm_{n}" for n in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121))


@cache
def prefill_mma_kernel(
    config: MmaConfig, dtype: str, window: int | None = None, with_lse: bool = False, build: Build = PRODUCT
) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    words = ["prefill_mma", config.source, f"d{config.head_dim}", dtype]
    words += [f"window{window}"] if window is not None else []
    words += ["lse"] if with_lse else []
    words += [name for name in ("debug", "stress") if getattr(build, name)]
    words += [f"split{build.split}"] if build.split != SPLIT else []
    words += [build.mutant] if build.mutant else []
    return Kernel(
        "_".join(words),
        lambda: make_prefill_mma_kernel(config, dtype, window, with_lse, build),
        (config, dtype, window, with_lse, build),
        SIGNATURE, THREADS, smem_plan(config).bytes, archs=ARCHS,
    )  # fmt: skip


def kernels() -> Iterator[Kernel]:
    """Every kernel that a model in bfloat16 without windows can ask for, for building them ahead."""
    for head_dim in HEAD_DIMS:
        yield prefill_mma_kernel(MmaConfig(head_dim), "bfloat16")


@cache
def own_workspace(head_dim: int) -> Workspace:
    """One that belongs to nobody, for callers that bring none; launches that use it must not run at once."""
    return Workspace.of(head_dim)


@lru_cache(maxsize=4096)
def prepared(
    o: Operands, workspace: Workspace, source: Source = "pages", window: int | None = None,
    build: Build = PRODUCT,
) -> tuple[Launch, Any]:  # fmt: skip
    """A launch ready to be repeated, and the workspace that it writes to.

    Who captures a launch into a graph keeps what this returns as long as the graph. ValueError on a GPU that
    cannot run the rung.
    """
    require_capability(MMA)
    workspace.check(o)
    kernel = prefill_mma_kernel(MmaConfig(o.head_dim, source), o.dtype, window, o.lse != 0, build)
    # A sequence's last tile may be any part of one.
    items = o.num_kv_heads * (o.tokens * o.group // TILE_ROWS + o.num_seqs)
    arguments = (
        o.k, o.v, o.q, o.out, o.lse, o.cu_seqlens_q, o.context_lens, o.table, address(workspace.counters),
        address(workspace.state), o.num_seqs, o.num_kv_heads, o.group, o.q_stride, o.out_stride,
        o.table_stride, o.c,
    )  # fmt: skip
    return kernel.prepare(min(items, num_sms(), MAX_BLOCKS), arguments), workspace


def _attend(
    o: Operands, source: Source, window: int | None, workspace: Workspace | None, stream: Any, how: Any
) -> None:
    if o.tokens and o.num_seqs and o.keys:
        prepared(o, workspace or own_workspace(o.head_dim), source, window, **how)[0](stream)


def attend(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, lse: Any = None, workspace: Workspace | None = None,
    stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "mma_sync": out[tokens, Hq, D] as prefill_attention_spec says, in the order of
    attention_contract.py; what it takes: door.operands.

    lse: f32[tokens, Hq], gets the log-sum-exp of each row's scaled scores, or None. workspace:
    Workspace.of(head_dim), the caller's; launches that share one must follow each other. how: build, for
    tests. ValueError for what is wrong at the door.
    """
    arrays = (out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table)
    _attend(operands(*arrays, softmax_scale, window, lse), "pages", window, workspace, stream, how)


def attend_rows(
    out: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, context_lens: Any, *,
    softmax_scale: float, window: int | None = None, lse: Any = None, workspace: Workspace | None = None,
    stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """attend for keys and values that are no pages: k, v T[keys, Hkv, D], those of sequence b from row
    cu_seqlens_k[b] on, context_lens[b] of them. The same bits."""
    arrays = (out, q, k, v, cu_seqlens_q, context_lens, cu_seqlens_k)
    o = operands(*arrays, softmax_scale, window, lse, paged=False)
    _attend(o, "rows", window, workspace, stream, how)
