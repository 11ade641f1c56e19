"""Launches of the Hopper prefill kernel: rung "hopper", over pages, and its form for packed keys and values.

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
from kernels_numba.ops.prefill_attention.config import (
    BLOCK_SIZE,
    BOX_COLUMNS,
    CONSUMERS,
    EARLY,
    HEAD_DIMS,
    ITEM,
    PRODUCT,
    Build,
    PrefillConfig,
    Source,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.door import Operands, Workspace, operands, require_capability
from kernels_numba.ops.prefill_attention.kernel import SIGNATURE, make_prefill_kernel
from kernels_numba.ptx.tma import encode_tensor_map

ARCHS = ("sm_90a",)


@cache
def prefill_kernel(
    config: PrefillConfig,
    dtype: str,
    window: int | None = None,
    with_lse: bool = False,
    build: Build = PRODUCT,
) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    words = ["prefill", config.source, f"d{config.head_dim}", dtype]
    words += [] if config.turns else ["no_turns"]
    words += [f"early{config.early}"] if config.early != EARLY[config.head_dim] else []
    words += ["short_turns"] if config.short_turns else []
    words += [f"consumers{config.consumers}"] if config.consumers != CONSUMERS[config.head_dim] else []
    words += [f"window{window}"] if window is not None else []
    words += ["lse"] if with_lse else []
    words += [name for name in ("debug", "stress", "clock") if getattr(build, name)]
    words += [f"split{build.split}"] if build.split != SPLIT else []
    words += [build.mutant] if build.mutant else []
    return Kernel(
        "_".join(words),
        lambda: make_prefill_kernel(config, dtype, window, with_lse, build),
        (config, dtype, window, with_lse, build),
        SIGNATURE, config.threads, smem_plan(config).bytes, pdl=build.pdl, archs=ARCHS,
    )  # fmt: skip


def kernels() -> Iterator[Kernel]:
    """Every kernel that a model in bfloat16 without windows can ask for, for building them ahead."""
    for head_dim in HEAD_DIMS:
        yield prefill_kernel(PrefillConfig(head_dim), "bfloat16")


@cache
def num_sms() -> int:
    """Streaming multiprocessors of the current device."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


@cache
def own_workspace() -> Workspace:
    """One that belongs to nobody, for callers that bring none; launches that use it must not run at once."""
    return Workspace.of()


@lru_cache(maxsize=4096)
def prepared(
    o: Operands, workspace: Workspace, source: Source = "pages", window: int | None = None,
    build: Build = PRODUCT, config: PrefillConfig | None = None,
) -> tuple[Launch, Any]:  # fmt: skip
    """A launch ready to be repeated, and the tensor maps it reads, u64[2, 16] on the device.

    Who captures a launch into a graph keeps what this returns, and the workspace, as long as the graph.
    ValueError on a GPU that cannot run the rung.
    """
    require_capability()
    shape, stride, box = (o.keys, o.key_columns), (o.key_columns * ITEM,), (BLOCK_SIZE, BOX_COLUMNS)
    maps = cuda.to_device(np.stack([encode_tensor_map(at, o.dtype, shape, stride, box) for at in (o.k, o.v)]))
    config = config or PrefillConfig(o.head_dim, source)
    kernel = prefill_kernel(config, o.dtype, window, o.lse != 0, build)
    # A sequence's last tile may be any part of one.
    items = o.num_kv_heads * (o.tokens * o.group // config.tile_rows + o.num_seqs)
    arguments = (
        address(maps), o.q, o.out, o.lse, o.cu_seqlens_q, o.context_lens, o.table,
        address(workspace.counters), o.num_seqs, o.num_kv_heads, o.group, o.q_stride, o.out_stride,
        o.table_stride, o.c,
    )  # fmt: skip
    return kernel.prepare(min(items, num_sms()), arguments), maps


def _attend(
    o: Operands, source: Source, window: int | None, workspace: Workspace | None, stream: Any, how: Any
) -> None:
    if o.tokens and o.num_seqs and o.keys:
        prepared(o, workspace or own_workspace(), source, window, **how)[0](stream)


def attend(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, lse: Any = None, workspace: Workspace | None = None,
    stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "hopper": out[tokens, Hq, D] as prefill_attention_spec says, in the order of
    attention_contract.py; what it takes: door.operands.

    lse: f32[tokens, Hq], gets the log-sum-exp of each row's scaled scores, or None. workspace:
    Workspace.of(), the caller's; launches that share one must follow each other. Lengths and the table must
    not be written by a launch right before this one (make_prefill_kernel). how: build and config, for tests.
    ValueError for what is wrong at the door.
    """
    arrays = (out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table)
    o = operands(*arrays, softmax_scale, window, lse)
    _attend(o, "pages", window, workspace, stream, how)


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
