"""The copy engine: tiles and plain runs of bytes between global and shared memory, asynchronously.

Tensor copies read a tensor map (128 bytes in global memory, made by encode_tensor_map); coordinates count
elements, innermost first. Loads end on an mbarrier (`complete_tx`), stores in the thread's bulk groups (PTX
ISA, "cp.async.bulk.tensor", "cp.async.bulk", "cp.async.bulk.prefetch"). All need sm_90.

A box may reach over the tensor's edges: loads give zeros there, stores write nothing there. It may begin
before the tensor (negative coordinates) when it is loaded, never when it is stored: that is an illegal
instruction (CUDA C++ Programming Guide, "Tensor Memory Access", negative indices and out of bounds).
Multicast: data and complete_tx go to the same offsets in every block of the cluster whose bit is set in the
mask; each of them expects the bytes on its own barrier, and all barriers were made visible
(fence_mbarrier_init, cluster_sync) before the load. _hint: with an L2 policy of policy.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_numba.ptx.asm import instruction


def _numbered(first: int, rank: int) -> str:
    return ", ".join(f"${first + i}" for i in range(rank))


def _load(rank: int, multicast: bool = False, hint: bool = False) -> Any:
    """Arguments dst, map, bar, coordinates, then the mask and the policy where there are such."""
    after = 3 + rank
    text = (
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        + (".multicast::cluster" if multicast else "")
        + (".L2::cache_hint" if hint else "")
        + f" [$0], [$1, {{{_numbered(3, rank)}}}], [$2]"
        + (", mask" if multicast else "")
        + (f", ${after + multicast}" if hint else "")
        + ";"
    )
    if multicast:  # 16 bits in the instruction, 32 in the argument
        text = f"{{\n.reg .b16 mask;\ncvt.u16.u32 mask, ${after};\n{text}\n}}"
    where = "A box into the blocks of the mask" if multicast else "A box to shared address dst"
    words = ", mask" * multicast + ", policy" * hint
    return instruction(
        f"tma_load_{rank}d" + "_multicast" * multicast + "_hint" * hint,
        text,
        "rlr" + "r" * rank + "r" * multicast + "l" * hint,
        doc=f"{where}, bytes counted on bar: (dst, map, bar, x, y, ..{words}) (cp.async.bulk.tensor).",
    )


def _store(rank: int, hint: bool = False) -> Any:
    return instruction(
        f"tma_store_{rank}d" + "_hint" * hint,
        f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"
        + (".L2::cache_hint" if hint else "")
        + f" [$0, {{{_numbered(2, rank)}}}], [$1]"
        + (f", ${2 + rank}" if hint else "")
        + ";",
        "lr" + "r" * rank + "l" * hint,
        doc=f"A box from src, cut at the edge: (map, src, x, y, ..{', policy' * hint}) "
        "(cp.async.bulk.tensor).",
    )


def _prefetch(rank: int) -> Any:
    return instruction(
        f"tma_prefetch_{rank}d",
        f"cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile [$0, {{{_numbered(1, rank)}}}];",
        "l" + "r" * rank,
        doc="Bring a box to the L2 cache: (map, x, y, ..) (cp.async.bulk.prefetch.tensor).",
    )


tma_load_2d, tma_load_3d, tma_load_4d = _load(2), _load(3), _load(4)
tma_load_2d_hint, tma_load_3d_hint, tma_load_4d_hint = (_load(rank, hint=True) for rank in (2, 3, 4))
tma_load_2d_multicast, tma_load_3d_multicast, tma_load_4d_multicast = (_load(r, True) for r in (2, 3, 4))
tma_load_2d_multicast_hint, tma_load_3d_multicast_hint, tma_load_4d_multicast_hint = (
    _load(rank, True, True) for rank in (2, 3, 4)
)
tma_store_2d, tma_store_3d, tma_store_4d = _store(2), _store(3), _store(4)
tma_store_2d_hint, tma_store_3d_hint, tma_store_4d_hint = (_store(rank, True) for rank in (2, 3, 4))
tma_prefetch_2d, tma_prefetch_3d, tma_prefetch_4d = _prefetch(2), _prefetch(3), _prefetch(4)
tma_prefetch_map = instruction(
    "tma_prefetch_map", "prefetch.tensormap [$0];", "l", doc="Bring a tensor map near (prefetch.tensormap)."
)
bulk_load = instruction(
    "bulk_load", "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    "rlrr",
    doc="A run of bytes, aligned to and a multiple of 16: (dst, src, bytes, bar) (cp.async.bulk).",
)  # fmt: skip
bulk_load_hint = instruction(
    "bulk_load_hint",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    "[$0], [$1], $2, [$3], $4;",
    "rlrrl", doc="bulk_load with an L2 policy: (dst, src, bytes, bar, policy) (cp.async.bulk).",
)  # fmt: skip
bulk_load_multicast = instruction(
    "bulk_load_multicast",
    "{\n.reg .b16 mask;\ncvt.u16.u32 mask, $4;\n"
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
    "[$0], [$1], $2, [$3], mask;\n}",
    "rlrrr", doc="bulk_load into the blocks of the mask: (dst, src, bytes, bar, mask) (cp.async.bulk).",
)  # fmt: skip
bulk_store = instruction(
    "bulk_store", "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;", "lrr",
    doc="A run of bytes from shared memory: (dst, src, bytes) (cp.async.bulk).",
)  # fmt: skip
bulk_store_hint = instruction(
    "bulk_store_hint", "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [$0], [$1], $2, $3;",
    "lrrl", doc="bulk_store with an L2 policy: (dst, src, bytes, policy) (cp.async.bulk).",
)  # fmt: skip
bulk_prefetch = instruction(
    "bulk_prefetch", "cp.async.bulk.prefetch.L2.global [$0], $1;", "lr",
    doc="Bring a run of bytes to the L2 cache: (src, bytes) (cp.async.bulk.prefetch).",
)  # fmt: skip
bulk_commit = instruction(
    "bulk_commit", "cp.async.bulk.commit_group;",
    doc="End this thread's group of stores (cp.async.bulk.commit_group).",
)  # fmt: skip
_GROUPS: dict[str, Any] = {"valid": lambda n: 0 <= n <= 15, "rule": "0 to 15 groups may stay pending"}
bulk_wait_read = instruction(
    "bulk_wait_read", "cp.async.bulk.wait_group.read @0;", "n", **_GROUPS,
    doc="Wait until all but n groups have read their shared memory (cp.async.bulk.wait_group).",
)  # fmt: skip
bulk_wait = instruction(
    "bulk_wait", "cp.async.bulk.wait_group @0;", "n", **_GROUPS,
    doc="Wait until all but n groups are wholly done (cp.async.bulk.wait_group).",
)  # fmt: skip

ITEM = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
SWIZZLES = (0, 32, 64, 128)


def check_tensor_map(
    pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> None:
    """The rules of cuTensorMapEncodeTiled, each with its own ValueError; see encode_tensor_map."""
    if dtype not in ITEM:
        raise ValueError(f"tensor map: dtype is {dtype!r}; known are {', '.join(ITEM)}")
    rank, item = len(shape), ITEM[dtype]
    if not 1 <= rank <= 5 or len(box) != rank or len(strides) != rank - 1:
        raise ValueError(
            f"tensor map: {rank} extents, {len(strides)} strides, {len(box)} box sides; "
            "n, n - 1 and n with n from 1 to 5 are required"
        )
    if pointer % 16:
        raise ValueError(f"tensor map: address {pointer:#x} is not a multiple of 16")
    for size in shape:
        if not 1 <= size <= 1 << 32:
            raise ValueError(f"tensor map: extent {size} is not from 1 to 2**32")
    for stride in strides:
        if stride % 16 or not 0 < stride < 1 << 40:
            raise ValueError(
                f"tensor map: stride {stride} bytes is not a positive multiple of 16 below 2**40"
            )
    for side in box:
        if not 1 <= side <= 256:
            raise ValueError(f"tensor map: box side {side} is not from 1 to 256")
    if swizzle not in SWIZZLES:
        raise ValueError(f"tensor map: swizzle is {swizzle} bytes; {SWIZZLES} exist")
    inner = box[-1] * item
    if inner % 16 or (swizzle and inner > swizzle):
        raise ValueError(
            f"tensor map: the box's rows have {inner} bytes; a multiple of 16, "
            f"at most the swizzle's {swizzle}, is required"
        )


def encode_tensor_map(
    pointer: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int = 128,
) -> npt.NDArray[np.uint64]:
    """The 128 bytes (u64[16]) of a tensor map, to be copied to global memory at a multiple of 64 bytes.

    pointer: device address; shape, box: outermost first, in elements; strides: bytes between neighbours of
    all axes but the innermost, outermost first; swizzle: 0, 32, 64 or 128 bytes. Reads beyond the shape give
    zeros, writes there are dropped. ValueError where the hardware's rules are broken, RuntimeError where the
    driver refuses.
    """
    check_tensor_map(pointer, dtype, shape, strides, box, swizzle)
    from cuda.bindings import driver

    kind = driver.CUtensorMapDataType
    code = {
        "bfloat16": kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "float16": kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "float32": kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        "uint8": kind.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[dtype]
    swizzles = driver.CUtensorMapSwizzle
    mode = {
        0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[swizzle]
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    error, encoded = driver.cuTensorMapEncodeTiled(
        code, len(shape), pointer,
        [u64(size) for size in reversed(shape)], [u64(stride) for stride in reversed(strides)],
        [u32(side) for side in reversed(box)], [u32(1)] * len(box),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if int(error):
        raise RuntimeError(
            f"tensor map: the driver refuses shape {tuple(shape)}, box {tuple(box)}: {error.name}"
        )
    return np.array([int(word) for word in encoded.opaque], np.uint64)
