"""What the tensor-core rungs of decode attention take, checked once, and the memory that they need beside it.

Knows: dtypes, shapes, strides, alignment, limits, compute capability. Refuses to know: any kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_numba import compiler
from kernels_numba.attention_contract import SPLIT, exponent_scale
from kernels_numba.checks import ALIGNMENT, check, fail
from kernels_numba.compiler import cuda
from kernels_numba.launch import address, filled
from kernels_numba.ops.decode_attention.config import BLOCK_SIZE, HEAD_DIMS, MAX_GROUP, MAX_TOKENS, ROWS
from kernels_numba.ops.decode_attention.fold import UNWRITTEN_BYTE

OP = "decode_attention"
BFLOAT16, FLOAT16 = np.dtype(np.uint16), np.dtype(np.float16)  # bf16 as bits
NAMES: dict[Any, str] = {BFLOAT16: "bfloat16", FLOAT16: "float16"}
INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
CACHE_ROWS = 1 << 31  # of a tensor map's coordinates
NEEDS = {
    "mma_sync": ((8, 0), False),
    "hopper": ((9, 0), True),
}  # compute capability, whether of that major alone


def tiles_of_rows(rows: int) -> int:
    """Tensor-core tiles that so many query rows take."""
    return -(-rows // ROWS)


def check_tokens(tokens: Any) -> None:
    """ValueError unless it is a whole number from 1 to MAX_TOKENS."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MAX_TOKENS:
        fail(OP, "query_tokens", f"is {tokens!r}", f"a whole number from 1 to {MAX_TOKENS}")


@dataclass(frozen=True)
class Operands:
    """Device addresses (lse 0 if not wanted), sizes, bytes from one row of q and out to the next, entries
    from one row of block_table to the next, c of attention_contract.py as a float, the element type, query
    tokens of a sequence."""

    out: int
    q: int
    k_cache: int
    v_cache: int
    context_lens: int
    block_table: int
    lse: int
    num_seqs: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_blocks: int
    max_blocks: int
    q_stride: int
    out_stride: int
    table_stride: int
    c: float
    dtype: str
    tokens: int = 1

    @property
    def rows(self) -> int:
        """Query rows of a sequence and kv head."""
        return self.group * self.tokens

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows that they take."""
        return tiles_of_rows(self.rows)

    def max_splits(self, split: int = SPLIT) -> int:
        """Most splits of a sequence whose pages fit block_table."""
        return max(1, -(-self.max_blocks * BLOCK_SIZE // split))


def _device(name: str, array: Any, multiple: int) -> int:
    if not hasattr(array, "__cuda_array_interface__"):
        fail(OP, name, f"is a {type(array).__name__}", "a device array (cuda.to_device)")
    start = address(array) if array.size else 0
    if start % multiple:
        fail(OP, name, f"starts at address {start:#x}", f"a multiple of {multiple} bytes")
    return start


def _stride(name: str, array: Any) -> int:
    stride = int(array.strides[0]) if array.shape[0] > 1 else int(array.nbytes)
    if stride % 4 or stride >= 1 << 31:
        fail(OP, f"{name}.strides[0]", f"is {stride} bytes", "a multiple of 4 below 2**31")
    return stride


def check_window(window: Any) -> None:
    """ValueError unless it is None or a whole number of at least 1."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        fail(OP, "window", f"is {window!r}", "None or a whole number of at least 1")


def operands(
    out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, softmax_scale: float,
    window: Any = None, lse: Any = None, query_tokens: Any = 1,
) -> Operands:  # fmt: skip
    """Check out, q T[B query_tokens, Hq, D], caches T[num_blocks, Hkv, 64, D], context_lens i32[B],
    block_table i32[B, P], lse f32[B query_tokens, Hq] or None; T bfloat16 bits as uint16 or float16, D 64 or
    128, Hq / Hkv a whole number up to 16, query_tokens 1 to 8.

    Rows of q, out and block_table may be cut from wider ones. ValueError names what is wrong and what is
    required.
    """
    check_window(window)
    check_tokens(query_tokens)
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        fail(OP, "softmax_scale", f"is {softmax_scale!r}", "a positive number")
    addresses = [_device(name, array, 4) for name, array in (("out", out), ("q", q))]
    check(OP, "out", out, tuple(NAMES), (None, None, None), rows=1)
    num_rows, num_q_heads, head_dim = map(int, out.shape)
    if num_rows % query_tokens:
        fail(OP, "out", f"has {num_rows} rows", f"a multiple of the {query_tokens} query tokens")
    num_seqs = num_rows // query_tokens
    check(OP, "q", q, (out.dtype,), out.shape, rows=1)
    if head_dim not in HEAD_DIMS:
        fail(OP, "out.shape[2]", f"is {head_dim}", f"head_dim {' or '.join(map(str, HEAD_DIMS))}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        addresses.append(_device(name, cache, ALIGNMENT))
        check(OP, name, cache, (out.dtype,), (None, None, BLOCK_SIZE, head_dim))
    check(OP, "v_cache", v_cache, (out.dtype,), k_cache.shape)
    num_blocks, num_kv_heads = map(int, k_cache.shape[:2])
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        fail(OP, "q", f"has {num_q_heads} heads", f"a multiple of the {num_kv_heads} kv heads")
    group = num_q_heads // num_kv_heads
    if group > MAX_GROUP:
        fail(OP, "q", f"has {group} heads a kv head", f"at most {MAX_GROUP}")
    if num_blocks * num_kv_heads * BLOCK_SIZE >= CACHE_ROWS:
        fail(OP, "k_cache", f"has shape {tuple(k_cache.shape)}", f"under {CACHE_ROWS:,} rows of keys")
    for name, array in (("context_lens", context_lens), ("block_table", block_table)):
        addresses.append(_device(name, array, 4))
    check(OP, "context_lens", context_lens, (INT32,), (num_seqs,))
    check(OP, "block_table", block_table, (INT32,), (num_seqs, None), rows=1)
    addresses.append(0)
    if lse is not None:
        addresses[-1] = _device("lse", lse, 4)
        check(OP, "lse", lse, (FLOAT32,), (num_rows, num_q_heads))
    table_row = _stride("block_table", block_table) if block_table.size else 4
    out_at, q_at, k_at, v_at, lens_at, table_at, lse_at = addresses
    return Operands(
        out_at, q_at, k_at, v_at, lens_at, table_at, lse_at, num_seqs, num_kv_heads, group, head_dim,
        num_blocks, int(block_table.shape[1]), _stride("q", q) if q.size else 0,
        _stride("out", out) if out.size else 0, table_row // 4,
        float(exponent_scale(softmax_scale)), NAMES[out.dtype], query_tokens,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Workspace:
    """What launches of one stream share: partial results of `capacity` splits with all their heads, every
    byte UNWRITTEN_BYTE, and the counters, 0; every launch leaves them so. Steps with more splits, counted
    over all sequences, abort the launch that meets them: `of` says how much is always enough."""

    partial: Any  # f32[capacity, num_q_heads * query_tokens, head_dim]
    partial_ml: Any  # f32[capacity, num_q_heads * query_tokens, 2]
    counters: Any  # i32[2 + num_seqs * num_kv_heads * tiles of rows]
    capacity: int

    @staticmethod
    def of(
        num_seqs: int, num_splits: int, num_q_heads: int, num_kv_heads: int, head_dim: int,
        query_tokens: int = 1,
    ) -> Workspace:  # fmt: skip
        """For up to num_seqs sequences of query_tokens query tokens, with num_splits splits of 1,024 keys
        between them (a sequence has one at least). ValueError if that is not possible, or not countable in 31
        bits."""
        check_tokens(query_tokens)
        rows = num_q_heads * query_tokens
        tiles = tiles_of_rows(rows // num_kv_heads)
        if num_seqs < 1 or num_splits < num_seqs or num_splits * rows >= 1 << 31:
            raise ValueError(
                f"{OP}: a workspace for {num_seqs} sequences and {num_splits} splits of {rows} heads; "
                "at least one split a sequence, and under 2**31 splits times heads, are required"
            )
        return Workspace(
            filled((num_splits, rows, head_dim), np.float32, UNWRITTEN_BYTE),
            filled((num_splits, rows, 2), np.float32, UNWRITTEN_BYTE),
            cuda.to_device(np.zeros(2 + num_seqs * num_kv_heads * tiles, np.int32)),
            num_splits,
        )

    @staticmethod
    def bytes_of(num_seqs: int, num_splits: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
        """What `of` takes on the device."""
        return 4 * (num_splits * num_q_heads * (head_dim + 2) + 2 + num_seqs * num_kv_heads)

    def check(self, o: Operands) -> None:
        """ValueError if it is made for other heads or fewer sequences."""
        wanted, counters = (o.num_kv_heads * o.rows, o.head_dim), o.num_kv_heads * o.row_tiles
        if tuple(self.partial.shape[1:]) != wanted:
            fail(OP, "workspace", f"is for (heads, head_dim) {tuple(self.partial.shape[1:])}", str(wanted))
        if self.counters.size < 2 + o.num_seqs * counters:
            most = (self.counters.size - 2) // counters
            fail(OP, "workspace", f"is for {most} sequences", f"one for {o.num_seqs}")


def refusal(
    rung: str, capability: tuple[int, int] | None, dtype: str, head_dim: int, group: int, block_size: int
) -> str:
    """Why a rung cannot run a model's attention, or "" if it can; capability None: no GPU. Rungs without
    needs of their own pass."""
    if rung not in NEEDS:
        return ""
    (major, minor), only_major = NEEDS[rung]
    if capability is None or capability < (major, minor) or (only_major and capability[0] != major):
        have = "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        return (
            f"it needs compute capability {major}.{minor}{'' if only_major else ' or newer'}, here is {have}"
        )
    if dtype not in NAMES.values():
        return f"it takes {' or '.join(NAMES.values())}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head_dim {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if group > MAX_GROUP:
        return f"it takes up to {MAX_GROUP} query heads a kv head, not {group}"
    return "" if block_size == BLOCK_SIZE else f"it takes pages of {BLOCK_SIZE} keys, not {block_size}"


def require_capability(rung: str) -> None:
    """ValueError unless the current GPU can run it; KernelsUnavailable in the simulator."""
    if compiler.SIMULATOR:
        raise compiler.KernelsUnavailable(
            f"rung {rung} is made of PTX instructions: it needs numba.cuda's compiler, not its simulator"
        )
    have = tuple(cuda.get_current_device().compute_capability)
    why = refusal(rung, have, "bfloat16", HEAD_DIMS[0], 1, BLOCK_SIZE)
    if why:
        raise ValueError(f"{OP}: rung {rung}: {why}")
