"""What the tensor-core rungs of prefill attention take, checked once, and the memory they need beside it.

Knows: dtypes, shapes, strides, alignment, limits. Refuses to know: any kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_numba import compiler
from kernels_numba.attention_contract import exponent_scale
from kernels_numba.checks import ALIGNMENT, check, fail
from kernels_numba.compiler import cuda
from kernels_numba.launch import address
from kernels_numba.ops.prefill_attention.config import BLOCK_SIZE, HEAD_DIMS, MAX_GROUP
from kernels_numba.ops.prefill_attention.mma_config import MAX_BLOCKS, MmaConfig

OP, RUNG, MMA = "prefill_attention", "hopper", "mma_sync"
BFLOAT16, FLOAT16 = np.dtype(np.uint16), np.dtype(np.float16)  # bf16 as bits
NAMES: dict[Any, str] = {BFLOAT16: "bfloat16", FLOAT16: "float16"}
INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
NEEDS = {RUNG: ((9, 0), True), MMA: ((8, 0), False)}  # compute capability, whether of that major alone
MOST_ROWS = 1 << 31  # of a tensor map's coordinates; and of tokens times heads, which one number counts
MOST_KEYS = 1 << 26  # of a sequence: 16 heads of a kv head times them is counted in 31 bits


@dataclass(frozen=True)
class Operands:
    """Device addresses (lse 0 if not wanted; table: block_table, or cu_seqlens_k), sizes, bytes from one
    token of q and of out to the next, entries from one row of the table to the next, c of
    attention_contract.py, element type; keys: rows of the matrices that k and v are (key_columns wide) to the
    copy engine."""

    out: int
    q: int
    k: int
    v: int
    cu_seqlens_q: int
    context_lens: int
    table: int
    lse: int
    tokens: int
    num_seqs: int
    num_kv_heads: int
    group: int
    head_dim: int
    keys: int
    key_columns: int
    q_stride: int
    out_stride: int
    table_stride: int
    c: float
    dtype: str


def _device(name: str, array: Any, multiple: int) -> int:
    if not hasattr(array, "__cuda_array_interface__"):
        fail(OP, name, f"is a {type(array).__name__}", "a device array (cuda.to_device)")
    start = address(array) if array.size else 0
    if start % multiple:
        fail(OP, name, f"starts at address {start:#x}", f"a multiple of {multiple} bytes")
    return start


def _stride(name: str, array: Any, multiple: int) -> int:
    if not array.size:
        return multiple
    stride = int(array.strides[0]) if array.shape[0] > 1 else int(array.nbytes)
    if stride % multiple or stride >= 1 << 31:
        fail(OP, f"{name}.strides[0]", f"is {stride} bytes", f"a multiple of {multiple} below 2**31")
    return stride


def operands(
    out: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, context_lens: Any, table: Any, softmax_scale: float,
    window: Any = None, lse: Any = None, *, paged: bool = True,
) -> Operands:  # fmt: skip
    """Check out, q T[tokens, Hq, D]; caches T[num_blocks, Hkv, 64, D] and block_table i32[B, P], or with
    paged False k, v T[keys, Hkv, D] and cu_seqlens_k i32[B + 1]; cu_seqlens_q i32[B + 1], context_lens
    i32[B]; lse f32[tokens, Hq] or None. T is bfloat16 bits as uint16 or float16, D 64 or 128, Hq / Hkv a
    whole number up to 16.

    Tokens of q and out, and rows of block_table, may be cut from wider ones. ValueError names what is wrong
    and what is required.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        fail(OP, "window", f"is {window!r}", "None or a whole number of at least 1")
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        fail(OP, "softmax_scale", f"is {softmax_scale!r}", "a positive number")
    at = {name: _device(name, array, ALIGNMENT) for name, array in (("out", out), ("q", q))}
    check(OP, "out", out, tuple(NAMES), (None, None, None), rows=1)
    tokens, num_q_heads, head_dim = map(int, out.shape)
    check(OP, "q", q, (out.dtype,), out.shape, rows=1)
    if head_dim not in HEAD_DIMS:
        fail(OP, "out.shape[2]", f"is {head_dim}", f"head_dim {' or '.join(map(str, HEAD_DIMS))}")
    shape = (None, None, BLOCK_SIZE, head_dim) if paged else (None, None, head_dim)
    words = ("k_cache", "v_cache") if paged else ("k", "v")
    for field, name, array in zip("kv", words, (k, v), strict=True):
        at[field] = _device(name, array, ALIGNMENT)
        check(OP, name, array, (out.dtype,), shape)
    check(OP, words[1], v, (out.dtype,), k.shape)
    num_kv_heads = int(k.shape[1])
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        fail(OP, "q", f"has {num_q_heads} heads", f"a multiple of the {num_kv_heads} kv heads")
    group = num_q_heads // num_kv_heads
    if group > MAX_GROUP:
        fail(OP, "q", f"has {group} heads a kv head", f"at most {MAX_GROUP}")
    if tokens * num_q_heads >= MOST_ROWS:
        fail(OP, "q", f"has shape {tuple(q.shape)}", f"under {MOST_ROWS:,} rows")
    keys = int(k.shape[0]) * (num_kv_heads * BLOCK_SIZE if paged else 1)
    if keys >= MOST_ROWS:
        fail(OP, words[0], f"has shape {tuple(k.shape)}", f"under {MOST_ROWS:,} rows of keys")
    num_seqs = int(context_lens.shape[0]) if hasattr(context_lens, "shape") and context_lens.shape else 0
    for name, array, wanted in (
        ("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,)), ("context_lens", context_lens, (num_seqs,)),
        ("block_table", table, (num_seqs, None)) if paged else ("cu_seqlens_k", table, (num_seqs + 1,)),
    ):  # fmt: skip
        at[name] = _device(name, array, 4)
        check(OP, name, array, (INT32,), wanted, rows=1 if len(wanted) == 2 else 0)
    if paged and int(table.shape[1]) * BLOCK_SIZE >= MOST_KEYS:
        fail(OP, "block_table", f"has {table.shape[1]} pages a sequence", f"under {MOST_KEYS:,} keys")
    at["lse"] = 0
    if lse is not None:
        at["lse"] = _device("lse", lse, 4)
        check(OP, "lse", lse, (FLOAT32,), (tokens, num_q_heads))
    at["table"] = at.pop("block_table" if paged else "cu_seqlens_k")
    return Operands(
        **at, tokens=tokens, num_seqs=num_seqs, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim,
        keys=keys, key_columns=head_dim if paged else num_kv_heads * head_dim,
        q_stride=_stride("q", q, ALIGNMENT), out_stride=_stride("out", out, ALIGNMENT),
        table_stride=_stride("block_table", table, 4) // 4 if paged else 1,
        c=float(exponent_scale(softmax_scale)), dtype=NAMES[out.dtype],
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Workspace:
    """What launches of one stream share: the number of the next item, and how many blocks have left; every
    launch leaves both at 0. For rung "mma_sync" also what each of its blocks keeps of splits that have
    ended."""

    counters: Any  # i32[2]
    state: Any = None  # f32[MAX_BLOCKS, MmaConfig.state_words]

    @staticmethod
    def state_shape(head_dim: int) -> tuple[int, int]:
        return MAX_BLOCKS, MmaConfig(head_dim).state_words

    @staticmethod
    def of(head_dim: int | None = None) -> Workspace:
        """For rung "hopper", or with head_dim for "mma_sync" too."""
        counters = cuda.to_device(np.zeros(2, np.int32))
        if head_dim is None:
            return Workspace(counters)
        return Workspace(counters, cuda.device_array(Workspace.state_shape(head_dim), np.float32))

    def check(self, o: Operands) -> None:
        """ValueError if rung "mma_sync" cannot keep its state there."""
        have = None if self.state is None else tuple(self.state.shape)
        if have != self.state_shape(o.head_dim):
            fail(OP, "workspace", f"has state {have}", f"{self.state_shape(o.head_dim)}: of(head_dim)")


def refusal(
    capability: tuple[int, int] | None, dtype: str, head_dim: int, group: int, block_size: int = BLOCK_SIZE,
    rung: str = RUNG,
) -> str:  # fmt: skip
    """Why a rung cannot run a model's attention, or "" if it can; capability None: no GPU. Rungs without
    needs of their own pass."""
    if rung not in NEEDS:
        return ""
    (major, minor), only_major = NEEDS[rung]
    if capability is None or capability < (major, minor) or (only_major and capability != (major, minor)):
        have = "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        newer = "" if only_major else " or newer"
        return f"it needs compute capability {major}.{minor}{newer}, here is {have}"
    if dtype not in NAMES.values():
        return f"it takes {' or '.join(NAMES.values())}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head_dim {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if group > MAX_GROUP:
        return f"it takes up to {MAX_GROUP} query heads a kv head, not {group}"
    return "" if block_size == BLOCK_SIZE else f"it takes pages of {BLOCK_SIZE} keys, not {block_size}"


def require_capability(rung: str = RUNG) -> None:
    """ValueError unless the current GPU can run it; KernelsUnavailable in the simulator."""
    if compiler.SIMULATOR:
        raise compiler.KernelsUnavailable(
            f"rung {rung} is made of PTX instructions: it needs numba.cuda's compiler, not its simulator"
        )
    have = tuple(cuda.get_current_device().compute_capability)
    why = refusal(have, "bfloat16", HEAD_DIMS[0], 1, rung=rung)
    if why:
        raise ValueError(f"{OP}: rung {rung}: {why}")
