"""New key and value rows go to their pages.

Knows: slots (block * block_size + offset). Refuses to know: whose pages they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned
from kernels_numba.compiler import SIMULATOR, cuda, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.registry import Rung, make_register

THREADS = 2 if SIMULATOR else 128


def store_kv_spec(k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any) -> tuple[Any, Any]:
    """Copies of the caches with row t of k and v at slot slot_mapping[t] = block * block_size + offset.

    k_cache, v_cache[num_blocks, Hkv, block_size, D], k, v[T, Hkv, D], slot_mapping int32[T]: a negative slot
    is skipped, one past the cache raises ValueError (the kernel skips it), and no slot may occur twice.
    """
    k_out, v_out = np.array(k_cache), np.array(v_cache)
    num_blocks, _, block_size, _ = k_out.shape
    for row, slot in enumerate(np.asarray(slot_mapping)):
        if slot >= num_blocks * block_size:
            raise ValueError(
                f"store_kv: slot_mapping holds {slot}; under {num_blocks * block_size} is required"
            )
        if slot >= 0:
            k_out[slot // block_size, :, slot % block_size] = k[row]
            v_out[slot // block_size, :, slot % block_size] = v[row]
    return k_out, v_out


def store_kv_cost(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: str = "bfloat16") -> Cost:
    """k and v rows read and written once, a slot read per token; no arithmetic."""
    return Cost(bytes=num_tokens * (4 * num_kv_heads * head_dim * ITEMSIZE[dtype] + 4), flops=0)


@cache
def make_store_kv_kernel(head_dim: int, block_size: int, threads: int = THREADS) -> Any:
    """k_cache[slot // block_size, h, slot % block_size, d] = k[t, h, d], and v alike.

    Arguments: k_cache, v_cache T[num_blocks, num_kv_heads, block_size, D], k, v T[num_tokens, num_kv_heads,
    D], slot_mapping i32[num_tokens]. T is any type: bits are copied.
    Who does what: block (t, c) copies `threads` elements of row t, one a thread, adjacent threads adjacent
    elements.
    """

    @jit()
    def store_kv_kernel(k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any) -> None:
        token = cuda.blockIdx.x
        element_idx = cuda.blockIdx.y * threads + cuda.threadIdx.x
        head = element_idx // head_dim
        d = element_idx % head_dim
        slot = slot_mapping[token]
        if slot >= 0 and head < k.shape[1]:
            block = slot // block_size
            offset = slot % block_size
            if block < k_cache.shape[0]:
                k_cache[block, head, offset, d] = k[token, head, d]
                v_cache[block, head, offset, d] = v[token, head, d]

    return store_kv_kernel


def _check(kind: type[Host], k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any) -> None:
    dtypes = kind.elements("store_kv", "k_cache", k_cache)
    check("store_kv", "k_cache", k_cache, dtypes, (None, None, None, None))
    check("store_kv", "v_cache", v_cache, dtypes, k_cache.shape)
    check("store_kv", "k", k, dtypes, (None, k_cache.shape[1], k_cache.shape[3]), rows=1)
    check("store_kv", "v", v, dtypes, k.shape, rows=1)
    check("store_kv", "slot_mapping", slot_mapping, kind.int32, (k.shape[0],))


def store_kv_reference(
    k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any, *, stream: Any = None
) -> None:
    """Rung "reference": numpy; scatters the rows into the caller's pages."""
    _check(Host, k_cache, v_cache, k, v, slot_mapping)
    scatter_rows(k_cache, v_cache, k, v, slot_mapping)


def scatter_rows(
    k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any, *, stream: Any = None
) -> None:
    """store_kv_reference for arrays that have been checked: only the slots' range is."""
    if slot_mapping.size == 0:
        return
    block_size = k_cache.shape[2]
    if slot_mapping.max() >= k_cache.shape[0] * block_size:
        store_kv_spec(k_cache, v_cache, k, v, slot_mapping)  # raises with the value
    if slot_mapping.min() < 0:
        used = slot_mapping >= 0
        k, v, slot_mapping = k[used], v[used], slot_mapping[used]
    block, offset = np.divmod(slot_mapping, block_size)
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


def store_kv(k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any, *, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, k_cache, v_cache, k, v, slot_mapping)
    check_aligned("store_kv", "k_cache", k_cache)
    check_aligned("store_kv", "v_cache", v_cache)
    if k.size == 0 or k_cache.size == 0:
        return
    element_name(k_cache)
    tokens, num_kv_heads, head_dim = k.shape
    kernel = make_store_kv_kernel(head_dim, k_cache.shape[2])
    grid = (tokens, -(-num_kv_heads * head_dim // THREADS))
    kernel[grid, THREADS, stream or 0](k_cache, v_cache, k, v, slot_mapping)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_tokens": 5, "num_kv_heads": 2, "head_dim": 3, "num_blocks": 3, "block_size": 4},
    "toy_empty": {"num_tokens": 0, "num_kv_heads": 2, "head_dim": 4, "num_blocks": 3, "block_size": 4},
    "smollm2_135m_prefill": {
        "num_tokens": 700, "num_kv_heads": 3, "head_dim": 64, "num_blocks": 20, "block_size": 64,
    },
    "llama3_8b_decode": {
        "num_tokens": 64, "num_kv_heads": 8, "head_dim": 128, "num_blocks": 70, "block_size": 64,
    },
}  # fmt: skip
rungs: dict[str, Rung] = {"reference": store_kv_reference, "plain": store_kv}
register = make_register("store_kv", rungs)
